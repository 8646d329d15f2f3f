"""A step as the sum of its parts, by hand arithmetic."""

from dataclasses import replace

import pytest

from megdet.distributed.layout import Layout
from megdet.planning.network import exposed_seconds, flat_fabric
from megdet.planning.step import Exchange, StepCost, StepTime, step_bytes, step_time

COST = StepCost(0.5, 0.2, 0.3, 1000.0, 100.0, 40.0)
LAYOUT = Layout(num_groups=4, group_size=4, world_size=4, lane_width=2)
"""2 lanes of 2: two rounds of 2 images a device."""
EXCHANGE = Exchange((500, 400), (10,))
SILENT = Exchange((), ())
FABRIC = flat_fabric(0.001, 1000.0)


def time_of(cost: StepCost = COST, exchange: Exchange = SILENT, slowest: float = 1.0) -> StepTime:
    return step_time(cost, LAYOUT, exchange, FABRIC, slowest)


def test_a_step_costs_its_update_its_micro_batches_and_their_images() -> None:
    step = time_of()
    assert (step.images, step.overhead) == (pytest.approx(4 * 0.3), pytest.approx(0.5 + 2 * 0.2))
    assert step.total == step.compute == pytest.approx(0.5 + 2 * (0.2 + 0.3 * 2))


def test_the_slowest_device_is_waited_for() -> None:
    assert time_of(slowest=1.25).stragglers == pytest.approx(0.25 * 4 * 0.3)
    assert time_of(slowest=1.25).total == pytest.approx(time_of().total + 0.3)


def test_a_step_is_the_sum_of_its_parts() -> None:
    step = StepTime(1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
    assert (step.compute, step.communication, step.total) == (3.0, 24.0, 63.0)


@pytest.mark.parametrize("gathers_sums", [True, False])
def test_the_exchange_of_a_step_counts_gradients_statistics_and_the_fold(gathers_sums: bool) -> None:
    exchange = replace(EXCHANGE, gathers_sums=gathers_sums)
    assert sum(message.sent for message in exchange.gradients(LAYOUT)) == 6 / 4 * 900
    forward, fold = 4 + 80, 6 / 4 * 80  # count, mean and squares to one neighbour; mean and variance of every layer
    backward = 80 if gathers_sums else 2 / 2 * 80  # two sums a channel
    sent = 2 * (forward + backward) + fold
    assert sum(message.sent for message in exchange.norms(LAYOUT)) == sent
    step = time_of(exchange=exchange)
    assert step.gradients == pytest.approx(2 * 6 * 0.001 + 6 / 4 * 900 / 1000)
    hops = 2 * (1 + (1 if gathers_sums else 2)) + 6
    assert step.norms == pytest.approx(hops * 0.001 + sent / 1000)


def test_algorithm_1_reduces_twice_forward_and_folds_nothing() -> None:
    found = replace(EXCHANGE, is_two_pass=True).norms(LAYOUT)
    # mean and variance of 10 channels in two rounds, two sums backward, all in a lane of two
    assert [(m.kind, m.num_bytes, m.devices, m.times) for m in found] == [
        ("all-reduce", 40, 2, 4),
        ("all-reduce", 80, 2, 2),
    ]


def test_statistics_in_float64_are_twice_as_large() -> None:
    single, double = (replace(EXCHANGE, number_bytes=size).norms(LAYOUT) for size in (4, 8))
    assert [message.sent for message in double] == [2 * message.sent for message in single]


def test_one_device_sends_nothing() -> None:
    alone = Layout(4, 4, 1, 1)
    assert {message.sent for message in [*EXCHANGE.gradients(alone), *EXCHANGE.norms(alone)]} == {0.0}
    assert step_time(COST, alone, EXCHANGE, FABRIC).communication == 0.0


def test_gradients_hide_behind_the_last_backward_where_there_is_one() -> None:
    buckets = [message.seconds(FABRIC) for message in EXCHANGE.gradients(LAYOUT)]
    step = time_of(replace(COST, backward_seconds=0.2), EXCHANGE)
    assert step.gradients == exposed_seconds(buckets, 2 * 0.2) < time_of(exchange=EXCHANGE).gradients == sum(buckets)


def test_loading_hides_behind_the_step_where_other_processes_do_it() -> None:
    busy = time_of().total
    assert time_of(replace(COST, load_seconds=0.1)).input == 0.0
    assert time_of(replace(COST, load_seconds=10.0)).total == pytest.approx(4 * 10.0)  # as long as its images take
    assert time_of(replace(COST, load_seconds=0.1, loads_beside=False)).total == pytest.approx(busy + 0.4)


def test_memory_is_what_is_fixed_what_waits_the_images_and_a_bucket() -> None:
    one_round = Layout(1, 4, 1, 1)
    assert step_bytes(COST, one_round, EXCHANGE) == 1000 + 40 * 4
    assert step_bytes(COST, Layout(3, 4, 1, 1), EXCHANGE) == 1000 + 100 + 40 * 4  # one waits, however many rounds
    assert step_bytes(COST, LAYOUT, EXCHANGE) == 1000 + 100 + 40 * 2 + 500
    assert step_bytes(COST, one_round, EXCHANGE, gradient_copies=1) == 1000 + 40 * 4 + 900
    assert step_bytes(replace(COST, least_bytes=5000.0), one_round, EXCHANGE) == 5000
    assert step_bytes(replace(COST, fixed_bytes=None), one_round, EXCHANGE) is None
