import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torchvision.models.detection.roi_heads import paste_masks_in_image

from megdet.ops import masks
from megdet.ops.masks import paste_masks, resampled_masks

HEIGHT, WIDTH = 60, 90
AWKWARD = [
    [-20.0, -30.0, 40.0, 25.0],  # across the upper left corner
    [70.3, 45.1, 130.0, 99.9],  # across the lower right one
    [-50.0, 10.0, 400.0, 20.5],  # across both sides
    [0.0, 0.0, 90.0, 60.0],  # the whole image
    [10.2, 10.2, 10.9, 40.0],  # less than a pixel wide, with centres in it
    [20.6, 20.6, 21.4, 21.4],  # less than a pixel, without a centre
    [33.4, 33.4, 33.6, 33.6],  # less than a pixel, with a centre
    [5.0, 5.0, 5.0, 5.0],  # nothing
    [12.0, 30.0, 4.0, 50.0],  # turned over
]
OUTSIDE = [[-40.0, 5.0, -10.0, 30.0], [5.0, 70.0, 30.0, 90.0], [200.0, 200.0, 300.0, 300.0]]


def grids(count: int, cells: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, cells, cells, generator=torch.Generator().manual_seed(seed))


def random_boxes(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([80.0, 50.0])
    size = (torch.rand(count, 2, generator=generator) * 4).exp()
    return torch.cat([corner, torch.minimum(corner + size, torch.tensor([90.0, 60.0]))], dim=1)


def pasted(probabilities: torch.Tensor, boxes: torch.Tensor, size=(HEIGHT, WIDTH), **options) -> torch.Tensor:
    """The masks at the size of the image."""
    whole = torch.zeros(len(boxes), *size, dtype=torch.bool)
    told = set()
    for mask in paste_masks(probabilities, boxes, size, **options):
        height, width = mask.pixels.shape
        assert height > 0
        assert width > 0
        assert 0 <= mask.x <= size[1] - width
        assert 0 <= mask.y <= size[0] - height
        assert mask.index not in told
        told.add(mask.index)
        whole[mask.index, mask.y : mask.y + height, mask.x : mask.x + width] = mask.pixels
    return whole


def sampled(probabilities: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """The grid at every pixel's centre by torch's `grid_sample`, as detectron2 has it; in float64."""
    x1, y1, x2, y2 = boxes.double()[:, :, None, None].unbind(1)
    x = (torch.arange(WIDTH).double() + 0.5 - x1) / (x2 - x1) * 2 - 1
    y = (torch.arange(HEIGHT).double()[:, None] + 0.5 - y1) / (y2 - y1) * 2 - 1
    places = torch.stack(torch.broadcast_tensors(x, y), dim=-1)
    return F.grid_sample(probabilities.double()[:, None], places, align_corners=False)[:, 0]


@pytest.mark.parametrize("cells", [1, 7, 28])
def test_a_pixel_has_the_value_of_the_grid_at_its_centre(cells):
    boxes = torch.cat([random_boxes(40), torch.tensor(AWKWARD[:5] + AWKWARD[6:7] + OUTSIDE)])
    probabilities = grids(len(boxes), cells)
    expected = sampled(probabilities, boxes)
    is_clear = (expected - 0.5).abs() > 1e-5
    assert is_clear.double().mean() > 0.999
    assert (expected >= 0.5).any(dim=2).any(dim=1).sum() > 8
    found = pasted(probabilities, boxes)
    assert torch.equal(found[is_clear], (expected >= 0.5)[is_clear])


def test_a_sure_grid_fills_its_box_but_for_its_corners_and_nothing_else():
    boxes, cells = torch.tensor([[40.0, 20.0, 60.0, 40.0], [10.5, 20.5, 12.5, 22.5], *AWKWARD, *OUTSIDE]), 4
    found = pasted(torch.ones(len(boxes), cells, cells), boxes)
    y, x = torch.arange(HEIGHT)[:, None] + 0.5, torch.arange(WIDTH) + 0.5
    for mask, (x1, y1, x2, y2) in zip(found, boxes.tolist(), strict=True):
        is_box = x2 > x1 and y2 > y1
        assert not mask[~((x >= x1) & (x <= x2) & (y >= y1) & (y <= y2) & is_box)].any()
        half_x, half_y = (x2 - x1) / cells / 2, (y2 - y1) / cells / 2
        in_columns, in_rows = (x >= x1 + half_x) & (x <= x2 - half_x), (y >= y1 + half_y) & (y <= y2 - half_y)
        assert mask[((x >= x1) & (x <= x2) & in_rows) | ((y >= y1) & (y <= y2) & in_columns)].all() or not is_box
    assert found[0].sum() == 20 * 20 - 4 * 3, "0.6 x 0.6 and 0.6 x 0.8 are less than a half"


def test_half_a_grid_is_half_a_box_by_hand():
    grid = torch.tensor([[[0.0, 1.0]] * 4])
    found = pasted(grid, torch.tensor([[10.0, 10.0, 18.0, 14.0]]))[0]
    # the centres of the columns are at 12 and 16, so the value is 0.5 at 14; those of the rows are those of the pixels
    assert found.nonzero().tolist() == [[y, x] for y in range(10, 14) for x in range(14, 18)]


def test_a_huge_box_takes_no_more_memory_than_its_image():
    boxes = torch.tensor([[-1e9, -1e9, 1e9, 1e9], [-1e30, 0.0, 1e30, 60.0]])
    assert pasted(torch.ones(2, 28, 28), boxes).all()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("exact", [True, False])
def test_a_box_that_is_not_finite_has_no_pixel(wrong, exact):
    boxes = torch.tensor([[0.0, 0.0, wrong, 10.0], [0.0, 0.0, 10.0, 10.0]])
    found = pasted(torch.ones(2, 4, 4), boxes, exact=exact)
    assert found[1].any()
    assert not found[0].any()


@given(seed=st.integers(0, 2**32 - 1), cells=st.sampled_from([5, 14, 28]))
@settings(max_examples=20, deadline=None)
def test_the_rounded_way_is_that_of_torchvision(seed, cells):
    boxes = torch.cat([random_boxes(20, seed), torch.tensor(AWKWARD[:8])])
    probabilities = grids(len(boxes), cells, seed)
    expected = paste_masks_in_image(probabilities[:, None], boxes, (HEIGHT, WIDTH))[:, 0] >= 0.5
    assert torch.equal(pasted(probabilities, boxes, exact=False), expected)


def test_a_box_outside_of_its_image_has_no_pixel():
    boxes = torch.tensor(OUTSIDE)
    for exact in (True, False):
        assert list(paste_masks(torch.ones(3, 4, 4), boxes, (HEIGHT, WIDTH), exact=exact)) == []


def test_no_masks_give_nothing():
    assert list(paste_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), (HEIGHT, WIDTH))) == []


