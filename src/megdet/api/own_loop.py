"""Parts of MegDet for a training loop of your own: the plan as a sampler, the learning rate, AGVM for any optimizer.

Cross-device batch norm for any model is `megdet.layers.convert_batch_norm`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from megdet.data.plan import TrainingPlan
from megdet.distributed.layout import choose_layout
from megdet.errors import InputError
from megdet.recipe import Optimizer, Recipe, Schedule
from megdet.training.optimizers.agvm import Agvm
from megdet.training.optimizers.parts import module_of, parts_of
from megdet.training.schedule import learning_rate


class PlanSampler:
    """The images of every micro-batch of this process, for `DataLoader(dataset, batch_sampler=PlanSampler(...))`.

    It is MegDet's plan: every image once an epoch, groups of like aspect ratio, and the same images in every step on
    any number of processes. A process gets `rounds` micro-batches a step, its share of one group each. To have the
    gradient of the whole mini-batch, divide the sum of the images' losses by `batch_size`, and sum the gradients over
    the processes (DistributedDataParallel takes their mean: multiply by their number).

    Args:
        sizes: height and width in pixels of every image, (images, 2).
        batch_size: images of an optimizer step, over all processes.
        bn_size: images of a group, which are normalised together.
        epochs: after so many passes it ends.
        rank: this process, from 0.
        num_replicas: processes.
        seed: of the order.
        first_step: where to begin, to go on with a run.

    Raises:
        InputError: `bn_size` does not divide `batch_size`, there are fewer images than `batch_size`, the groups and
            their images cannot be spread evenly over the processes, or another argument cannot be meant.
    """

    def __init__(
        self,
        sizes: ArrayLike,
        *,
        batch_size: int,
        bn_size: int,
        epochs: int | float,
        rank: int = 0,
        num_replicas: int = 1,
        seed: int = 0,
        first_step: int = 0,
    ) -> None:
        if batch_size < 1 or bn_size < 1 or batch_size % bn_size:
            raise InputError(f"a bn_size of {bn_size} does not divide a batch_size of {batch_size}")
        self.layout = choose_layout(batch_size // bn_size, bn_size, num_replicas)
        if self.layout.idle:
            raise InputError(
                f"{batch_size} images in groups of {bn_size} cannot be spread evenly over {num_replicas} processes: "
                "take another number of processes, or `megdet.train`, which can"
            )
        if not 0 <= rank < num_replicas:
            raise InputError(f"rank is {rank}: with {num_replicas} processes it is from 0 to {num_replicas - 1}")
        if not 0 < epochs < math.inf:
            raise InputError(f"epochs is {epochs}: it must be above 0 and finite")
        pairs = _pairs(sizes)
        if len(pairs) < batch_size:
            raise InputError(f"the sizes of {len(pairs)} images are fewer than a batch_size of {batch_size}")
        schedule = Schedule(policy="step", epochs=float(epochs))
        recipe = Recipe(batch_size=batch_size, bn_size=bn_size, seed=seed, schedule=schedule)
        self.plan = TrainingPlan(pairs, recipe)
        if not 0 <= first_step <= self.num_steps:
            raise InputError(f"first_step is {first_step}: the run has the steps 0 to {self.num_steps - 1}")
        self.rank, self.first_step = rank, first_step

    @property
    def rounds(self) -> int:
        """Micro-batches of this process in a step."""
        return self.layout.rounds

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        return self.plan.total_steps

    def __len__(self) -> int:
        return (self.num_steps - self.first_step) * self.rounds

    def __iter__(self) -> Iterator[list[int]]:
        share = self.layout.share_of(self.rank)
        for step in range(self.first_step, self.num_steps):
            groups = self.plan.groups(step)
            for number in self.layout.groups_of(self.rank):
                yield [image.index for image in groups[number].images[share]]


def _pairs(sizes: ArrayLike) -> NDArray[np.int64]:
    try:
        numbers = np.asarray(sizes, dtype=np.float64)
        pairs = np.where(np.isfinite(numbers) & (numbers < 1 << 31), numbers, 0).astype(np.int64)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"sizes are pairs of height and width in pixels, one an image ({error})") from None
    if pairs.ndim != 2 or pairs.shape[1] != 2:
        raise InputError(f"sizes are (images, 2), height and width in pixels, not {pairs.shape}")
    if len(wrong := np.flatnonzero((pairs < 1).any(axis=1))):
        found = " x ".join(f"{number:g}" for number in numbers[wrong[0]])
        raise InputError(f"the size of image {wrong[0]} is {found}: both must be at least 1 pixel, and not above 2**31")
    return pairs


def scaled_learning_rate(
    step: int,
    *,
    base_lr: int | float,
    batch_size: int,
    num_images: int,
    epochs: int | float,
    milestones: Sequence[int | float] = (),
    factors: Sequence[int | float] = (),
    warmup_steps: int = 500,
    warmup_start: int | float = 1.0,
) -> float:
    """The rate of step 0, 1, ...: base_lr * batch_size / 16, after a linear warmup, times the decays (Sec. 3.2).

    Args:
        step: which one.
        base_lr: the rate for 16 images.
        batch_size: images of an optimizer step, over all processes.
        num_images: of an epoch.
        epochs: of the whole run.
        milestones: epochs at which the rate is multiplied.
        factors: by these, as many.
        warmup_steps: so many steps from `warmup_start` * base_lr to the full rate.
        warmup_start: see there.

    Raises:
        InputError: a number cannot be meant, or there are not as many factors as milestones.
    """
    least = {"step": (step, 0), "batch_size": (batch_size, 1), "num_images": (num_images, 1), "base_lr": (base_lr, 0)}
    for name, (value, bound) in least.items():
        if not bound <= value < math.inf:
            raise InputError(f"{name} is {value}: at least {bound} is expected")
    if len(milestones) != len(factors):
        raise InputError(f"{len(milestones)} milestones need as many factors, not {len(factors)}")
    decays = tuple(map(float, milestones)), tuple(map(float, factors))
    schedule = Schedule("step", float(epochs), *decays, "linear", warmup_steps, float(warmup_start))
    recipe = Recipe(batch_size=batch_size, schedule=schedule, optimizer=Optimizer(base_lr=float(base_lr)))
    return learning_rate(recipe, num_images, step)


def module_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Groups for any optimizer of torch's interface, one for each direct child of the model that is trained."""
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(module_of(name), []).append(parameter)
    return [{"params": own, "module": module} for module, own in groups.items()]


