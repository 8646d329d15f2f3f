import pytest
import torch
from torchvision.ops import roi_align as reference

from factories import random_boxes
from megdet.model.pooling import RoiPooling
from megdet.ops.roi_align import feature_table, roi_level_pairs, roi_levels

STRIDES = (4, 8, 16, 32, 64)


def pyramid(canvas: int = 256, images: int = 2) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(images, 3, canvas // stride, canvas // stride) for stride in STRIDES]


def test_two_levels_are_pooled_as_torchvision_pools_each():
    levels, rois = pyramid(), random_boxes(40, canvas=250).reshape(2, 20, 4)
    found = RoiPooling(5, 2, True, 60.0, STRIDES, two_levels=True)(feature_table(levels), rois)
    flat = rois.reshape(40, 4)
    image = torch.arange(2).repeat_interleave(20).unsqueeze(1)
    pairs = roi_level_pairs(flat, 4, 60.0)
    assert len(pairs[0].unique()) == 3
    for place in range(2):
        for row in range(40):
            level = int(pairs[place, row])
            box = torch.cat([image[row].float(), flat[row]]).unsqueeze(0)
            wanted = reference(levels[level], box, 5, 1 / STRIDES[level], 2, aligned=True)
            torch.testing.assert_close(found[place * 40 + row], wanted[0].flatten(1).T)


@pytest.mark.parametrize(
    ("edge", "pair"),
    [(5.0, [0, 1]), (150.0, [0, 1]), (165.0, [1, 2]), (224.0, [1, 2]), (310.0, [1, 2]), (320.0, [2, 3]), (9e3, [2, 3])],
)
def test_the_pair_of_levels_is_the_one_next_to_the_size(edge, pair):
    box = torch.tensor([[10.0, 10.0, 10.0 + edge, 10.0 + edge]])
    found = roi_level_pairs(box, 4, 224.0).flatten().tolist()
    assert found == pair
    assert int(roi_levels(box, 4, 224.0)) in found


def test_a_whole_image_is_pooled_as_one_roi():
    levels = pyramid(canvas=512)
    sizes = torch.tensor([[512, 448], [300, 500]])
    found = RoiPooling(7, 2, True, 224.0, STRIDES).of_images(feature_table(levels), sizes)
    for image, (height, width) in enumerate(sizes.tolist()):
        level = 2 + (height * width >= 448**2)
        box = torch.tensor([[image, 0.0, 0.0, width, height]])
        wanted = reference(levels[level], box, 7, 1 / STRIDES[level], 2, aligned=True)
        torch.testing.assert_close(found[image], wanted[0].flatten(1).T)


@pytest.mark.parametrize("sampling_ratio", [0, 1, 2, 3])
@pytest.mark.parametrize("canonical_size", [20.0, 56.0, 224.0])
def test_the_context_of_an_image_sees_no_value_of_the_canvas_around_it(canonical_size, sampling_ratio):
    sizes = torch.tensor([[256, 256], [97, 250], [40, 33], [128, 64], [5, 200], [1, 1]])
    pooling = RoiPooling(7, sampling_ratio, False, canonical_size, STRIDES)
    found = []
    for poison in (0.0, 1e5):
        levels = pyramid(images=len(sizes))
        for level, stride in zip(levels, STRIDES, strict=True):
            for image, (height, width) in enumerate(sizes.tolist()):
                level[image, :, -(-height // stride) :] = poison
                level[image, :, :, -(-width // stride) :] = poison
        found.append(pooling.of_images(feature_table(levels), sizes))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0.05)
    assert found[0].abs().amax((1, 2)).gt(0.1).all()
