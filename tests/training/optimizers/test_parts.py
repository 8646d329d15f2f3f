import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from factories import tiny_detector
from megdet.distributed.layout import choose_layout
from megdet.training.optimizers.parts import dot, dots, num_in_first_half, parts_of


@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 12))
def test_the_first_half_is_the_same_groups_on_any_layout(num_groups, group_size, ranks):
    layout = choose_layout(num_groups, group_size, min(ranks, num_groups * group_size))
    firsts, seconds = set(), set()
    for rank in range(layout.world_size):
        groups = layout.groups_of(rank)
        count = num_in_first_half(groups, num_groups)
        firsts |= {*groups[:count]}
        seconds |= {*groups[count:]}
    assert firsts == {*range(-(-num_groups // 2))}
    assert seconds == {*range(-(-num_groups // 2), num_groups)}


def test_the_modules_of_a_detector_share_its_trained_parameters():
    detector = tiny_detector()
    detector.backbone.body.conv1.requires_grad_(False)
    trained = [parameter for parameter in detector.parameters() if parameter.requires_grad][::-1]
    parts = parts_of(detector, trained)
    assert list(parts) == ["backbone", "fpn", "rpn", "box_head"]
    assert sorted(place for places in parts.values() for place in places) == list(range(len(trained)))
    assert {id(trained[place]) for place in parts["rpn"]} == {id(p) for p in detector.rpn.parameters()}


def test_the_scalar_product_by_hand_in_any_order_of_memory():
    images = torch.arange(24.0).reshape(1, 2, 3, 4)
    ours = [torch.tensor([1.0, 2.0]), images.to(memory_format=torch.channels_last)]
    theirs = [torch.tensor([3.0, -1.0]), images]
    assert dot(ours, theirs).item() == 1 + sum(i * i for i in range(24))
    assert dots({"a": [1], "b": [0]}, ours, theirs).tolist() == [sum(i * i for i in range(24)), 1]


def test_many_small_numbers_are_not_lost():
    # in float32 the sum of 2**24 and ones would stand still
    tensor = torch.ones(1 << 12)
    tensor[0] = 4096.0
    assert dot([tensor], [tensor]).item() == pytest.approx(4096.0**2 + (1 << 12) - 1, rel=1e-15)
