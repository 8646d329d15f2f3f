import pytest

from megdet.errors import InputError
from megdet.recipe_check import check_new_recipe, check_recipe
from megdet.recipe_file import parse_recipe
from recipe_refusals import refusal

AT_LEAST_ONE = """batch_size group_size plan_window checkpoint_epochs keep_checkpoints data.max_long_edge
data.max_pixels data.canvas_multiple model.fpn.channels model.rpn.samples model.rpn.train_proposals_before_nms
model.rpn.train_proposals model.rpn.test_proposals_before_nms model.rpn.test_proposals
model.box_head.channels model.box_head.pool_size model.box_head.samples
model.box_head.detections model.box_head.layers model.box_head.convolution_channels model.rpn.convolutions
evaluation.batch_size evaluation.merged_detections""".split()
NOT_NEGATIVE = """bn_size seed model.backbone.frozen_stages evaluation.every_epochs schedule.warmup_steps
data.color_jitter model.backbone.norm_eps
model.box_head.convolutions model.box_head.sampling_ratio model.rpn.smooth_l1_beta model.rpn.min_size
model.box_head.smooth_l1_beta model.box_head.test_iterations optimizer.base_lr
optimizer.weight_decay optimizer.clip_norm schedule.warmup_start data.cache_gib noise_interval""".split()
FRACTIONS = """data.mosaic data.crop_probability
data.copy_paste data.paste_least_area data.repeat_threshold data.crop_least_area
data.most_replaced data.horizontal_flip data.vertical_flip
model.rpn.positive_fraction model.rpn.positive_iou
model.rpn.negative_iou model.rpn.nms_iou model.box_head.positive_fraction model.box_head.positive_iou
model.box_head.score_threshold model.box_head.nms_iou model.box_head.vote_iou evaluation.merge_iou
evaluation.vote_iou""".split()


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        *((key, "0", "at least 1") for key in AT_LEAST_ONE),
        *((key, "-1", "not be negative") for key in NOT_NEGATIVE),
        *((key, value, "between 0 and 1") for key in FRACTIONS for value in ("-0.1", "1.1")),
        ("seed", str(2**63), r"below 2**63"),
        ("data.short_edges", "[]", "at least one positive length"),
        ("data.short_edges", "[800, 0]", "at least one positive length"),
        ("data.max_pixels", "178956971", "Pillow refuses more than 178956970"),
        ("data.scale_jitter", "[0, 1]", "two positive factors, the smaller first"),
        ("data.scale_jitter", "[2, 1]", "two positive factors, the smaller first"),
        ("data.crop", "[640]", "two positive lengths, height and width, or empty"),
        ("data.crop", "[640, 0]", "two positive lengths, height and width, or empty"),
        ("evaluation.scales", "[600, 600]", "positive lengths, each once"),
        ("evaluation.scales", "[0]", "positive lengths, each once"),
        ("evaluation.object_ranges", "[[0, 90], [30, 1e5]]", "a range for each of the 1 scales"),
        ("evaluation.object_ranges", "[[90, 90]]", "two sizes that rise"),
        ("evaluation.object_ranges", "[[-1, 90]]", "two sizes that rise"),
        ("model.std", "[1, 0, 1]", "every value must be positive"),
        ("model.anchors.sizes", "[8, 16, 32, 64]", "five positive sizes"),
        ("model.anchors.sizes", "[8, 16, 32, 64, 0]", "five positive sizes"),
        ("model.anchors.ratios", "[]", "positive ratios"),
        ("model.anchors.ratios", "[1, -1]", "positive ratios"),
        ("model.backbone.frozen_stages", "6", "at most 5"),
        ("schedule.epochs", "3", "policy normal has its own length"),
        ("optimizer.momentum", "1", "at least 0 and below 1"),
        ("optimizer.momentum", "-0.1", "at least 0 and below 1"),
        ("optimizer.ema_decay", "1", "at least 0 and below 1"),
        ("optimizer.betas", "[0.9, 1]", "both must be at least 0 and below 1"),
        ("optimizer.eps", "0", "must be positive"),
        ("optimizer.trust_coefficient", "0", "must be positive"),
        (
            "optimizer.agvm",
            "true",
            "bn_size 16 makes 1 group(s), an odd number: choose a bn_size of 1, 2, 4, 8",
        ),
        ("model.rpn.negative_iou", "0.8", "must not exceed positive_iou 0.7"),
        ("bn_size", "5", "must divide batch_size 16: choose one of 1, 2, 4, 8, 16"),
        ("model.backbone.norm", "group", "no norm of the recipe is batch"),
        ("model.fpn.norm", "frozen", "never trained"),
        ("model.rpn.norm", "frozen", "never trained"),
        ("model.box_head.norm", "frozen", "never trained"),
        ("schedule.milestones", "[8]", "one factor for each of the 1 milestones"),
        ("schedule.factors", "[0.1]", "one factor for each of the 0 milestones"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_its_key(key, value, why):
    message = refusal("", **{key.replace(".", "__"): value})
    named = {"model.backbone.norm": "bn_size", "schedule.milestones": "schedule.factors"}.get(key, key)
    assert message.startswith(f"r.yaml: {named} is ")
    assert why in message


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("anchors.sizes", "[8, 16, 32, 64]", "five positive sizes, for P3 to P7"),
        ("anchors.ratios", "[]", "positive ratios"),
        ("anchors.scales_per_octave", "0", "at least 1"),
        ("head.prior", "0", "between 0 and 1, without them"),
        ("head.prior", "1", "between 0 and 1, without them"),
        ("head.negative_iou", "0.6", "must not exceed positive_iou 0.5"),
        ("head.focal_alpha", "1.5", "between 0 and 1"),
        ("head.focal_gamma", "-1", "not be negative"),
        ("head.norm", "frozen", "never trained"),
        ("head.box_loss", "iou", "choose one of smooth_l1, giou"),
    ],
)
def test_what_retinanet_cannot_have_is_refused_by_its_key(key, value, why):
    message = refusal("model: {kind: retinanet}", **{f"model__{key.replace('.', '__')}": value})
    assert message.startswith(f"r.yaml: model.{key} is ")
    assert why in message


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("anchors.sizes", "[]", "it must be positive sizes"),
        ("anchors.sizes", "[32, 0]", "it must be positive sizes"),
        ("anchors.ratios", "[]", "positive ratios"),
        ("backbone.output_stride", "4", "it must be 32, 16 or 8"),
        ("backbone.deformable_stages", "[2]", "some of the stages 3, 4 and 5"),
        ("box_head.pool_size", "0", "at least 1"),
        ("box_head.norm", "frozen", "never trained"),
    ],
)
def test_what_rfcn_cannot_have_is_refused_by_its_key(key, value, why):
    message = refusal("model: {kind: rfcn}", **{f"model__{key.replace('.', '__')}": value})
    assert message.startswith(f"r.yaml: model.{key} is ")
    assert why in message


