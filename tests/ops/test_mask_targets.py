import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models.detection.roi_heads import project_masks_on_boxes

from factories import make_masks, random_boxes
from megdet.ops import mask_targets as module
from megdet.ops.mask_targets import mask_targets
from megdet.structures import Masks

SIZES = torch.tensor([[96, 64], [70, 200]])


def full_masks(objects: int = 5, seed: int = 0) -> list[torch.Tensor]:
    """Noise within rectangles; the first fills its image, the last is empty."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for height, width in SIZES.tolist():
        mask = torch.rand(objects, height, width, generator=generator) < 0.6
        for own in mask[1:]:
            x, y = (int(torch.randint(edge - 8, (), generator=generator)) for edge in (width, height))
            w, h = (int(torch.randint(4, 60, (), generator=generator)) for _ in range(2))
            own[:y], own[y + h :], own[:, :x], own[:, x + w :] = False, False, False, False
        mask[0], mask[-1] = True, False
        found.append(mask)
    return found


def awkward_rois(count: int = 40, seed: int = 1) -> torch.Tensor:
    """(images, count, 4): inside, across every border, outside, and of no size."""
    generator = torch.Generator().manual_seed(seed)
    special = [
        [-20.3, -30.2, 250.0, 150.0],
        [60.0, 60.0, 90.0, 130.0],
        [10.0, 10.0, 10.0, 10.0],
        [0.0, 0.0, 64.0, 70.0],
        [-0.5, -0.5, 0.2, 0.2],
        [63.5, 69.5, 64.5, 70.9],
        [300.0, 300.0, 340.0, 350.0],
        [12.0, 20.0, 40.0, 48.0],
    ]
    images = []
    for height, width in SIZES.tolist():
        boxes = random_boxes(count - len(special), canvas=1.0, generator=generator)
        low = boxes[:, :2] * torch.tensor([width, height])
        size = torch.rand(len(low), 2, generator=generator) * torch.tensor([width, height])
        images.append(torch.cat([torch.cat([low, low + size], 1), torch.tensor(special)]))
    return torch.stack(images)


def torchvisions(masks: list[torch.Tensor], index: torch.Tensor, rois: torch.Tensor, bins: int) -> torch.Tensor:
    own = [project_masks_on_boxes(m, r, i, bins) for m, r, i in zip(masks, rois, index, strict=True)]
    return torch.stack(own)


@pytest.mark.parametrize("bins", [28, 7, 1])
def test_targets_are_torchvisions_to_the_last_digit(bins):
    masks, rois = full_masks(), awkward_rois().double()
    index = torch.arange(40).expand(2, -1) % 5
    found = mask_targets(make_masks(*masks), index, rois, SIZES, (96, 200), bins)
    expected = torchvisions(masks, index, rois, bins)
    assert ((expected > 0) & (expected < 1)).double().mean() > 0.02
    assert (found - expected).abs().max() < 1e-10


def test_targets_in_float32_are_torchvisions():
    masks, rois = full_masks(), awkward_rois()
    index = torch.arange(40).expand(2, -1) % 5
    found = mask_targets(make_masks(*masks), index, rois, SIZES, (96, 200), 28)
    assert found.dtype == torch.float32
    assert (found - torchvisions(masks, index, rois, 28)).abs().max() < 1e-5


@settings(max_examples=20)
@given(st.integers(0, 2**32), st.sampled_from([2, 14, 28]), st.integers(1, 3000))
def test_whatever_is_unpacked_together_changes_no_target(seed, bins, at_once):
    masks, rois = full_masks(3, seed), awkward_rois(12, seed).double()
    index = torch.arange(12).expand(2, -1) % 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIXELS_AT_ONCE", at_once)
        found = mask_targets(make_masks(*masks), index, rois, SIZES, (96, 200), bins)
    assert (found - torchvisions(masks, index, rois, bins)).abs().max() < 1e-10


def test_a_half_covered_box_is_read_by_hand():
    mask = torch.zeros(1, 8, 8)
    mask[0, :, :3] = 1
    rois = torch.tensor([[[0.0, 0.0, 4.0, 4.0]]])
    found = mask_targets(
        make_masks(mask), torch.zeros(1, 1, dtype=torch.int64), rois, torch.tensor([[8, 8]]), (8, 8), 2
    )
    # two samples a cell and axis: x = 0.5 and 1.5, then 2.5 and 3.5; only 2.5 lies between a pixel of 1 and one of 0
    assert found.tolist() == [[[[1.0, 0.25], [1.0, 0.25]]]]


def test_objects_without_masks_and_rois_of_nothing_have_targets_of_zero():
    masks = Masks(torch.zeros(2, 0, dtype=torch.uint8), torch.zeros(2, 3, 5, dtype=torch.int64))
    index = torch.zeros(2, 4, dtype=torch.int64)
    found = mask_targets(masks, index, torch.rand(2, 4, 4) * 30, SIZES, (96, 200), 7)
    assert found.eq(0).all()
    nothing = Masks(masks.bits, masks.frames[:, :0])
    assert mask_targets(nothing, index, torch.rand(2, 4, 4), SIZES, (96, 200), 7).eq(0).all()
    assert mask_targets(masks[0:0], index[:0], torch.rand(0, 4, 4), SIZES[:0], (96, 200), 7).shape == (0, 4, 7, 7)
    rois = torch.full((2, 4, 4), float("nan"))
    assert mask_targets(make_masks(*full_masks()), index, rois, SIZES, (96, 200), 7).shape == (2, 4, 7, 7)
