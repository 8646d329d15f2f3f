from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megdet.distributed.layout import Layout, better_device_counts, choose_layout
from megdet.errors import InputError


@pytest.mark.parametrize(
    ("batch_size", "bn_size", "devices", "lanes", "width", "rounds", "share"),
    [
        (16, 16, 8, 1, 8, 1, 2),  # one lane of 8 with 2 images each
        (256, 32, 128, 8, 16, 1, 2),  # 8 lanes of 16
        (256, 32, 1, 1, 1, 8, 32),  # one lane of 1, 8 micro-batches of 32
        (16, 16, 16, 1, 16, 1, 1),
        (16, 2, 8, 8, 1, 1, 2),  # narrow lanes win among equals
        (8, 8, 3, 1, 3, 1, 3),  # uneven shares
        (8, 4, 3, 3, 1, 1, 4),  # uneven rounds: one lane idles, and a lane of 3 would carry 4 images too
    ],
)
def test_the_layouts_of_the_contract_are_chosen(batch_size, bn_size, devices, lanes, width, rounds, share):
    layout = choose_layout(batch_size // bn_size, bn_size, devices)
    assert (layout.num_lanes, layout.lane_width, layout.rounds, layout.largest_share) == (lanes, width, rounds, share)
    assert layout.batch_size == batch_size


@st.composite
def layouts(draw) -> Layout:
    groups, size = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    return choose_layout(groups, size, draw(st.integers(1, groups * size)))


@given(layouts())
def test_every_image_is_carried_exactly_once(layout):
    carried = Counter(
        (group, image)
        for rank in range(layout.world_size)
        for group in layout.groups_of(rank)
        for image in range(layout.group_size)[layout.share_of(rank)]
    )
    assert set(carried.values()) == {1}
    assert len(carried) == layout.batch_size


@given(layouts())
def test_the_numbers_of_the_busiest_rank_are_those_of_the_slices(layout):
    loads = [
        len(layout.groups_of(rank)) * len(range(layout.group_size)[layout.share_of(rank)])
        for rank in range(layout.world_size)
    ]
    shares = [len(range(layout.group_size)[layout.share_of(rank)]) for rank in range(layout.world_size)]
    assert max(loads) == layout.busiest_images
    assert max(shares) == layout.largest_share
    assert max(shares) - min(shares) <= 1
    assert max(len(layout.groups_of(rank)) for rank in range(layout.world_size)) == layout.rounds
    assert layout.idle == pytest.approx(1 - sum(loads) / (layout.world_size * max(loads)))


@given(layouts())
def test_no_other_width_is_less_busy_and_none_as_busy_is_narrower(layout):
    for width in (k for k in range(1, layout.world_size + 1) if layout.world_size % k == 0):
        other = choose_layout(layout.num_groups, layout.group_size, layout.world_size, lane_width=width)
        assert (layout.busiest_images, layout.lane_width) <= (other.busiest_images, other.lane_width)


@given(layouts())
def test_the_ranks_of_a_lane_are_neighbours_with_the_same_groups(layout):
    for rank in range(layout.world_size):
        first = rank - rank % layout.lane_width
        assert layout.lane_of(rank) == layout.lane_of(first) < layout.num_lanes
        assert layout.groups_of(rank) == layout.groups_of(first)


@given(layouts())
def test_the_shares_of_a_lane_are_neighbouring_images_in_the_order_of_its_ranks(layout):
    for first in range(0, layout.world_size, layout.lane_width):
        shares = [layout.share_of(rank) for rank in range(first, first + layout.lane_width)]
        assert [share.start for share in shares] == [0, *(share.stop for share in shares[:-1])]
        assert shares[-1].stop == layout.group_size
        assert all(share.start <= share.stop and share.step is None for share in shares)


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 160))
def test_the_busiest_rank_carries_as_little_as_any_divisor_allows(groups, size, devices):
    devices = min(devices, groups * size)
    widths = [k for k in range(1, devices + 1) if devices % k == 0]
    busiest = {k: -(-groups // (devices // k)) * -(-size // k) for k in widths}
    layout = choose_layout(groups, size, devices)
    assert layout.busiest_images == min(busiest.values())
    assert layout.lane_width == min(k for k in widths if busiest[k] == layout.busiest_images)


@given(layouts(), st.integers(1, 12))
def test_better_device_counts_keep_what_is_forced(layout, limit):
    for other in better_device_counts(layout, max_images_per_device=limit):
        assert other.idle < layout.idle
        assert other.largest_share <= limit


def test_more_devices_than_images_are_refused():
    with pytest.raises(InputError, match="5 devices for a mini-batch of 4 images: use at most 4"):
        choose_layout(2, 2, 5)


def test_a_forced_width_is_taken_even_if_it_is_slower():
    assert choose_layout(8, 2, 8).lane_width == 1
    assert choose_layout(8, 2, 8, lane_width=8).busiest_images == 8


def test_a_forced_width_that_does_not_divide_the_devices_is_refused_with_those_that_do():
    with pytest.raises(InputError, match="lane width 4 does not divide 6 devices: choose one of 1, 2, 3, 6"):
        choose_layout(3, 4, 6, lane_width=4)


def test_a_limit_of_images_a_device_widens_the_lanes():
    free = choose_layout(4, 8, 4)
    limited = choose_layout(4, 8, 4, max_images_per_device=3)
    assert (free.lane_width, limited.lane_width) == (1, 4)
    assert limited.largest_share == 2
    assert limited.rounds == 4


def test_a_share_that_fits_no_width_names_the_devices_it_takes():
    with pytest.raises(InputError, match=r"8 images over 2 devices gives 4 images a device, more than 3.* 3 devices"):
        choose_layout(4, 8, 2, max_images_per_device=3)


def test_a_limit_below_one_image_is_refused():
    with pytest.raises(InputError, match="at least 1"):
        choose_layout(4, 8, 2, max_images_per_device=0)


def test_better_device_counts_are_nearby_and_less_idle():
    seven = choose_layout(1, 16, 7)
    assert seven.idle > 0
    better = list(better_device_counts(seven))
    assert [layout.world_size for layout in better] == [6, 8, 5]  # busy: 16/18, 16/16, 16/20; of seven 16/21
    assert all(layout.idle < seven.idle for layout in better)


def test_a_layout_without_idle_part_has_no_better_one():
    assert list(better_device_counts(choose_layout(1, 16, 8))) == []