def test_whole_sizes_of_less_than_a_pixel_are_refused():
    text = "model: {kind: retinanet, anchors: {sizes: [0.5, 16, 32, 64, 128], whole_sizes: true}}"
    assert "model.anchors.sizes is (0.5, 16.0, 32.0, 64.0, 128.0): rounded down to whole pixels" in refusal(text)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"bn_size": "0", "group_size": "3"}, "group_size is 3: it must divide batch_size 16"),
        (
            {"data.cache": "resized", "data.resize": "torchvision"},
            "resized: data.resize torchvision makes pixels",
        ),
        (
            {"bn_size": "0", "model.fpn.norm": "batch"},
            "model.fpn.norm is batch: frozen statistics that were never trained",
        ),
        (
            {"schedule.milestones": "[8, 4]", "schedule.factors": "[0.1, 0.1]", "schedule.policy": "step"},
            "schedule.milestones is (8.0, 4.0): they must rise",
        ),
        (
            {"schedule.milestones": "[4]", "schedule.factors": "[0.1]"},
            "schedule.milestones is (4.0,): policy normal has its own",
        ),
        ({"data.cache": "resized", "data.short_edges": "[600, 800]"}, "drawn at several sizes"),
        (
            {"optimizer.agvm": "true", "optimizer.kind": "lamb", "bn_size": "8"},
            "optimizer.agvm is True: lamb has rates of",
        ),
        (
            {"optimizer.agvm": "true", "bn_size": "0", "group_size": "4", "batch_size": "12"},
            "group_size 4 makes 3 group(s), an odd number: choose a group_size of 1, 2, 3, 6",
        ),
        ({"optimizer.agvm": "true", "bn_size": "3", "batch_size": "9"}, "an odd number: choose an even batch_size"),
        (
            {"optimizer.agvm": "true", "bn_size": "8", "model.backbone.frozen_stages": "5"},
            "optimizer.agvm is True: it measures every module by the backbone, all of which is frozen",
        ),
        (
            {"schedule.warmup": "exponential", "schedule.warmup_start": "0"},
            "schedule.warmup_start is 0.0: an exponential warmup cannot rise from 0",
        ),
        ({"data.cache": "resized", "data.crop": "[64, 64]"}, "another place in every epoch (data.crop): cache decoded"),
        ({"data.cache": "resized", "data.scale_jitter": "[0.5, 1]"}, "data.cache is resized: an image is drawn at"),
        ({"data.cache": "decoded", "data.cache_folder": ""}, "data.cache_folder is : an empty name"),
    ],
)
def test_values_that_contradict_each_other_are_refused(overrides, message):
    assert message in refusal("", **{key.replace(".", "__"): value for key, value in overrides.items()})


