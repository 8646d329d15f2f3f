"""Both sides of a comparison with torchvision are configured alike."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import nn

from factories import with_model
from megdet.architecture_heads import BoxHead
from megdet.architecture_parts import Rpn
from megdet.inference.trained import place_model
from megdet.layers.batch_norm import CrossDeviceBatchNorm
from megdet.model.choice import make_detector
from megdet.structures import Targets

Script = Callable[[str], ModuleType]
HEIGHT, WIDTH = 96, 128


@pytest.fixture
def cudnn_flags() -> Iterator[None]:
    flags = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    yield
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = flags


def test_torchvision_has_every_number_of_the_recipe(script: Script) -> None:
    sides = script("sides")
    recipe = sides.shared_recipe(2)
    model = replace(
        recipe.model,
        rpn=Rpn(
            samples=11,
            positive_fraction=0.3,
            positive_iou=0.75,
            negative_iou=0.2,
            train_proposals_before_nms=70,
            train_proposals=60,
            test_proposals_before_nms=50,
            test_proposals=40,
            nms_iou=0.6,
        ),
        box_head=BoxHead(samples=13, positive_fraction=0.4, positive_iou=0.55, score_threshold=0.2, nms_iou=0.45),
    )
    theirs = sides.torchvision_detector(replace(recipe, model=model), HEIGHT, WIDTH)
    own, heads = theirs.rpn, theirs.roi_heads
    assert own._pre_nms_top_n == {"training": 70, "testing": 50}
    assert own._post_nms_top_n == {"training": 60, "testing": 40}
    assert own.nms_thresh == 0.6
    assert (own.fg_bg_sampler.batch_size_per_image, own.fg_bg_sampler.positive_fraction) == (11, 0.3)
    assert (own.proposal_matcher.high_threshold, own.proposal_matcher.low_threshold) == (0.75, 0.2)
    assert (heads.fg_bg_sampler.batch_size_per_image, heads.fg_bg_sampler.positive_fraction) == (13, 0.4)
    assert heads.proposal_matcher.high_threshold == 0.55
    assert (heads.score_thresh, heads.nms_thresh, heads.detections_per_img) == (0.2, 0.45, 100)
    assert theirs.transform.min_size == (HEIGHT,)
    assert theirs.transform.max_size == WIDTH


def test_both_sides_have_the_numbers_of_torchvision(script: Script) -> None:
    recipe = script("sides").shared_recipe(2)
    assert (recipe.model.rpn.train_proposals_before_nms, recipe.model.rpn.train_proposals) == (2000, 2000)
    assert (recipe.model.rpn.test_proposals_before_nms, recipe.model.rpn.test_proposals) == (1000, 1000)


def test_both_sides_train_the_same_weights_and_normalize_over_the_batch(script: Script) -> None:
    sides = script("sides")
    recipe = sides.shared_recipe(2)
    theirs = sides.torchvision_detector(recipe, HEIGHT, WIDTH)
    ours = make_detector(recipe, sides.NUM_CLASSES)
    trained = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (theirs, ours)]
    extra = 4 * 1024 + 4  # torchvision predicts a box of the background, too
    assert trained[0] - extra == trained[1]
    norms = [
        sum(isinstance(module, kind) for module in model.modules())
        for model, kind in ((theirs, nn.BatchNorm2d), (ours, CrossDeviceBatchNorm))
    ]
    assert norms[0] == norms[1] == 53
    assert recipe.bn_size == recipe.batch_size == 2


@pytest.mark.parametrize("kind", ["faster_rcnn", "mask_rcnn"])
def test_both_sides_have_the_same_losses_at_their_first_step(script: Script, kind: str) -> None:
    """Every anchor and proposal is sampled, so that no draw differs; the RPN's boxes alone are many."""
    sides = script("sides")
    recipe = sides.shared_recipe(1, kind=kind)
    everything = {"samples": 4000, "positive_fraction": 1.0}
    recipe = with_model(recipe, rpn=everything, box_head=everything)
    theirs = sides.torchvision_detector(recipe, HEIGHT, WIDTH).train()
    ours = make_detector(recipe, sides.NUM_CLASSES)
    sides.copy_weights(theirs, ours)
    place_model(ours, torch.device("cpu"), recipe.precision)
    ours.train()
    images = torch.rand(1, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))
    boxes = torch.tensor([[[10.0, 12.0, 60.0, 70.0], [40.0, 20.0, 120.0, 90.0]]])
    labels = torch.tensor([[3, 5]])
    pixels = sides.ellipses(boxes, HEIGHT, WIDTH)
    assert pixels[0, 0].sum() == pytest.approx(math.pi / 4 * 50 * 58, rel=0.01)
    found = theirs(list(images), [{"boxes": boxes[0], "labels": labels[0] + 1, "masks": pixels[0].to(torch.uint8)}])
    mean, std = (torch.tensor(value).reshape(3, 1, 1) for value in (recipe.model.mean, recipe.model.std))
    targets = Targets(boxes, labels, torch.tensor([5]), sides.packed(pixels, boxes))
    own = ours.losses((images - mean) / std, torch.tensor([[HEIGHT, WIDTH]]), targets)
    their_names = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask")
    their_names = their_names[: len(ours.loss_names)]
    assert [own[name].sum().item() for name in ours.loss_names] == pytest.approx(
        [found[name].item() for name in their_names], rel=1e-4
    )


