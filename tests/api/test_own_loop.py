"""Parts for a training loop of one's own."""

from itertools import chain

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import megdet
from megdet.errors import InputError

SIZES = np.random.default_rng(0).integers(40, 90, (50, 2))


def sampler(**changes) -> megdet.PlanSampler:
    return megdet.PlanSampler(**{"sizes": SIZES, "batch_size": 8, "bn_size": 4, "epochs": 4, **changes})


def steps_of(one: megdet.PlanSampler) -> list[list[int]]:
    """The images of each step of a process."""
    batches = list(one)
    return [list(chain(*batches[first : first + one.rounds])) for first in range(0, len(batches), one.rounds)]


@pytest.mark.parametrize("num_replicas", [2, 4, 8])
def test_processes_share_the_images_that_one_process_has(num_replicas):
    alone = steps_of(sampler())
    shared = [steps_of(sampler(rank=rank, num_replicas=num_replicas)) for rank in range(num_replicas)]
    assert [sorted(step) for step in alone] == [sorted(chain(*parts)) for parts in zip(*shared, strict=True)]


def test_every_image_comes_once_an_epoch():
    images = chain(*steps_of(sampler()))
    assert sorted(images) == sorted([*range(50)] * 4)


def test_it_goes_on_from_a_step_and_serves_a_loader():
    whole, rest = sampler(), sampler(first_step=5)
    assert list(whole)[5 * whole.rounds :] == list(rest)
    assert len(whole) == len(list(whole)) == whole.num_steps * whole.rounds
    assert len(rest) == len(list(rest))
    loader = DataLoader(torch.arange(50), batch_sampler=whole)
    assert [batch.tolist() for batch in loader] == list(whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bn_size": 3}, "a bn_size of 3 does not divide a batch_size of 8"),
        ({"batch_size": 64, "bn_size": 64}, "the sizes of 50 images are fewer than a batch_size of 64"),
        ({"num_replicas": 3}, "cannot be spread evenly over 3 processes"),
        ({"num_replicas": 16}, "16 devices"),
        ({"rank": 2}, "rank is 2: with 1 processes it is from 0 to 0"),
        ({"rank": -1}, "rank is -1"),
        ({"first_step": 99}, "first_step is 99: the run has the steps 0 to"),
        ({"first_step": -2}, "first_step is -2"),
        ({"epochs": 0}, "epochs is 0: it must be above 0"),
        ({"sizes": [(24, 24, 3)] * 50}, r"sizes are \(images, 2\), height and width in pixels, not \(50, 3\)"),
        ({"sizes": [(24, 24)] * 49 + [(0, 24)]}, r"the size of image 49 is 0 x 24"),
        ({"sizes": [(24, 24), (24,)]}, "sizes are pairs of height and width"),
        ({"sizes": [(24, 24)] * 49 + [(float("nan"), 24)]}, "the size of image 49 is nan x 24"),
        ({"sizes": [(24, 24)] * 49 + [(2**70, 24)]}, "the size of image 49 is .* not above"),
        ({"epochs": float("inf")}, "epochs is inf: it must be above 0 and finite"),
        ({"batch_size": -4}, "does not divide a batch_size of -4"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        sampler(**changes)


def test_the_rate_is_scaled_warmed_up_and_decayed_by_hand():
    def rate(step: int) -> float:
        options = {"base_lr": 0.02, "batch_size": 64, "num_images": 640, "epochs": 4, "warmup_steps": 4}
        return megdet.scaled_learning_rate(step, **options, milestones=[2, 3], factors=[0.1, 0.5])

    assert [rate(step) for step in range(5)] == pytest.approx([0.02, 0.035, 0.05, 0.065, 0.08])
    assert [rate(step) for step in (19, 20, 29, 30)] == pytest.approx([0.08, 0.008, 0.008, 0.004])


class TwoParts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 3, bias=False), nn.Linear(3, 1, bias=False)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop, torch.optim.Adam])
def test_the_rate_of_a_module_follows_the_disagreement_of_its_halves_by_hand(kind):
    model = TwoParts()
    optimizer = kind(megdet.module_groups(model), lr=0.0)
    rates = megdet.ModuleRates(model, optimizer, reference="body", warmup_steps=2)
    for step in range(3):
        optimizer.zero_grad()
        model.body.weight.grad, model.head.weight.grad = torch.eye(3), torch.tensor([[1.0, 0, 0]])
        rates.first_half_done(step)
        model.body.weight.grad += torch.eye(3)  # the halves agree: v = 0
        model.head.weight.grad += torch.tensor([[0.0, 1, 0]])  # they are at right angles: v = 1
        rates.set(0.5)
        assert optimizer.param_groups[0]["lr"] == 0.5
        optimizer.step()
    # (0 + 1e-6) / (1 + 1e-6) is below 0.5, which is the least
    assert rates.factors == pytest.approx({"body": 1.0, "head": 0.97 + 0.03 * 0.5**0.5})
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.5 * rates.factors["head"])
    again = megdet.ModuleRates(model, optimizer, reference="body")
    again.load_state_dict(rates.state_dict())
    assert again.factors == rates.factors
    swapped = {"head": 0.25, "body": 1}
    again.load_state_dict(swapped)
    assert again.factors == swapped
    for factor in (float("nan"), 0.0, "a"):
        with pytest.raises(InputError, match=r"the factor of head is .*: a finite number above 0 is expected"):
            again.load_state_dict({"body": 1.0, "head": factor})
    with pytest.raises(InputError, match="factors of neck do not fit the modules body, head"):
        again.load_state_dict({"neck": 1.0})


def test_an_optimizer_without_modules_and_an_unknown_reference_are_refused():
    model = TwoParts()
    with pytest.raises(InputError, match=r"make it of module_groups\(model\)"):
        megdet.ModuleRates(model, torch.optim.SGD(model.parameters(), lr=0.1), reference="body")
    with pytest.raises(InputError, match="no trained module 'neck'; it has body, head"):
        megdet.ModuleRates(model, torch.optim.SGD(megdet.module_groups(model)), reference="neck")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"milestones": (5,)}, "1 milestones need as many factors, not 0"),
        ({"num_images": 0}, "num_images is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"base_lr": -1.0}, "base_lr is -1.0"),
    ],
)
def test_a_rate_of_what_cannot_be_meant_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        megdet.scaled_learning_rate(0, **{"base_lr": 0.02, "batch_size": 16, "num_images": 160, "epochs": 8, **changes})