class ModuleRates:
    """AGVM around any optimizer: a rate for each module, by the variance of its gradient (Xue et al. 2022).

        optimizer = AnyOptimizer(module_groups(model), lr=0.0)
        rates = ModuleRates(model, optimizer, reference="backbone")
        for step in range(steps):
            optimizer.zero_grad()
            (loss of the first half of the mini-batch).backward()
            rates.first_half_done(step)
            (loss of the second half).backward()
            rates.set(rate)
            optimizer.step()

    Where several processes train, the gradients must be summed over them before each of the two calls, as
    DistributedDataParallel does in every backward.

    Args:
        model: its direct children are the modules.
        optimizer: made of `module_groups(model)`.
        reference: the module that the others are compared with.
        warmup_steps: steps before the first measurement.

    Raises:
        InputError: the optimizer has other groups, or there is no such module.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, reference: str, warmup_steps: int = 0
    ) -> None:
        if any("module" not in group for group in optimizer.param_groups):
            raise InputError("AGVM needs an optimizer whose groups are modules: make it of module_groups(model)")
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        parts = parts_of(model, self.parameters)
        if reference not in parts:
            raise InputError(f"the model has no trained module '{reference}'; it has {', '.join(parts)}")
        device = self.parameters[0].device
        self.agvm = Agvm(parts, reference, self.parameters, optimizer, warmup_steps, device)
        self._first: list[Tensor] | None = None

    @property
    def factors(self) -> dict[str, float]:
        """What the rate of each module is multiplied by."""
        return dict(zip(self.agvm.parts, self.agvm.factors.tolist(), strict=True))

    def first_half_done(self, step: int) -> None:
        """Note the gradients of the first half, where they are to be compared in this step, every tenth."""
        self._first = [own.clone() for own in self._gradients()] if self.agvm.is_due(step) else None

    def set(self, rate: int | float) -> None:
        """Compare the halves if it is time, and give every group of the optimizer its rate."""
        if self._first is not None:
            second = torch._foreach_sub(self._gradients(), self._first)
            self.agvm.update(self._first, list(second))
        self._first, factors = None, self.factors
        for group in self.agvm.optimizer.param_groups:
            group["lr"] = rate * factors[group["module"]]

    def state_dict(self) -> dict[str, float]:
        """The factors by module, for a checkpoint of yours: a run that goes on without them begins with 1 again."""
        return self.factors

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on with the factors of a checkpoint. Raises InputError where they are of other modules, or are none."""
        if {*state} != {*self.agvm.parts}:
            raise InputError(f"factors of {', '.join(state)} do not fit the modules {', '.join(self.agvm.parts)}")
        for name, factor in state.items():
            if not isinstance(factor, int | float) or not 0 < factor < math.inf:
                raise InputError(f"the factor of {name} is {factor!r}: a finite number above 0 is expected")
        own = [float(state[name]) for name in self.agvm.parts]
        self.agvm.restore({"factors": torch.tensor(own, dtype=torch.float64)})

    def _gradients(self) -> list[Tensor]:
        return [torch.zeros_like(own) if own.grad is None else own.grad for own in self.parameters]