def test_torchvisions_retinanet_has_every_number_of_the_recipe(script: Script) -> None:
    sides = script("sides")
    recipe = sides.shared_recipe(2, kind="retinanet")
    numbers = {"score_threshold": 0.2, "nms_iou": 0.45, "detections": 7, "candidates": 11}
    recipe = with_model(recipe, head={**numbers, "positive_iou": 0.55, "negative_iou": 0.3})
    theirs = sides.torchvision_detector(recipe, HEIGHT, WIDTH)
    assert (theirs.score_thresh, theirs.nms_thresh) == (0.2, 0.45)
    assert (theirs.detections_per_img, theirs.topk_candidates) == (7, 11)
    assert (theirs.proposal_matcher.high_threshold, theirs.proposal_matcher.low_threshold) == (0.55, 0.3)
    assert (theirs.transform.min_size, theirs.transform.max_size) == ((HEIGHT,), WIDTH)


def test_both_retinanets_train_the_same_weights_and_have_the_same_losses_at_their_first_step(script: Script) -> None:
    sides = script("sides")
    recipe = sides.shared_recipe(1, kind="retinanet")
    theirs = sides.torchvision_detector(recipe, HEIGHT, WIDTH).train()
    bias = theirs.head.classification_head.cls_logits.bias
    with torch.no_grad():  # torchvision scores the background too, which no anchor shows
        bias.reshape(9, -1)[:, 0] = -100
    ours = make_detector(recipe, sides.NUM_CLASSES)
    trained = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (theirs, ours)]
    assert trained[0] - 9 * (256 * 9 + 1) == trained[1]
    sides.copy_weights(theirs, ours)
    place_model(ours, torch.device("cpu"), recipe.precision)
    ours.train()
    images = torch.rand(1, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))
    boxes = torch.tensor([[[10.0, 12.0, 60.0, 70.0], [40.0, 20.0, 120.0, 90.0]]])
    labels = torch.tensor([[3, 5]])
    found = theirs(list(images), [{"boxes": boxes[0], "labels": labels[0] + 1}])
    mean, std = (torch.tensor(value).reshape(3, 1, 1) for value in (recipe.model.mean, recipe.model.std))
    own = ours.losses((images - mean) / std, torch.tensor([[HEIGHT, WIDTH]]), Targets(boxes, labels, torch.tensor([5])))
    assert own["class_focal"].item() == pytest.approx(found["classification"].item(), rel=1e-4)
    assert own["anchor_box"].item() == pytest.approx(found["bbox_regression"].item(), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "deterministic", "benchmark"),
    [
        ("torchvision fp32", False, False),
        ("torchvision channels_last bf16", False, True),
        ("megdet bf16", True, False),
        ("megdet compiled fp32", True, False),
    ],
)
@pytest.mark.usefixtures("cudnn_flags")
def test_each_side_steps_with_its_own_flags_of_cudnn(
    script: Script, monkeypatch: pytest.MonkeyPatch, name: str, deterministic: bool, benchmark: bool
) -> None:
    sides = script("sides")
    seen = []

    def step(*_: object) -> Callable[[], object]:
        return lambda: seen.append((torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark))

    monkeypatch.setattr(sides, "real_step", step)
    monkeypatch.setattr(sides, "_torchvision_step", step)
    images, boxes = torch.rand(1, 3, HEIGHT, WIDTH), torch.tensor([[[10.0, 12.0, 60.0, 70.0]]])
    sides.training_step(name, sides.shared_recipe(1), images, boxes, torch.zeros(1, 1, dtype=torch.int64))()
    assert seen == [(deterministic, benchmark)]


@pytest.mark.parametrize(("name", "is_kept"), [("torchvision channels_last", False), ("megdet fp32", True)])
def test_only_our_side_keeps_freed_memory(
    script: Script, monkeypatch: pytest.MonkeyPatch, name: str, is_kept: bool
) -> None:
    sides = script("sides")
    kept: list[bool] = []
    monkeypatch.setattr(sides.runtime, "keep_freed_memory", lambda: kept.append(True))
    sides.start_side(name)
    assert bool(kept) == (is_kept and not torch.cuda.is_available())


def test_only_our_side_gives_cores_away_sooner_than_torch_does(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = script("sides")
    monkeypatch.setenv("GOMP_SPINCOUNT", str(sides.SPIN_COUNT))  # as `import megdet` leaves it
    assert sides.environment_of("megdet bf16")["GOMP_SPINCOUNT"] == str(sides.SPIN_COUNT)
    assert "GOMP_SPINCOUNT" not in sides.environment_of("torchvision fp32")
    monkeypatch.setenv("GOMP_SPINCOUNT", "77")  # the user's own choice is for both
    assert sides.environment_of("torchvision fp32")["GOMP_SPINCOUNT"] == "77"
