from dataclasses import replace

import pytest
import torch
from torch import Tensor

from factories import reported_by, tiny_batch
from megdet.model.faster_rcnn import FasterRcnn
from megdet.recipe import Optimizer, Recipe, Schedule
from megdet.structures import Batch
from megdet.training.trainer import Trainer
from tiny_steps import BATCH, FROZEN, make_trainer, result_of, split


def step(trainer: Trainer, batches: list[Batch], rate: float = 0.01, number: int = 0) -> Tensor:
    return reported_by(result_of(trainer, batches, rate, number))


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def gradients(recipe: Recipe, batches: list[Batch]) -> dict[str, Tensor]:
    """Of Eq. 1 without its decay, by autograd alone."""
    trainer = make_trainer(recipe)
    model = trainer.model
    wanted = [p for p in model.parameters() if p.requires_grad]
    loss = sum(model(batch)[name].sum() for batch in batches for name in FasterRcnn.loss_names) / recipe.batch_size
    found = torch.autograd.grad(loss, wanted)
    return dict(zip((n for n, p in model.named_parameters() if p.requires_grad), found, strict=True))


@pytest.mark.parametrize("parts", [4, 2, 1])
def test_accumulated_micro_batches_make_the_step_of_the_whole(parts):
    batch = tiny_batch(8)
    whole, accumulated = make_trainer(FROZEN), make_trainer(FROZEN)
    for number in range(2):
        reported = step(whole, [batch], number=number)
        again = step(accumulated, split(batch, parts), number=number)
        assert torch.allclose(reported, again, rtol=1e-9, atol=0)
    for name, weight in weights(whole).items():
        assert torch.allclose(weight, weights(accumulated)[name], rtol=1e-9, atol=1e-12), name


def test_groups_of_batch_norm_are_not_one_group():
    batch = tiny_batch(8)
    assert not torch.allclose(step(make_trainer(BATCH), [batch]), step(make_trainer(BATCH), split(batch, 4)), rtol=1e-6)


def test_three_steps_are_sgd_with_momentum_and_decay_by_hand():
    recipe = replace(FROZEN, optimizer=Optimizer(momentum=0.8, weight_decay=0.01))
    trainer = make_trainer(recipe)
    start = weights(trainer)
    gradient = gradients(recipe, [tiny_batch(8)])
    step(trainer, [tiny_batch(8)], rate=0.01)
    first = weights(trainer)
    for name, weight in start.items():
        velocity = gradient[name] + 0.01 * weight
        assert torch.allclose(first[name], weight - 0.01 * velocity, rtol=1e-10, atol=1e-13), name
    step(trainer, [tiny_batch(8, seed=1)], rate=0.05)
    # the second gradient from what the step left in the buckets
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            velocity = 0.8 * (gradient[name] + 0.01 * start[name]) + parameter.grad + 0.01 * first[name]
            assert torch.allclose(parameter.detach(), first[name] - 0.05 * velocity, rtol=1e-9, atol=1e-13), name


def test_decay_spares_norms_and_biases_where_the_recipe_says_so():
    batches = split(tiny_batch(8), 4)
    decayed, spared, none = (
        replace(BATCH, optimizer=Optimizer(weight_decay=decay, decay_norm_and_bias=everything))
        for decay, everything in ((0.1, True), (0.1, False), (0.0, True))
    )
    after = []
    for recipe in (decayed, spared, none):
        trainer = make_trainer(recipe)
        step(trainer, batches)
        after.append(weights(trainer))
    for name, weight in after[0].items():
        is_spared = weight.dim() == 1
        assert torch.equal(after[1][name], after[2][name]) == is_spared, name
        assert torch.equal(after[1][name], weight) == (not is_spared), name


def test_clipping_shortens_the_gradient_to_the_norm_and_leaves_a_shorter_one_alone():
    recipe = replace(FROZEN, optimizer=Optimizer(weight_decay=0.0))
    batch = tiny_batch(8)
    expected = torch.cat([g.flatten() for g in gradients(recipe, [batch]).values()]).norm()
    free = make_trainer(recipe)
    norm = step(free, [batch])[-1]
    assert float(norm) == pytest.approx(float(expected), rel=1e-9)
    for limit, factor in ((float(norm) / 4, 0.25), (float(norm) * 2, 1.0)):
        clipped = make_trainer(replace(recipe, optimizer=Optimizer(weight_decay=0.0, clip_norm=limit)))
        start = weights(clipped)
        assert float(step(clipped, [batch])[-1]) == pytest.approx(float(norm))  # reported before it is clipped
        for name, weight in weights(free).items():
            moved = weights(clipped)[name] - start[name]
            assert torch.allclose(moved, factor * (weight - start[name]), rtol=1e-5, atol=1e-12), name


def test_what_is_reported_are_means_over_the_images():
    batch = tiny_batch(8)
    result = result_of(make_trainer(FROZEN), split(batch, 2))
    model = make_trainer(FROZEN).model
    by_image = [model(one) for one in split(batch, 1)]
    for name in model.reported():
        expected = sum(float(losses[name].detach().sum()) for losses in by_image) / 8
        assert float(result.means[name]) == pytest.approx(expected, rel=1e-9), name
        assert expected > 0, name
        assert result.means[name].dtype == torch.float64
    assert result.gradient_norm.dtype == torch.float64
    assert result.means.keys() == set(model.reported())


