"""The law of the noise scale."""

import pytest

from megdet.planning.batches import BatchWorth


def test_a_batch_of_the_noise_scale_takes_twice_the_fewest_steps_and_images() -> None:
    worth = BatchWorth(32, 32.0)
    assert (worth.steps, worth.examples, worth.pays) == (2.0, 2.0, True)


def test_larger_batches_trade_images_for_steps_and_do_not_pay_beyond_the_noise_scale() -> None:
    small, large = BatchWorth(8, 32.0), BatchWorth(128, 32.0)
    assert (small.steps, small.examples, small.pays) == (5.0, 1.25, True)
    assert (large.steps, large.examples, large.pays) == (1.25, 5.0, False)
    # images are steps times batch size, each over its least: S_min x noise scale = E_min
    for worth in (small, large):
        assert worth.examples * worth.noise_scale == pytest.approx(worth.steps * worth.batch_size)
