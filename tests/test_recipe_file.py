import dataclasses
from dataclasses import replace

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megdet.errors import InputError, nearest
from megdet.recipe import BoxHead, Data, Fpn, Recipe
from megdet.recipe_check import check_recipe
from megdet.recipe_file import (
    dump_recipe,
    first_difference,
    load_recipe,
    packaged_recipes,
    parse_recipe,
    recipe_keys,
    recipe_name,
    recipe_parser,
)


def refusal(text: str, **overrides: object) -> str:
    """The message with which a recipe is refused; overrides write a dot as two underscores."""
    with pytest.raises(InputError) as caught:
        parse_recipe(text, "r.yaml", {key.replace("__", "."): value for key, value in overrides.items()})
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_an_empty_recipe_is_the_papers_baseline():
    assert parse_recipe("", "r.yaml") == Recipe()
    assert parse_recipe("{}", "r.yaml") == Recipe()


def test_the_defaults_survive_yaml():
    text = dump_recipe(Recipe())
    assert parse_recipe(text, "r.yaml") == Recipe()
    assert set(yaml.safe_load(text)) == {f.name for f in dataclasses.fields(Recipe)}


TEXT = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), max_size=20) | st.sampled_from(
    ["null", "true", "123", "1e5", "[1]", "{a: 1}", "# no", "a: b", "~", "", "-", "ü日本.jpg", "  spaces  ", "'"]
)
POSITIVE = st.floats(1e-6, 1e6)


# the dataclasses are made in the test: their type checks draw random numbers, which strategies must not
DATA = st.fixed_dictionaries(
    {
        "train_images": TEXT,
        "short_edges": st.lists(st.integers(1, 2000), min_size=1, max_size=4).map(tuple),
        "mean": st.tuples(POSITIVE, POSITIVE, POSITIVE),
        "draw_demo": st.sampled_from(["", "easy", "hard", "tiny"]),
    }
)


@settings(max_examples=40)
@given(st.integers(0, 2**63 - 1), st.booleans(), DATA, st.sampled_from(["batch", "group", "none"]), POSITIVE)
def test_any_recipe_survives_yaml(seed, tensorboard, data, norm, beta):
    recipe = Recipe(
        seed=seed, tensorboard=tensorboard, data=Data(**data), fpn=Fpn(norm=norm), box_head=BoxHead(smooth_l1_beta=beta)
    )
    again = parse_recipe(dump_recipe(recipe), "r.yaml")
    assert again == recipe
    assert first_difference(again, recipe) == ""


@settings(max_examples=40)
@given(TEXT)
def test_a_text_override_is_taken_to_the_letter(text):
    assert parse_recipe("", "r.yaml", {"data.train_images": text}).data.train_images == text


@pytest.mark.parametrize("name", list(packaged_recipes()))
def test_every_packaged_recipe_loads(name):
    assert load_recipe(name) == load_recipe(name, {})


