"""A tiny detector and batches for it: 64 px canvases, small enough for a forward in milliseconds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megdet.architecture import FasterRcnn as FasterRcnnRecipe
from megdet.architecture import Model
from megdet.architecture_heads import BoxHead, MaskHead
from megdet.architecture_parts import Anchors, Backbone, Fpn, Rpn
from megdet.data.masks import PlacedMask
from megdet.data.transforms import make_masks as pack_masks
from megdet.model.choice import make_detector
from megdet.model.faster_rcnn import FasterRcnn
from megdet.ops.products import HAS_ONEDNN
from megdet.recipe import Recipe
from megdet.structures import Batch, Masks, Targets
from megdet.training.step import StepResult

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"

TINY = Recipe(
    batch_size=4,
    bn_size=2,
    model=FasterRcnnRecipe(
        backbone=Backbone(name="resnet18"),
        fpn=Fpn(channels=16),
        anchors=Anchors(sizes=(8.0, 16.0, 32.0, 48.0, 64.0)),
        rpn=Rpn(
            samples=32,
            train_proposals_before_nms=40,
            train_proposals=30,
            test_proposals_before_nms=40,
            test_proposals=30,
        ),
        box_head=BoxHead(channels=32, samples=16, canonical_size=56.0, detections=10),
    ),
)
"""The recipe of the tests; batch norm over two images."""

TINY_FROZEN = replace(TINY, bn_size=0, group_size=2)
"""The same with frozen statistics, so that images do not touch each other."""


SMALL_MASKS = MaskHead(convolutions=2, channels=8, pool_size=5)
"""A mask head for it."""


def of_kind(recipe: Recipe, kind: type[Model], **sections: Any) -> Recipe:
    """A recipe of Faster R-CNN as one of another detector that has its sections and these."""
    own = {name: value for name, value in vars(recipe.model).items() if name != "kind"}
    return replace(recipe, model=kind(**own, **sections))


def with_model(recipe: Recipe, **sections: dict[str, Any]) -> Recipe:
    """The recipe with other values of some keys in sections of its model: `fpn={"norm": "group"}`."""
    changed = {name: replace(getattr(recipe.model, name), **keys) for name, keys in sections.items()}
    return replace(recipe, model=replace(recipe.model, **changed))


def tiny_detector(recipe: Recipe = TINY, num_classes: int = 3, seed: int = 0) -> FasterRcnn:
    """A detector of random weights, with running statistics and head biases that are not trivial."""
    torch.manual_seed(seed)
    detector = make_detector(recipe, num_classes)
    assert isinstance(detector, FasterRcnn)
    with torch.no_grad():
        for name, tensor in detector.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif name.endswith(("running_mean", "bias")):
                tensor.normal_(0, 0.1)
            elif name.endswith("bn2.weight") and name.startswith("backbone"):
                tensor.uniform_(0.2, 0.5)
        detector.rpn.objectness.weight.mul_(20)
        detector.rpn.deltas.weight.mul_(5)
        detector.box_head.classes.weight.mul_(10)
        detector.box_head.deltas.weight.mul_(10)
    return detector


def make_targets(*images: list[tuple[list[float], int]], width: int | None = None, first_seed: int = 100) -> Targets:
    """Targets of images, each a list of (box, label), padded to `width` rows or as many as are needed."""
    width = max((len(image) for image in images), default=0) if width is None else width
    boxes, labels = torch.zeros(len(images), width, 4), torch.full((len(images), width), -1)
    for i, image in enumerate(images):
        for j, (box, label) in enumerate(image):
            boxes[i, j], labels[i, j] = torch.tensor(box), label
    return Targets(boxes, labels, torch.arange(len(images)) * 7919 + first_seed)


def make_masks(*images: Tensor, width: int | None = None) -> Masks:
    """Masks of images, each a tensor (objects, height, width) of 0 and 1, packed within the frames of what is 1."""
    width = max((len(image) for image in images), default=0) if width is None else width
    return pack_masks([[_in_frame(mask) for mask in image.bool()] for image in images], width)


def _in_frame(mask: Tensor) -> PlacedMask:
    ys, xs = mask.any(1).nonzero().flatten().tolist() or [0], mask.any(0).nonzero().flatten().tolist() or [0]
    height, width = (ys[-1] + 1, xs[-1] + 1) if mask.any() else (0, 0)
    return PlacedMask(xs[0], ys[0], mask[ys[0] : height, xs[0] : width].numpy())


def tiny_batch(count: int = 2, canvas: int = 64, seed: int = 0) -> Batch:
    """`count` noisy images of several sizes on one canvas, one to three boxes each."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 3, canvas, canvas), dtype=torch.uint8, generator=generator)
    sizes = torch.tensor([[canvas - 4 * (i % 3), canvas - 6 * (i % 2)] for i in range(count)]).reshape(count, 2)
    images: list[list[tuple[list[float], int]]] = []
    for i in range(count):
        low = torch.rand(1 + i % 3, 2, generator=generator) * 30
        high = low + 8 + torch.rand(1 + i % 3, 2, generator=generator) * 18
        images.append([(box, j % 3) for j, box in enumerate(torch.cat([low, high], 1).tolist())])
    return Batch(pixels, sizes, make_targets(*images), tuple(range(count)), torch.ones(count, 2))


def ellipses(boxes: torch.Tensor, canvas: tuple[int, int]) -> torch.Tensor:
    """The mask of an ellipse in each box, (boxes, height, width)."""
    y, x = (torch.arange(edge) + 0.5 for edge in canvas)
    center, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    off_x = (x - center[:, :1]) / half[:, :1]
    off_y = (y - center[:, 1:]) / half[:, 1:]
    return (off_x.unsqueeze(1) ** 2 + off_y.unsqueeze(2) ** 2 <= 1).to(torch.uint8)


def masked_batch(count: int = 3) -> Batch:
    """Noise with an ellipse in every box."""
    batch = tiny_batch(count)
    boxes, is_box = batch.targets.boxes, batch.targets.is_box
    masks = [ellipses(own[known], (64, 64)) for own, known in zip(boxes, is_box, strict=True)]
    packed = make_masks(*masks, width=boxes.shape[1])
    return replace(batch, targets=replace(batch.targets, masks=packed))


def reported_by(result: StepResult) -> Tensor:
    """Losses and counts of a step, and the norm of its gradient."""
    return torch.stack([*result.means.values(), result.gradient_norm])


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    """Gradient of every parameter that has one, by name; the gradients are taken away from the module."""
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    return found


def random_boxes(count: int, canvas: float = 100.0, **options: Any) -> Tensor:
    """Boxes with edges of 2 px to half the canvas."""
    low = torch.rand(count, 2, **options) * canvas * 0.6
    return torch.cat([low, low + 2 + torch.rand(count, 2, **options) * canvas * 0.4], 1)


needs_onednn = pytest.mark.skipif(not HAS_ONEDNN, reason="this build of torch has no oneDNN")


def relative(a: Tensor, b: Tensor) -> float:
    """The difference of two tensors as the contract measures it: max|a - b| / max(max|a|, 1e-6)."""
    a, b = a.detach(), b.detach()
    assert a.shape == b.shape
    assert bool(a.isfinite().all())
    assert bool(b.isfinite().all())
    return float((a - b).abs().max() / a.abs().max().clamp(min=1e-6)) if a.numel() else 0.0
