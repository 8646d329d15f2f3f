"""What is around an exported graph: pictures in, detections out."""

import numpy as np
import pytest
import torch
from PIL import Image

from exported_file import IDS, NAMES, description, small_recipe, write_fixed_file
from megdet.data import transforms
from megdet.data.rle import decode_mask, encode_mask
from megdet.errors import InputError
from megdet.exported import resizing
from megdet.exported.detector import ExportedDetector
from megdet.exported.masks import pasted
from megdet.ops.masks import paste_masks

BOXES = np.array([[8, 4, 40, 36], [0, 0, 16, 16], [0, 0, 0, 0]], np.float32)
SCORES, LABELS = np.array([0.9, 0.4, 0], np.float32), np.array([2, 0, -1])


def picture(height, width, seed=0):
    """Smooth noise, as photographs are, not white noise."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def test_boxes_are_in_pixels_of_the_file_and_rows_for_nothing_are_left_out(tmp_path):
    detector = ExportedDetector(write_fixed_file(tmp_path / "a.onnx", BOXES, SCORES, LABELS, recipe=small_recipe()))
    first, second = detector.detect([picture(128, 160), picture(32, 32)])  # halved, and doubled
    np.testing.assert_allclose(first.boxes, 2 * BOXES[:2])
    np.testing.assert_allclose(second.boxes, BOXES[:2] / 2)
    assert first.names == ["gear", "bolt"]
    assert first.size == (128, 160)
    assert (first.class_names, first.category_ids) == (NAMES, IDS)
    assert [row["category_id"] for row in first.to_coco(1)] == [8, 3]


def test_images_share_batches_of_their_canvas_and_come_back_in_their_order(tmp_path):
    detector = ExportedDetector(write_fixed_file(tmp_path / "a.onnx", BOXES, SCORES, LABELS, recipe=small_recipe()))
    seen = []
    program = detector.program

    def watched(pixels, sizes):
        seen.append((pixels.shape, sizes.tolist()))
        return program(pixels, sizes)

    detector.program = watched
    shapes = [(64, 64), (96, 64), (64, 64), (64, 60), (64, 64)]
    found = detector.detect([picture(*shape) for shape in shapes])
    assert [own.size for own in found] == shapes
    assert sorted(shape for shape, _ in seen) == [(1, 3, 64, 96), (1, 3, 96, 64), (2, 3, 64, 64), (2, 3, 64, 64)] or (
        sum(shape[0] for shape, _ in seen) == 5 and max(shape[0] for shape, _ in seen) <= 2
    )
    assert all(height <= shape[2] and width <= shape[3] for shape, sizes in seen for height, width in sizes)


@pytest.mark.parametrize(("size", "new"), [((90, 120), (64, 85)), ((40, 30), (96, 72)), ((64, 64), (64, 64))])
def test_pillow_resizes_as_training_does_to_one_level(size, new):
    pixels = picture(*size)
    wanted = transforms.resize(pixels, new).permute(1, 2, 0).numpy()
    assert np.abs(resizing.resize(pixels, new).astype(int) - wanted).max() <= 1


@pytest.mark.parametrize(("size", "new"), [((90, 120), (64, 85)), ((40, 30), (96, 72)), ((64, 64), (64, 64))])
def test_resizing_without_antialias_is_torchvisions(size, new):
    pixels = picture(*size)
    wanted = transforms.resize_as_torchvision(pixels, new).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(resizing.resize_as_torchvision(pixels, new), wanted, atol=1e-3)


NO_BOXES = [[9, 9, 9, 20], [30, 30, 20, 40], [np.nan, 1, 5, 5], [0, 0, np.inf, 9], [20.6, 20.6, 21.4, 21.4]]


@pytest.mark.parametrize("cells", [1, 5, 28])
@pytest.mark.parametrize("exact", [True, False])
def test_masks_are_pasted_as_with_torch(exact, cells):
    random = np.random.default_rng(cells)
    size, count = (50, 70), 200
    low = random.uniform(-10, 70, (count, 2))
    boxes = np.concatenate([low, low + np.exp(random.uniform(-1, 4, (count, 2)))], 1)
    boxes = np.concatenate([np.clip(boxes, 0, [70, 50, 70, 50]), NO_BOXES])
    coarse = random.random((len(boxes), cells, cells)).astype(np.float32)
    wanted = [encode_mask(np.zeros((0, 0), np.bool_), 0, 0, size)] * len(boxes)
    for mask in paste_masks(torch.from_numpy(coarse), torch.from_numpy(boxes), size, exact=exact):
        wanted[mask.index] = encode_mask(mask.pixels.numpy(), mask.x, mask.y, size)
    for grid, box, own in zip(coarse, boxes, wanted, strict=True):
        found = decode_mask(pasted(grid, box, size, exact=exact))
        assert (found != decode_mask(own)).sum() <= 1  # a pixel may lie on the threshold
    assert sum(decode_mask(own).any() for own in wanted) > 30


def test_masks_come_with_the_detections(tmp_path):
    grids = np.zeros((3, 4, 4), np.float32)
    grids[0], grids[1, :, :2] = 1, 1
    path = write_fixed_file(tmp_path / "a.onnx", BOXES, SCORES, LABELS, grids, small_recipe())
    detector = ExportedDetector(path)
    assert detector.has_masks
    (found,) = detector.detect([picture(64, 64)])
    assert np.array_equal(np.argwhere(found.mask(0)).min(0), [4, 8])
    assert 0.95 * 32 * 32 < found.mask(0).sum() <= 32 * 32  # a corner's pixel is half outside in both directions
    assert found.mask(1)[:, 8:].sum() == 0


@pytest.mark.parametrize(
    ("metadata", "why"),
    [
        ("{}", "format"),
        ("no JSON", "JSON"),
        (description(small_recipe(), format=9).text(), "format is 9"),
        (description(small_recipe(), category_ids=(1,)).text(), "category_ids"),
        (description(small_recipe(), weights="x").text(), "weights"),
        (description(small_recipe(), recipe="batch_sice: 3").text(), "batch_sice"),
    ],
)
def test_a_file_that_describes_itself_wrongly_is_refused_in_one_line(tmp_path, metadata, why):
    path = write_fixed_file(tmp_path / "a.onnx", BOXES, SCORES, LABELS, metadata=metadata)
    with pytest.raises(InputError, match=why) as caught:
        ExportedDetector(path)
    assert "a.onnx" in str(caught.value)


def test_what_is_no_graph_is_refused(tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"nothing")
    with pytest.raises(InputError, match="no graph that onnxruntime runs"):
        ExportedDetector(tmp_path / "a.onnx")
    with pytest.raises(InputError, match="no such file"):
        ExportedDetector(tmp_path / "b.onnx")
    (tmp_path / "a.pt2").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"no program of torch\.export"):
        ExportedDetector(tmp_path / "a.pt2")