def test_overrides_come_on_top_of_the_file(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("fpn:\n  channels: 64\nbatch_size: 32\n")
    recipe = load_recipe(
        str(file),
        {
            "fpn.channels": "128",
            "optimizer.base_lr": "1e-3",
            "data.short_edges": "[600, 800]",
            "tensorboard": "true",
            "rpn.samples": 64,
        },
    )
    assert (recipe.fpn.channels, recipe.batch_size, recipe.optimizer.base_lr) == (128, 32, 1e-3)
    assert (recipe.data.short_edges, recipe.tensorboard, recipe.rpn.samples) == ((600, 800), True, 64)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch_sise: 3", "r.yaml: unknown key 'batch_sise'; did you mean 'batch_size'?"),
        ("fpn: {chanels: 3}", "r.yaml: unknown key 'fpn.chanels'; did you mean 'fpn.channels'?"),
        ("box_head:\n  sample: 3", "r.yaml: unknown key 'box_head.sample'; did you mean 'box_head.samples'?"),
        ("channels: 3", "r.yaml: unknown key 'channels'; did you mean 'fpn.channels'?"),
        ("1: 3", "r.yaml: unknown key '1'"),
        ('"a\\nb": 3', "r.yaml: unknown key 'a b'"),
        ("batch_size: 1.5", "r.yaml: batch_size: expected a value of type int, got 1.5"),
        ("batch_size: true", "r.yaml: batch_size: expected a value of type int, got True"),
        ("batch_size: many", "r.yaml: batch_size: expected a value of type int, got many"),
        ("tensorboard: 1", "r.yaml: tensorboard: expected a value of type bool, got 1"),
        ("data: {train_images: 3}", "r.yaml: data.train_images: expected a value of type str, got 3"),
        ("data: {mean: [0, 0]}", "r.yaml: data.mean: expected a tuple with 3 elements, got [0, 0]"),
        ("data: {short_edges: [a]}", "r.yaml: data.short_edges: expected a value of type int, got a"),
        (
            "precision: half",
            "r.yaml: precision: expected one of ['float32', 'tf32', 'bfloat16', 'float64'], got half",
        ),
        *(
            (
                f"data: {{canvas_edges: [{low}, {high}]}}",
                f"r.yaml: data.canvas_edges is ({low}, {high}): they must be positive lengths that rise",
            )
            for low, high in ((64, 32), (32, 32), (0, 32))
        ),
        ("batch_size:", "r.yaml: batch_size has no value: write one, or leave the key out for its default"),
        ("fpn:", "r.yaml: fpn has no value: write one, or leave the key out for its default"),
        ("fpn: 3", "r.yaml: fpn is a section: write an indented channels: under it"),
        ("[1, 2]", "r.yaml: a recipe is a mapping of keys to values, this is a list"),
        ("optimizer: {base_lr: .nan}", "r.yaml: optimizer.base_lr is nan: it must be finite"),
        ("optimizer: {base_lr: '.nan'}", "r.yaml: optimizer.base_lr is nan: it must be finite"),
        ("optimizer: {base_lr: -.inf}", "r.yaml: optimizer.base_lr is -inf: it must be finite"),
        ("data: {mean: [0, .nan, 0]}", "r.yaml: data.mean is (0.0, nan, 0.0): it must be finite"),
    ],
)
def test_what_is_no_recipe_is_refused_with_its_place_and_the_nearest_name(text, message):
    assert refusal(text) == message


def test_text_that_is_no_yaml_is_refused_with_its_line():
    assert refusal("a: 1\nb: [").startswith("r.yaml: not valid YAML: ")
    assert "line 2" in refusal("a: 1\nb: [")


def test_a_section_written_as_a_number_is_refused_under_an_override_too():
    assert "fpn is a section" in refusal("fpn: 3", fpn__channels="64")


def test_an_override_may_fill_an_empty_section():
    assert parse_recipe("fpn:", "r.yaml", {"fpn.channels": "64"}).fpn.channels == 64


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("fpn.chanels", "3", "unknown option '--fpn.chanels'; did you mean 'fpn.channels'?"),
        ("fpn", "3", "unknown option '--fpn'"),
        ("batch_size", "many", "batch_size: expected a value of type int, got many"),
        ("batch_size", "", "batch_size: expected a value of type int, got"),
        ("batch_size", "[", "option '--batch_size': cannot read the value '['"),
        ("optimizer.base_lr", "inf", "optimizer.base_lr"),
        ("optimizer.base_lr", ".nan", "optimizer.base_lr is nan: it must be finite"),
        ("batch_size", None, "batch_size has no value"),
    ],
)
def test_bad_overrides_are_refused(key, value, message):
    assert message in refusal("", **{key.replace(".", "__"): value})


