"""The alpha-beta model against hand arithmetic and what must always hold of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megdet.planning.network import (
    Message,
    Protocol,
    all_gather_seconds,
    all_reduce_seconds,
    exposed_seconds,
    flat_fabric,
    gather_seconds,
    nccl_fabric,
    ring_seconds,
    tree_seconds,
)

FABRIC = nccl_fabric(8, "pcie", link_bandwidth=12e9, network_bandwidth=6e9)
RING, TREE = FABRIC.rings, FABRIC.trees
PLAIN = Protocol(call=0.0, inside=2e-6, between=10e-6, part=1.0)
DEVICES = st.integers(2, 1024)
BYTES = st.floats(1.0, 1e9)


@pytest.mark.parametrize("devices", [2, 3, 8])
def test_a_ring_in_a_machine_is_the_textbooks(devices: int) -> None:
    num_bytes, alpha = 3e6, 2e-6
    expected = 2 * (devices - 1) / devices * num_bytes / 12e9 + 2 * (devices - 1) * alpha
    assert ring_seconds(num_bytes, devices, FABRIC, PLAIN) == pytest.approx(expected)


def test_a_ring_over_machines_pays_their_hops_and_the_slowest_link() -> None:
    # 16 devices on 2 machines: 30 hops, 2 of them between the machines, at the network's 6 GB/s
    expected = 28 * 2e-6 + 2 * 10e-6 + 30 / 16 * 3e6 / 6e9
    assert ring_seconds(3e6, 16, FABRIC, PLAIN) == pytest.approx(expected)


def test_a_tree_climbs_the_logarithm_of_the_machines() -> None:
    # 64 devices on 8 machines: 7 hops inside and 3 levels, up and down
    assert tree_seconds(0.0, 64, FABRIC, PLAIN) == pytest.approx(2 * (7 * 2e-6 + 3 * 10e-6))
    assert tree_seconds(6e6, 64, FABRIC, PLAIN) == pytest.approx(2 * (7 * 2e-6 + 3 * 10e-6) + 2 * 6e6 / 6e9)


def test_a_tree_over_machines_that_are_no_power_of_two_rounds_down_as_nccl_does() -> None:
    # 48 devices on 6 machines: 2 levels; 20 on 3: 6 whole devices a machine and 1 level
    assert tree_seconds(0.0, 48, FABRIC, PLAIN) == pytest.approx(2 * (7 * 2e-6 + 2 * 10e-6))
    assert tree_seconds(0.0, 20, FABRIC, PLAIN) == pytest.approx(2 * (5 * 2e-6 + 10e-6))


def test_an_all_gather_is_half_the_hops_with_every_devices_bytes_on_every_link() -> None:
    assert gather_seconds(3e6, 8, FABRIC, PLAIN) == pytest.approx(7 * 2e-6 + 7 * 3e6 / 12e9)
    assert gather_seconds(3e6, 16, FABRIC, PLAIN) == pytest.approx(14 * 2e-6 + 10e-6 + 15 * 3e6 / 6e9)
    # of 8 times the bytes an all-reduce in one machine goes twice around
    assert ring_seconds(8 * 3e6, 8, FABRIC, PLAIN) == pytest.approx(2 * gather_seconds(3e6, 8, FABRIC, PLAIN))


def test_a_small_all_gather_goes_by_ll_at_a_third_of_the_bus_in_one_machine_and_a_quarter_across() -> None:
    assert all_gather_seconds(1200.0, 8, FABRIC) == pytest.approx(3.6e-6 + 7 * 1e-6 + 7 * 1200 * 3 / 12e9)
    across = 3.6e-6 + 14 * 1.8e-6 + 2.7e-6 + 15 * 1200 * 4 / 6e9
    assert all_gather_seconds(1200.0, 16, FABRIC) == pytest.approx(across)
    assert all_gather_seconds(1e9, 8, FABRIC) == gather_seconds(1e9, 8, FABRIC, RING[1])
    assert all_gather_seconds(1e9, 1, FABRIC) == 0.0


def test_hops_of_ll_within_several_machines_take_1_8_times_as_long() -> None:
    small, simple = RING
    assert ring_seconds(0.0, 8, FABRIC, small) == pytest.approx((3.6 + 14 * 1.0) * 1e-6)
    assert ring_seconds(0.0, 16, FABRIC, small) == pytest.approx((3.6 + 28 * 1.8 + 2 * 2.7) * 1e-6)
    assert ring_seconds(0.0, 16, FABRIC, simple) == pytest.approx((8.4 + 28 * 5.7 + 2 * 9.6) * 1e-6)
    assert tree_seconds(0.0, 16, FABRIC, TREE[0]) == pytest.approx((4.4 + 2 * (7 * 1.8 + 5.0)) * 1e-6)


@pytest.mark.parametrize(("devices", "limit"), [(8, 110e9), (16, 110e9), (32, 80e9)])
def test_trees_have_a_limit_however_fast_the_links(devices: int, limit: float) -> None:
    fast = nccl_fabric(8, "nvlink", 900e9, 900e9)
    low, simple = fast.trees
    assert tree_seconds(1e12, devices, fast, simple) == pytest.approx(2e12 / limit, rel=1e-3)
    assert tree_seconds(1e12, devices, fast, low) == pytest.approx(3.8 * 2e12 / limit, rel=1e-3)
    assert ring_seconds(1e12, devices, fast, fast.rings[1]) < tree_seconds(1e12, devices, fast, simple)


def test_one_device_has_nothing_to_reduce() -> None:
    assert all_reduce_seconds(1e9, 1, FABRIC) == 0.0
    assert Message("all-reduce", 800.0, 1).sent == Message("all-gather", 800.0, 1).sent == 0.0


def test_on_a_flat_fabric_a_ring_takes_a_latency_a_hop_and_the_bytes_that_a_device_sends() -> None:
    flat = flat_fabric(0.001, 1000.0)
    reduced, gathered = Message("all-reduce", 800.0, 4), Message("all-gather", 100.0, 4)
    assert (reduced.sent, gathered.sent) == (1200.0, 300.0)  # 6 hops of a quarter; 3 of all
    assert reduced.seconds(flat) == pytest.approx(6 * 0.001 + 1.2)
    assert gathered.seconds(flat) == pytest.approx(3 * 0.001 + 0.3)
    assert gathered._replace(times=5).seconds(flat) == 5 * gathered.seconds(flat)
    assert gathered._replace(times=5).sent == 1500.0


def test_many_machines_prefer_the_tree_and_a_large_message_in_one_machine_the_ring() -> None:
    few_bytes = all_reduce_seconds(1e3, 1024, FABRIC)
    assert few_bytes == min(tree_seconds(1e3, 1024, FABRIC, protocol) for protocol in TREE)
    assert few_bytes < min(ring_seconds(1e3, 1024, FABRIC, protocol) for protocol in RING) / 5
    assert all_reduce_seconds(1e9, 8, FABRIC) == ring_seconds(1e9, 8, FABRIC, RING[1])


@given(num_bytes=BYTES, devices=DEVICES, factor=st.floats(1.0, 100.0))
def test_more_bytes_never_take_less_time(num_bytes: float, devices: int, factor: float) -> None:
    assert all_reduce_seconds(factor * num_bytes, devices, FABRIC) >= all_reduce_seconds(num_bytes, devices, FABRIC)


@given(num_bytes=BYTES, devices=st.integers(1, 1023))
def test_one_device_more_never_makes_a_ring_faster(num_bytes: float, devices: int) -> None:
    assert ring_seconds(num_bytes, devices + 1, FABRIC, PLAIN) >= ring_seconds(num_bytes, devices, FABRIC, PLAIN)


@given(num_bytes=BYTES, devices=DEVICES)
def test_a_wider_network_never_hurts(num_bytes: float, devices: int) -> None:
    wide = nccl_fabric(8, "pcie", 12e9, 100e9)
    assert all_reduce_seconds(num_bytes, devices, wide) <= all_reduce_seconds(num_bytes, devices, FABRIC)


def test_without_a_backward_nothing_is_hidden() -> None:
    assert exposed_seconds([0.1, 0.2, 0.3], backward=0.0) == pytest.approx(0.6)


def test_a_fast_network_leaves_only_the_last_bucket_exposed() -> None:
    assert exposed_seconds([0.1] * 4, backward=4.0) == pytest.approx(0.1)


def test_a_slow_network_leaves_all_but_the_wait_for_the_first_bucket() -> None:
    # ready at 1, 2, 3, 4 s; sent from 1 s on, 2 s each: the end is 9 s, 5 s after the backward
    assert exposed_seconds([2.0] * 4, backward=4.0) == pytest.approx(5.0)


@given(st.lists(st.floats(0.0, 10.0), max_size=8), st.floats(0.0, 10.0))
def test_what_is_exposed_lies_between_nothing_and_everything(buckets: list[float], backward: float) -> None:
    assert 0.0 <= exposed_seconds(buckets, backward) <= sum(buckets) + 1e-9