def test_running_statistics_take_one_step_of_the_mean_over_groups():
    trainer = make_trainer(BATCH)
    norm = trainer.model.backbone.body.bn1
    batches = split(tiny_batch(8), 4)
    seen: list[Tensor] = []
    handle = norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    step(trainer, batches)
    handle.remove()
    assert len(seen) == 2
    means = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
    variances = torch.stack([x.transpose(0, 1).flatten(1).var(1, unbiased=True) for x in seen]).mean(0)
    assert torch.allclose(norm.running_mean, 0.9 * mean + 0.1 * means, rtol=1e-9)
    assert torch.allclose(norm.running_var, 0.9 * var + 0.1 * variances, rtol=1e-9)
    assert norm.num_batches_tracked.item() == 1


def test_the_average_follows_the_weights_and_buffers_of_every_step():
    recipe = replace(BATCH, optimizer=Optimizer(ema_decay=0.15))
    trainer = make_trainer(recipe)
    expected = {name: t.clone() for name, t in trainer.model.state_dict().items()}
    for number, decay in enumerate((0.1, 0.15)):  # 1 / 10, then the recipe's, which is below 2 / 11
        step(trainer, split(tiny_batch(8, seed=number), 4), rate=0.05, number=number)
        for name, tensor in trainer.model.state_dict().items():
            is_count = name.endswith("num_batches_tracked")
            expected[name] = tensor.clone() if is_count else decay * expected[name] + (1 - decay) * tensor
    for name, tensor in trainer.averages.tensors.items():
        assert torch.allclose(tensor, expected[name], rtol=1e-12, atol=1e-15), name
        if "running_mean" in name:
            assert not torch.equal(tensor, trainer.model.state_dict()[name])


def test_bfloat16_computes_in_bfloat16_and_keeps_weights_in_float32():
    recipe = replace(FROZEN, precision="bfloat16")
    trainer = make_trainer(recipe)
    seen: list[torch.dtype] = []
    trainer.model.fpn.output[0].register_forward_hook(lambda _m, _i, output: seen.append(output.dtype))
    start = weights(trainer)
    reported = step(trainer, split(tiny_batch(8), 2))
    assert set(seen) == {torch.bfloat16}
    assert reported.isfinite().all()
    exact = step(make_trainer(FROZEN), split(tiny_batch(8), 2))
    assert torch.allclose(reported[:4].double(), exact[:4], rtol=0.1)
    assert all(w.dtype == torch.float32 and not torch.equal(w, start[n]) for n, w in weights(trainer).items())


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_gradients_of_two_halves_make_the_step_of_the_whole(size):
    recipe = replace(FROZEN, group_size=size, optimizer=Optimizer(clip_norm=1.0))
    batches = split(tiny_batch(8), size)
    plain, halved = make_trainer(recipe), make_trainer(replace(recipe, noise_interval=1))
    for number in range(2):
        reported = step(plain, batches, number=number)
        result = result_of(halved, batches, number=number)
        assert torch.allclose(reported, reported_by(result), rtol=1e-9, atol=0)
        assert result.noise is not None
    for name, weight in weights(plain).items():
        assert torch.allclose(weight, weights(halved)[name], rtol=1e-9, atol=1e-12), name


def test_agvm_sees_the_gradients_of_the_first_and_the_second_half_before_clipping():
    recipe = replace(FROZEN, optimizer=Optimizer(agvm=True, clip_norm=1e-3), schedule=Schedule(warmup_steps=0))
    batches = split(tiny_batch(8), 2)
    trainer = make_trainer(recipe)
    found = dict(zip(trainer.agvm.parts, result_of(trainer, batches).agvm[0].tolist(), strict=True))
    sides = gradients(recipe, batches[:2]), gradients(recipe, batches[2:])
    for module, disagreement in found.items():
        ours, theirs = (
            torch.cat([g.flatten() for name, g in side.items() if name.startswith(f"{module}.")]) for side in sides
        )
        cosine = torch.nn.functional.cosine_similarity(ours, theirs, dim=0)
        assert disagreement == pytest.approx(1 - float(cosine), rel=1e-6), module


def test_a_module_moves_by_its_own_factor():
    recipe = replace(FROZEN, optimizer=Optimizer(agvm=True, weight_decay=0.0), schedule=Schedule(warmup_steps=5))
    moved = []
    for factors in ([1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 0.5, 3.0]):
        trainer = make_trainer(recipe)
        trainer.agvm.factors.copy_(torch.tensor(factors))
        before = weights(trainer)
        result = result_of(trainer, split(tiny_batch(8), 2))
        moved.append({name: weight - before[name] for name, weight in weights(trainer).items()})
        assert result.agvm is None, "it is not due, and the factors hold all the same"
    by_module = dict(zip(("backbone", "fpn", "rpn", "box_head"), factors, strict=True))
    for name, change in moved[0].items():
        assert torch.allclose(moved[1][name], change * by_module[name.split(".")[0]], rtol=1e-5, atol=1e-12), name