AT_LEAST_ONE = """batch_size group_size plan_window checkpoint_epochs keep_checkpoints data.max_long_edge
data.canvas_multiple fpn.channels rpn.samples rpn.train_proposals_before_nms rpn.train_proposals
rpn.test_proposals_before_nms rpn.test_proposals box_head.channels box_head.pool_size box_head.sampling_ratio
box_head.samples box_head.detections evaluation.batch_size""".split()
NOT_NEGATIVE = """bn_size seed backbone.frozen_stages evaluation.every_epochs schedule.warmup_steps data.color_jitter
backbone.norm_eps rpn.smooth_l1_beta rpn.min_size box_head.smooth_l1_beta optimizer.base_lr optimizer.weight_decay
optimizer.clip_norm schedule.warmup_start data.cache_gib noise_interval""".split()
FRACTIONS = """data.horizontal_flip data.vertical_flip rpn.positive_fraction rpn.positive_iou rpn.negative_iou
rpn.nms_iou box_head.positive_fraction box_head.positive_iou box_head.score_threshold box_head.nms_iou""".split()


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        *((key, "0", "at least 1") for key in AT_LEAST_ONE),
        *((key, "-1", "not be negative") for key in NOT_NEGATIVE),
        *((key, value, "between 0 and 1") for key in FRACTIONS for value in ("-0.1", "1.1")),
        ("seed", str(2**63), r"below 2**63"),
        ("data.short_edges", "[]", "at least one positive length"),
        ("data.short_edges", "[800, 0]", "at least one positive length"),
        ("data.scale_jitter", "[0, 1]", "two positive factors, the smaller first"),
        ("data.scale_jitter", "[2, 1]", "two positive factors, the smaller first"),
        ("data.std", "[1, 0, 1]", "every value must be positive"),
        ("anchors.sizes", "[8, 16, 32, 64]", "five positive sizes"),
        ("anchors.sizes", "[8, 16, 32, 64, 0]", "five positive sizes"),
        ("anchors.ratios", "[]", "positive ratios"),
        ("anchors.ratios", "[1, -1]", "positive ratios"),
        ("backbone.frozen_stages", "6", "at most 5"),
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
        ("rpn.negative_iou", "0.8", "must not exceed rpn.positive_iou 0.7"),
        ("bn_size", "5", "must divide batch_size 16: choose one of 1, 2, 4, 8, 16"),
        ("backbone.norm", "group", "no norm of the recipe is batch"),
        ("fpn.norm", "frozen", "never trained"),
        ("rpn.norm", "frozen", "never trained"),
        ("box_head.norm", "frozen", "never trained"),
        ("schedule.milestones", "[8]", "one factor for each of the 1 milestones"),
        ("schedule.factors", "[0.1]", "one factor for each of the 0 milestones"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_its_key(key, value, why):
    message = refusal("", **{key.replace(".", "__"): value})
    named = {"backbone.norm": "bn_size", "schedule.milestones": "schedule.factors"}.get(key, key)
    assert message.startswith(f"r.yaml: {named} is ")
    assert why in message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"bn_size": "0", "group_size": "3"}, "group_size is 3: it must divide batch_size 16"),
        ({"bn_size": "0", "fpn.norm": "batch"}, "fpn.norm is batch: frozen statistics that were never trained"),
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
            {"optimizer.agvm": "true", "bn_size": "8", "backbone.frozen_stages": "5"},
            "optimizer.agvm is True: it measures every module by the backbone, all of which is frozen",
        ),
        (
            {"schedule.warmup": "exponential", "schedule.warmup_start": "0"},
            "schedule.warmup_start is 0.0: an exponential warmup cannot rise from 0",
        ),
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
        {"bn_size": 0, "fpn.norm": "group", "backbone.norm": "frozen"},
        {"fpn.norm": "batch", "rpn.norm": "batch", "box_head.norm": "batch", "backbone.norm": "group"},
        {
            "schedule.policy": "step",
            "schedule.epochs": 9,
            "schedule.milestones": "[4, 8]",
            "schedule.factors": "[0.1, 0.5]",
        },
        {"bn_size": 16, "group_size": 3},  # not used, so it need not divide
        {"backbone.frozen_stages": 5, "backbone.norm_eps": 0},
        {"data.cache": "resized", "data.cache_gib": 0},
        {"optimizer.agvm": True, "bn_size": 8, "optimizer.kind": "adamw"},
        {"noise_interval": 50, "optimizer.kind": "lars"},
        {"schedule.warmup": "exponential", "schedule.warmup_start": 0, "schedule.warmup_steps": 0},
        {"data.cache": "decoded", "data.short_edges": "[600, 800]", "data.scale_jitter": "[0.5, 1]"},
    ],
)
def test_what_can_be_trained_is_not_refused(overrides):
    check_recipe(parse_recipe("", "r.yaml", overrides), "r.yaml")


