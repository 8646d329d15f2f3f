import math

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st

from factories import random_boxes, relative
from megdet.ops.boxes import (
    LARGEST_LOG_SCALE,
    box_area,
    box_iou,
    clip_boxes,
    decode_boxes,
    encode_boxes,
    mirrored_boxes,
)

BOX = st.tuples(*[st.floats(-500, 500)] * 2, *[st.floats(0.5, 500)] * 2).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)
WEIGHTS = st.tuples(*[st.floats(0.5, 20)] * 4)


def test_areas_are_width_times_height():
    assert box_area(torch.tensor([[1.0, 2.0, 4.0, 6.0], [0.0, 0.0, 0.0, 5.0]])).tolist() == [12.0, 0.0]


def test_overlaps_are_those_of_hand_arithmetic():
    a = torch.tensor([[0.0, 0.0, 4.0, 4.0]])
    b = torch.tensor([[2.0, 2.0, 6.0, 6.0], [0.0, 0.0, 4.0, 4.0], [4.0, 0.0, 8.0, 4.0], [1.0, 1.0, 2.0, 3.0]])
    torch.testing.assert_close(box_iou(a, b), torch.tensor([[4 / 28, 1.0, 0.0, 2 / 16]]))


def test_overlaps_equal_torchvisions_for_every_image_of_a_batch():
    torch.manual_seed(0)
    a, b = random_boxes(30), random_boxes(40).reshape(2, 20, 4)
    iou = box_iou(a.unsqueeze(0), b)
    for image in range(2):
        torch.testing.assert_close(iou[image], torchvision.ops.box_iou(a, b[image]))


def test_empty_boxes_overlap_nothing_and_give_no_nan():
    empty = torch.tensor([[3.0, 3.0, 3.0, 9.0]])
    assert box_iou(empty, torch.cat([empty, torch.tensor([[0.0, 0.0, 9.0, 9.0]])])).tolist() == [[0.0, 0.0]]


def test_the_arguments_of_an_overlap_are_left_as_they_are():
    boxes = random_boxes(5)
    before = boxes.clone()
    box_iou(boxes, boxes)
    assert torch.equal(boxes, before)


def test_encoded_deltas_are_those_of_hand_arithmetic():
    reference, box = torch.tensor([[0.0, 0.0, 10.0, 20.0]]), torch.tensor([[5.0, 0.0, 25.0, 10.0]])
    deltas = encode_boxes(box, reference, (10.0, 10.0, 5.0, 5.0))
    expected = torch.tensor([[10 * 1.0, 10 * -0.25, 5 * math.log(2), 5 * math.log(0.5)]])
    torch.testing.assert_close(deltas, expected)


@given(BOX, BOX, WEIGHTS)
def test_decoding_undoes_encoding(box, reference, weights):
    boxes, references = torch.tensor([box]).double(), torch.tensor([reference]).double()
    edges = ((boxes[:, 2:] - boxes[:, :2]) / (references[:, 2:] - references[:, :2])).log()
    decoded = decode_boxes(encode_boxes(boxes, references, weights), references, weights)
    if float(edges.max()) < LARGEST_LOG_SCALE:
        torch.testing.assert_close(decoded, boxes, rtol=1e-9, atol=1e-9)


def test_encoding_and_decoding_equal_torchvisions():
    torch.manual_seed(0)
    weights = (10.0, 10.0, 5.0, 5.0)
    coder = torchvision.models.detection._utils.BoxCoder(weights)
    references, boxes = random_boxes(50), random_boxes(50)
    torch.testing.assert_close(encode_boxes(boxes, references, weights), coder.encode([boxes], [references])[0])
    deltas = torch.randn(50, 4) * 20  # some beyond the largest scale
    wanted = coder.decode(deltas, [references])[:, 0]
    assert relative(wanted, decode_boxes(deltas, references, weights)) < 1e-6


def test_a_regressed_edge_grows_at_most_by_the_largest_scale():
    box = decode_boxes(torch.tensor([[0.0, 0.0, 100.0, 100.0]]), torch.tensor([[0.0, 0.0, 16.0, 16.0]]), (1.0,) * 4)
    torch.testing.assert_close(box[0, 2] - box[0, 0], torch.tensor(1000.0))


def test_deltas_of_many_classes_share_their_reference():
    references, deltas = random_boxes(6).reshape(2, 3, 1, 4), torch.randn(2, 3, 5, 4)
    all_classes = decode_boxes(deltas, references, (10.0, 10.0, 5.0, 5.0))
    for label in range(5):
        own = decode_boxes(deltas[:, :, label], references[:, :, 0], (10.0, 10.0, 5.0, 5.0))
        assert torch.equal(all_classes[:, :, label], own)


@pytest.mark.parametrize("size", [0.0, 1e-9])
def test_references_and_boxes_of_zero_size_give_finite_deltas(size):
    point, box = torch.tensor([[5.0, 5.0, 5.0 + size, 5.0]]), torch.tensor([[0.0, 0.0, 1000.0, 1000.0]])
    assert encode_boxes(box, point, (10.0, 10.0, 5.0, 5.0)).isfinite().all()
    assert encode_boxes(point, box, (10.0, 10.0, 5.0, 5.0)).isfinite().all()


def test_boxes_are_cut_at_the_borders_of_their_own_image():
    boxes = torch.tensor([[-5.0, 3.0, 70.0, 90.0]]).repeat(2, 1).reshape(2, 1, 4)
    sizes = torch.tensor([[40, 60], [100, 50]])  # height, width
    assert clip_boxes(boxes, sizes).tolist() == [[[0.0, 3.0, 60.0, 40.0]], [[0.0, 3.0, 50.0, 90.0]]]
    four = boxes.reshape(2, 1, 1, 4).expand(2, 3, 2, 4)
    assert torch.equal(clip_boxes(four, sizes)[:, 1, 1], clip_boxes(boxes, sizes)[:, 0])


def test_a_mirrored_box_by_hand_and_twice_mirrored():
    boxes = torch.tensor([[1.0, 2.0, 4.0, 8.0], [0.0, 0.0, 10.0, 5.0]])
    assert mirrored_boxes(boxes, 10).tolist() == [[6, 2, 9, 8], [0, 0, 10, 5]]
    assert torch.equal(mirrored_boxes(mirrored_boxes(boxes, 10), 10), boxes)
    several = mirrored_boxes(boxes.expand(2, -1, -1), torch.tensor([[10], [20]]))
    assert several[1].tolist() == [[16, 2, 19, 8], [10, 0, 20, 5]]