def test_how_many_frames_are_sampled_together_changes_no_pixel(monkeypatch):
    boxes, probabilities = torch.cat([random_boxes(30), torch.tensor(AWKWARD)]), grids(30 + len(AWKWARD))
    whole = pasted(probabilities, boxes)
    for most, few in ((1, 1), (1 << 22, 1 << 22), (5000, 10)):
        monkeypatch.setattr(masks, "_MOST_PIXELS", most)
        monkeypatch.setattr(masks, "_FEW_PIXELS", few)
        assert torch.equal(pasted(probabilities, boxes), whole)


def test_groups_hold_each_frame_once_and_are_of_like_size():
    random = np.random.default_rng(0)
    sides = np.exp(random.uniform(0, 7, (300, 2))).astype(int)
    corners = [[0, 0, int(width), int(height)] for height, width in sides]
    groups = list(masks._alike(corners))
    assert sorted(index for group in groups for index in group) == list(range(300))
    assert len(groups) < 60
    for group in groups:
        padded = len(group) * sides[group, 0].max() * sides[group, 1].max()
        own = np.maximum(sides[group].prod(axis=1), masks._FEW_PIXELS).sum()
        assert len(group) == 1 or padded <= min(2 * own, masks._MOST_PIXELS)


def test_a_mask_over_another_box_has_the_values_of_its_places_by_hand():
    grid = torch.tensor([[[0.0, 1.0], [0.5, 0.25]]])
    same = resampled_masks(grid, torch.tensor([[2.0, 3, 6, 9]]), torch.tensor([[2.0, 3, 6, 9]]))
    torch.testing.assert_close(same, grid)
    # a box of the right half: its cells' centres are at 0.75 and 1.25 cells behind the first one's centre
    right = resampled_masks(grid, torch.tensor([[0.0, 0, 4, 4]]), torch.tensor([[2.0, 0, 4, 4]]))
    torch.testing.assert_close(right, torch.tensor([[[0.75, 0.75], [0.5 * 0.25 + 0.25 * 0.75, 0.25 * 0.75]]]))
    beyond = resampled_masks(grid, torch.tensor([[0.0, 0, 4, 4]]), torch.tensor([[8.0, 0, 12, 4]]))
    assert not beyond.any()


def test_a_mask_over_another_box_is_that_of_a_grid_sample():
    own, boxes, others = grids(20), random_boxes(20, 1), random_boxes(20, 2)
    centres = (torch.arange(7) + 0.5) / 7
    size = (boxes[:, 2:] - boxes[:, :2]).unsqueeze(1)
    places = others[:, None, :2] + centres[:, None] * (others[:, None, 2:] - others[:, None, :2])
    x, y = (2 * (places - boxes[:, None, :2]) / size - 1).unbind(2)
    where = torch.stack([x.unsqueeze(1).expand(-1, 7, -1), y.unsqueeze(2).expand(-1, -1, 7)], 3)
    expected = F.grid_sample(own.unsqueeze(1), where, padding_mode="zeros", align_corners=False).squeeze(1)
    torch.testing.assert_close(resampled_masks(own, boxes, others), expected, atol=1e-4, rtol=1e-4)