def test_an_unknown_recipe_is_refused_with_those_there_are():
    with pytest.raises(InputError, match=r"no recipe 'demmo': .*; did you mean 'demo'\?"):
        load_recipe("demmo")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00\x01", b"batch_size: \x00"])
def test_a_file_that_is_no_text_is_refused(content, tmp_path):
    file = tmp_path / "r.yaml"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"r\.yaml(: not valid YAML| is not UTF-8 text)") as caught:
        load_recipe(str(file))
    assert "\n" not in str(caught.value)


def test_a_recipe_is_called_after_its_file_or_its_run():
    assert recipe_name("demo") == "demo"
    assert recipe_name("some/where/mine.yaml") == "mine"
    assert recipe_name("runs/a/recipe.yaml") == "a"


def test_the_first_difference_is_told_with_both_values():
    other = dataclasses.replace(Recipe(), fpn=Fpn(channels=64), seed=0)
    assert first_difference(Recipe(), other) == "fpn.channels: 256 here, 64 there"


def test_every_key_has_a_help_text_and_is_an_option():
    text = recipe_parser("megdet").format_help()
    for key in recipe_keys():
        assert f"--{key}" in text
    assert text.count("images per optimizer step, over all devices") == 1


def test_derived_numbers_follow_from_the_fields():
    recipe = Recipe(batch_size=64, bn_size=16)
    assert (recipe.images_per_group, recipe.groups_per_step) == (16, 4)
    frozen = Recipe(batch_size=64, bn_size=0, group_size=2)
    assert (frozen.images_per_group, frozen.groups_per_step) == (2, 32)


def test_the_nearest_name_is_offered_only_if_it_is_near():
    assert nearest("batchsize", ["batch_size", "seed"]) == "; did you mean 'batch_size'?"
    assert nearest("xyz", ["batch_size", "seed"]) == ""


def test_a_message_is_one_line_whatever_is_put_into_it():
    assert str(InputError("a\nb\r\nc")) == "a b c"


@pytest.mark.parametrize("epochs", [None, 0, -1])
def test_policies_without_a_length_of_their_own_need_epochs(epochs):
    overrides = {"schedule.policy": "cosine"} | ({} if epochs is None else {"schedule.epochs": epochs})
    with pytest.raises(InputError, match=r"schedule\.epochs .* needs a positive number of epochs"):
        parse_recipe("", "r.yaml", overrides)


def test_milestones_after_the_end_are_refused():
    text = "schedule: {policy: step, epochs: 5, milestones: [5], factors: [0.1]}"
    with pytest.raises(InputError, match=r"schedule\.milestones .* before the end at epoch 5"):
        parse_recipe(text, "r.yaml")


def test_a_key_that_stands_twice_is_refused():
    with pytest.raises(InputError, match="key 'seed' stands twice"):
        parse_recipe("seed: 1\nbatch_size: 16\nseed: 2", "r.yaml")


def test_a_dotted_key_in_yaml_is_refused_with_how_to_write_it():
    with pytest.raises(InputError, match=r"written nested: fpn: \{channels"):
        parse_recipe("fpn.channels: 64", "r.yaml")


def test_a_run_folder_named_as_a_recipe_is_refused_with_its_recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text("seed: 1")
    with pytest.raises(InputError, match=r"is a run folder: its recipe is .*recipe\.yaml"):
        load_recipe(str(tmp_path))


def test_where_the_data_lie_and_how_often_to_save_does_not_make_another_run():
    other = replace(Recipe(), tensorboard=True, keep_checkpoints=9, data=replace(Data(), train_images="elsewhere"))
    assert first_difference(Recipe(), other) == ""
    assert first_difference(Recipe(), replace(other, seed=1)) == "seed: 0 here, 1 there"
