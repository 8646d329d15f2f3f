"""Images computed apart: they meet for batch statistics, in the order of the plan, and none waits for ever."""

import threading
import time
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from megdet.distributed.lane import SINGLE_LANE
from megdet.layers.batch_norm import CrossDeviceBatchNorm, step_sums
from megdet.layers.image_team import ImageTeam, current_image, thread_pool

COUNT = 4


def together(works: list[Callable[[], object]], at_once: int = 2) -> list[object]:
    with thread_pool(len(works)) as pool:
        return ImageTeam(len(works), len(works), at_once).run(pool, works)


def gathered(number: float) -> Tensor:
    image = current_image()
    assert image is not None
    return image.gathered(torch.tensor([number, 2 * number]), SINGLE_LANE)


@pytest.mark.parametrize("at_once", [1, 2, 9])
def test_every_image_gets_the_rows_of_all_in_their_order_whoever_comes_first(at_once):
    def work(place: int) -> list[Tensor]:
        time.sleep(0.002 * (COUNT - place))
        return [gathered(place + 10.0 * turn) for turn in range(3)]

    for rows in together([partial(work, place) for place in range(COUNT)], at_once):
        for turn, found in enumerate(rows):
            assert found.tolist() == [[place + 10 * turn, 2 * (place + 10 * turn)] for place in range(COUNT)]


def test_no_more_images_run_at_once_than_allowed():
    lock, now, most = threading.Lock(), [0], [0]

    def work() -> None:
        for _ in range(3):
            with lock:
                now[0] += 1
                most[0] = max(most[0], now[0])
            time.sleep(0.005)
            with lock:
                now[0] -= 1
            gathered(0.0)

    together([work] * 5, at_once=2)
    assert most == [2]


def test_operations_of_an_image_run_on_one_thread_and_the_main_thread_has_no_image():
    assert together([torch.get_num_threads] * 2) == [1, 1]
    assert current_image() is None


@pytest.mark.parametrize("bad", range(COUNT))
def test_what_an_image_raises_is_raised_and_nobody_waits_for_it(bad):
    def work(place: int) -> None:
        gathered(1.0)
        if place == bad:
            raise ValueError(f"image {place}")
        gathered(2.0)

    with pytest.raises(ValueError, match=f"image {bad}"):
        together([partial(work, place) for place in range(COUNT)])


@pytest.mark.parametrize("bad", range(COUNT))
def test_images_that_share_another_number_of_statistics_are_a_bug_that_is_told(bad):
    def work(place: int) -> None:
        for _ in range(1 if place == bad else 2):
            gathered(1.0)

    with pytest.raises(RuntimeError, match="statistics"):
        together([partial(work, place) for place in range(COUNT)])


def normalized(norm: nn.Module, images: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """The output and the gradient of the input, of images that are computed apart."""

    def work(place: int) -> tuple[Tensor, Tensor]:
        x = images[place : place + 1].clone().requires_grad_()
        y = norm(x)
        y.backward(slopes[place : place + 1])
        assert x.grad is not None
        return y.detach(), x.grad

    found = together([partial(work, place) for place in range(len(images))])
    outputs, gradients = zip(*found, strict=True)
    return torch.cat(outputs), torch.cat(gradients)


def test_batch_norm_of_images_apart_is_that_of_the_joined_batch():
    torch.manual_seed(0)
    images, slopes = (torch.randn(COUNT, 3, 5, 7, dtype=torch.float64) for _ in range(2))
    ours, theirs = CrossDeviceBatchNorm(3).double(), nn.BatchNorm2d(3).double()
    for norm in (ours, theirs):
        nn.init.constant_(norm.weight, 1.3)
    output, gradient = normalized(ours, images, slopes)
    x = images.clone().requires_grad_()
    wanted = theirs(x)
    wanted.backward(slopes)
    assert x.grad is not None
    torch.testing.assert_close(output, wanted.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, x.grad, rtol=1e-11, atol=1e-12)
    mean, var = step_sums([ours])
    torch.testing.assert_close(mean, images.mean((0, 2, 3)))
    torch.testing.assert_close(var, images.transpose(0, 1).flatten(1).var(1))
