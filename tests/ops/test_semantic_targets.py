from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from factories import ellipses, make_masks, make_targets, random_boxes
from megdet.ops import semantic_targets as module
from megdet.ops.semantic_targets import semantic_targets
from megdet.structures import Targets


def by_hand(targets: Targets, full: list[torch.Tensor], sizes: torch.Tensor, grid, stride, classes) -> torch.Tensor:
    """Cell by cell and object by object, over full-size masks; `full` has a row of zeros where there is no mask."""
    found = torch.full((len(sizes), *grid), classes)
    for image, (height, width) in enumerate(sizes.tolist()):
        boxes, labels = targets.boxes[image], targets.labels[image]
        for i in range(grid[0]):
            for j in range(grid[1]):
                y, x = i * stride + stride // 2, j * stride + stride // 2
                if y >= height or x >= width:
                    found[image, i, j] = -1
                    continue
                best = torch.inf
                for row, label in enumerate(labels.tolist()):
                    x1, y1, x2, y2 = boxes[row].tolist()
                    has_mask = row < len(full[image]) and bool(full[image][row].any())
                    here = bool(full[image][row][y, x]) if has_mask else x1 <= x < x2 and y1 <= y < y2
                    area = float((boxes[row, 2] - boxes[row, 0]) * (boxes[row, 3] - boxes[row, 1]))
                    if label >= 0 and here and area < best:
                        best, found[image, i, j] = area, label
    return found


def test_a_cell_has_the_class_of_the_smallest_box_over_its_middle_by_hand():
    targets = make_targets([([0.0, 0.0, 32.0, 32.0], 0), ([8.0, 8.0, 20.0, 32.0], 1), ([12.0, 0.0, 13.0, 5.0], 2)])
    found = semantic_targets(targets, torch.tensor([[32, 30]]), (4, 5), 8, 3)
    # middles at 4, 12, 20, 28 (the last beyond 20, the edge of the second box, and 36 beyond the image)
    assert found.tolist() == [[[0, 2, 0, 0, -1], [0, 1, 0, 0, -1], [0, 1, 0, 0, -1], [0, 1, 0, 0, -1]]]


def test_of_two_boxes_of_one_size_the_first_is_seen():
    box = [0.0, 0.0, 16.0, 16.0]
    for labels in ((2, 1), (1, 2)):
        found = semantic_targets(make_targets([(box, own) for own in labels]), torch.tensor([[16, 16]]), (2, 2), 8, 3)
        assert found.eq(labels[0]).all()


def test_a_mask_counts_where_there_is_one_and_the_box_where_there_is_none():
    targets = make_targets([([0.0, 0.0, 32.0, 16.0], 0), ([0.0, 16.0, 32.0, 32.0], 1)])
    mask = torch.zeros(2, 32, 32)
    mask[0, 4, 4] = mask[0, 4:13, 20] = 1  # the second object has no pixel
    targets = replace(targets, masks=make_masks(mask))
    found = semantic_targets(targets, torch.tensor([[32, 32]]), (4, 4), 8, 2)
    assert found.tolist() == [[[0, 2, 0, 2], [2, 2, 0, 2], [1] * 4, [1] * 4]]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([2, 4, 8]), st.booleans(), st.booleans())
def test_targets_are_those_of_a_loop_over_cells_and_full_size_masks(seed, stride, masked, in_parts):
    generator = torch.Generator().manual_seed(seed)
    counts, canvas = torch.randint(0, 6, (3,), generator=generator).tolist(), (40, 56)
    images, full = [], []
    for count in counts:
        boxes = random_boxes(count, 50.0, generator=generator).round()
        boxes = boxes[torch.randint(0, max(1, count), (count,), generator=generator)]  # some twice
        images.append([(box, i % 3) for i, box in enumerate(boxes.tolist())])
        own = ellipses(boxes, canvas)
        own[torch.rand(count, generator=generator) < 0.4] = 0
        full.append(own if masked else torch.zeros(count, *canvas))
    targets = make_targets(*images, width=7)
    if masked:
        targets = replace(targets, masks=make_masks(*full, width=7))
    sizes = torch.tensor([[40, 56], [33, 50], [40, 41]])
    grid = (-(-canvas[0] // stride), -(-canvas[1] // stride))
    with pytest.MonkeyPatch.context() as patch:
        if in_parts:
            patch.setattr(module, "_PLACES_AT_ONCE", 2 * 3 * grid[0] * grid[1])
        found = semantic_targets(targets, sizes, grid, stride, 3)
    assert torch.equal(found, by_hand(targets, full, sizes, grid, stride, 3))


@pytest.mark.parametrize("width", [0, 3])
def test_without_objects_all_is_background_and_without_images_there_is_nothing(width):
    targets = make_targets([], [], width=width)
    assert semantic_targets(targets, torch.tensor([[16, 16]] * 2), (2, 2), 8, 5).eq(5).all()
    targets = replace(targets, masks=make_masks(torch.zeros(0, 4, 4), torch.zeros(0, 4, 4), width=width))
    assert semantic_targets(targets, torch.tensor([[16, 16]] * 2), (2, 2), 8, 5).eq(5).all()
    assert semantic_targets(targets[0:0], torch.zeros(0, 2, dtype=torch.int64), (2, 2), 8, 5).shape == (0, 2, 2)