@pytest.mark.parametrize(
    "overrides",
    [
        {"bn_size": 0, "group_size": 4},
        {"bn_size": 0, "model.fpn.norm": "group", "model.backbone.norm": "frozen"},
        {
            "model.fpn.norm": "batch",
            "model.rpn.norm": "batch",
            "model.box_head.norm": "batch",
            "model.backbone.norm": "group",
        },
        {
            "schedule.policy": "step",
            "schedule.epochs": 9,
            "schedule.milestones": "[4, 8]",
            "schedule.factors": "[0.1, 0.5]",
        },
        {"bn_size": 16, "group_size": 3},  # not used, so it need not divide
        {"model.backbone.frozen_stages": 5, "model.backbone.norm_eps": 0},
        {"data.cache": "resized", "data.cache_gib": 0},
        {"optimizer.agvm": True, "bn_size": 8, "optimizer.kind": "adamw"},
        {"noise_interval": 50, "optimizer.kind": "lars"},
        {"schedule.warmup": "exponential", "schedule.warmup_start": 0, "schedule.warmup_steps": 0},
        {"data.cache": "decoded", "data.short_edges": "[600, 800]", "data.scale_jitter": "[0.5, 1]"},
    ],
)
def test_what_can_be_trained_is_not_refused(overrides):
    check_recipe(parse_recipe("", "r.yaml", overrides), "r.yaml")


@pytest.mark.parametrize("epochs", [None, 0, -1])
def test_policies_without_a_length_of_their_own_need_epochs(epochs):
    overrides = {"schedule.policy": "cosine"} | ({} if epochs is None else {"schedule.epochs": epochs})
    with pytest.raises(InputError, match=r"schedule\.epochs .* needs a positive number of epochs"):
        parse_recipe("", "r.yaml", overrides)


def test_milestones_after_the_end_are_refused():
    text = "schedule: {policy: step, epochs: 5, milestones: [5], factors: [0.1]}"
    with pytest.raises(InputError, match=r"schedule\.milestones .* before the end at epoch 5"):
        parse_recipe(text, "r.yaml")


@pytest.mark.parametrize("kind", ["faster_rcnn", "rfcn", "retinanet"])
def test_anchors_without_area_in_whole_pixels_are_refused_to_new_runs_only(kind):
    thin = {"model.kind": kind, "model.anchors.ratios": "[0.0001]"}
    recipe = parse_recipe("", "r.yaml", thin)  # the recipe of a run of an earlier version loads
    with pytest.raises(InputError, match=r"an anchor of size .* and ratio 0\.0001 would have no area in whole pixels"):
        check_new_recipe(recipe)
    check_new_recipe(parse_recipe("", "r.yaml", {**thin, "model.anchors.whole_pixels": False}))
