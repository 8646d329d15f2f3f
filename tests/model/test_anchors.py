import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import _default_anchorgen

from megdet.architecture import Anchors, OctaveAnchors
from megdet.model.anchors import AnchorGrid

CPU = torch.device("cpu")
STRIDES = (8, 16, 32, 64, 128)
"""Of P3 to P7."""


def test_the_anchors_of_a_cell_are_those_of_hand_arithmetic():
    grid = AnchorGrid(Anchors(sizes=(32.0,), ratios=(0.25, 1.0, 4.0)))
    (anchors,) = grid((8, 12), [(2, 3)], torch.float32, CPU)
    # height over width: a quarter is twice as wide and half as high as the square
    assert anchors[:3].tolist() == [[-32, -8, 32, 8], [-16, -16, 16, 16], [-8, -32, 8, 32]]
    assert anchors.shape == (2 * 3 * grid.per_cell, 4)
    assert anchors[4].tolist() == [4 - 16, -16, 4 + 16, 16]  # the next column
    assert anchors[10].tolist() == [-16, 4 - 16, 16, 4 + 16]  # the next row


@pytest.mark.parametrize("canvas", [(416, 544), (64, 96), (800, 1344)])
def test_anchors_equal_torchvisions(canvas):
    recipe = Anchors(stride_from_grid=True)
    grids = [(canvas[0] // s, canvas[1] // s) for s in (4, 8, 16, 32)]
    grids.append(tuple((edge + 1) // 2 for edge in grids[-1]))  # odd for some
    reference = AnchorGenerator(tuple((int(size),) for size in recipe.sizes), ((0.5, 1.0, 2.0),) * 5)
    maps = [torch.zeros(1, 1, *grid) for grid in grids]
    (theirs,) = reference(ImageList(torch.zeros(1, 3, *canvas), [canvas]), maps)
    assert torch.equal(torch.cat(AnchorGrid(recipe)(canvas, grids, torch.float32, CPU)), theirs)


def test_an_odd_grid_keeps_the_stride_of_its_level_unless_torchvisions_is_asked_for():
    grids = [(104, 136), (52, 68), (26, 34), (13, 17), (7, 9)]
    ours = AnchorGrid(Anchors())((416, 544), grids, torch.float32, CPU)[4]
    theirs = AnchorGrid(Anchors(stride_from_grid=True))((416, 544), grids, torch.float32, CPU)[4]
    assert (ours[3] - ours[0]).tolist() == [64, 0, 64, 0]
    assert (theirs[3] - theirs[0]).tolist() == [544 // 9, 0, 544 // 9, 0]


def test_anchors_are_made_once_for_each_canvas_and_precision():
    grid = AnchorGrid(Anchors())
    grids = [(16, 16), (8, 8), (4, 4), (2, 2), (1, 1)]
    first = grid((64, 64), grids, torch.float32, CPU)
    assert grid((64, 64), grids, torch.float32, CPU) is first
    assert grid((64, 64), grids, torch.float64, CPU)[0].dtype == torch.float64
    assert len(grid((64, 32), [(h, -(-w // 2)) for h, w in grids], torch.float32, CPU)[0]) == 16 * 8 * 3


def test_anchors_need_not_be_whole_pixels():
    (rounded,), (exact,) = (
        AnchorGrid(Anchors(sizes=(32.0,), ratios=(2.0,), whole_pixels=whole))((4, 4), [(1, 1)], torch.float32, CPU)
        for whole in (True, False)
    )
    assert rounded.tolist() == [[-11, -23, 11, 23]]
    half = torch.tensor([32 / 2**0.5 / 2, 32 * 2**0.5 / 2])
    torch.testing.assert_close(exact, torch.cat([-half, half])[None])


@pytest.mark.parametrize("canvas", [(416, 544), (160, 224), (800, 1344)])
def test_anchors_of_three_sizes_a_level_equal_those_of_torchvisions_retinanet(canvas):
    recipe = OctaveAnchors(whole_sizes=True, stride_from_grid=True)
    grids = [(canvas[0] // s, canvas[1] // s) for s in (8, 16, 32)]
    for _ in range(2):
        grids.append(tuple((edge + 1) // 2 for edge in grids[-1]))
    maps = [torch.zeros(1, 1, *grid) for grid in grids]
    (theirs,) = _default_anchorgen()(ImageList(torch.zeros(1, 3, *canvas), [canvas]), maps)
    grid = AnchorGrid(recipe, STRIDES)
    assert grid.per_cell == 9
    assert torch.equal(torch.cat(grid(canvas, grids, torch.float32, CPU)), theirs)


def test_sizes_of_an_octave_are_exact_unless_torchvisions_are_asked_for():
    exact, whole = (OctaveAnchors(whole_sizes=whole_sizes).level_sizes for whole_sizes in (False, True))
    assert exact[0] == pytest.approx((32, 32 * 2 ** (1 / 3), 32 * 2 ** (2 / 3)))
    assert whole[0] == (32, 40, 50)
    assert whole[4] == (512, 645, 812)
    assert OctaveAnchors(scales_per_octave=1).level_sizes == Anchors().level_sizes


def test_the_levels_of_a_detector_of_one_stage_have_their_own_strides():
    grids = [(13, 17), (7, 9), (4, 5), (2, 3), (1, 2)]
    anchors = AnchorGrid(OctaveAnchors(), STRIDES)((104, 136), grids, torch.float32, CPU)
    assert [(level[9] - level[0]).tolist() for level in anchors] == [[stride, 0, stride, 0] for stride in STRIDES]
