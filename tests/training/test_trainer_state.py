"""What a trainer expects of a checkpoint is what it saves, and nothing else is taken."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megdet.distributed.layout import choose_layout
from megdet.errors import InputError
from megdet.recipe import Optimizer, Recipe
from megdet.run_folder.checkpoint_files import checkpoint_path
from megdet.run_folder.folder import RunFolder
from megdet.training.loop import train
from megdet.training.resume import resume
from megdet.training.run import RunOptions
from megdet.training.trainer import digest, make_trainer
from small_runs import ALONE, make, run_steps, small_recipe, state_of, train_set, write_small_set


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: Any) -> Recipe:
    """Two steps."""
    folder = tmp_path_factory.mktemp("data")
    write_small_set(folder, "train", 13)
    write_small_set(folder, "val", 2, seed=1)
    recipe = small_recipe(folder)
    return replace(recipe, schedule=replace(recipe.schedule, epochs=1.0), optimizer=Optimizer(ema_decay=0.9))


@pytest.mark.parametrize(
    ("optimizer", "changes"),
    [
        (Optimizer(), {}),
        (Optimizer(momentum=0.0), {}),
        (Optimizer(kind="adamw", agvm=True, base_lr=1e-4, ema_decay=0.9), {"noise_interval": 2}),
        (Optimizer(kind="lars", base_lr=1.0), {}),
        (Optimizer(kind="lamb", base_lr=1e-3), {"bn_size": 8, "noise_interval": 3}),
        (Optimizer(), {"precision": "float32"}),
    ],
    ids=["sgd", "no momentum", "adamw", "lars", "lamb", "float32"],
)
def test_what_a_trainer_expects_of_a_checkpoint_is_what_it_saves(
    recipe: Recipe, optimizer: Optimizer, changes: dict[str, Any]
) -> None:
    changed = replace(recipe, optimizer=optimizer, **changes)
    for steps in (1, 2):
        trainer, _ = run_steps(changed, steps)
        saved, layout = trainer.state(), make(changed).layout(steps)
        assert saved.keys() == layout.keys()
        for kind, tensors in saved.items():
            expected = {name: (tensor.shape, tensor.dtype) for name, tensor in layout[kind].items()}
            assert {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()} == expected


@pytest.fixture(scope="module")
def whole(recipe: Recipe, tmp_path_factory: Any) -> RunFolder:
    folder = RunFolder(tmp_path_factory.mktemp("whole") / "run")
    train(recipe, folder, RunOptions(workers=0), ALONE)
    return folder


Tensors = dict[str, Tensor]
NAME = "fpn.lateral.0.0.weight"


def with_momentum(change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, NAME: change(tensors[NAME]).contiguous()}


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (
            "optimizer",
            with_momentum(lambda _: torch.zeros(3)),
            r"has shape \(3,\), the recipe asks for \(16, \d+, 1, 1\)",
        ),
        ("optimizer", with_momentum(lambda t: torch.cat([t, t])), r"has shape \(32, "),
        ("optimizer", with_momentum(lambda t: t.transpose(0, 1)), r"has shape \(\d+, 16, 1, 1\)"),
        ("optimizer", with_momentum(lambda t: t.long()), "is int64, the recipe asks for float64"),
        ("optimizer", with_momentum(lambda t: t.float()), "is float32, the recipe asks for float64"),
        ("optimizer", lambda _: {}, "no tensor backbone"),
        ("optimizer", lambda tensors: {k: t for k, t in tensors.items() if k != NAME}, f"no tensor {NAME}"),
        ("optimizer", lambda tensors: {**tensors, "more": torch.ones(1)}, "tensor more has no place"),
        ("averages", with_momentum(lambda t: t[:3]), r"has shape \(3, "),
        ("model", with_momentum(lambda t: t.float()), "is float32, the recipe asks for float64"),
        ("model", with_momentum(lambda t: t * float("nan")), "has values that are not finite"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_before_one_tensor_is_copied(
    recipe: Recipe, whole: RunFolder, tmp_path: Path, kind: str, change: Callable[[Tensors], Tensors], message: str
) -> None:
    run = RunFolder(shutil.copytree(whole.path, tmp_path / "run"))
    file = checkpoint_path(run, 2) / f"{kind}.safetensors"
    save_file(change(load_file(file)), file)
    rehash(file)
    trainer, fresh = make(recipe), digest(state_of(make(recipe)))
    with pytest.raises(
        InputError, match=rf"damaged: .*{kind}\.safetensors: .*{message}.*; delete the folder"
    ) as refused:
        resume(trainer, run, train_set(recipe), ALONE)
    assert "\n" not in str(refused.value)
    assert digest(state_of(trainer)) == fresh


def rehash(file: Path) -> None:
    """Let the checkpoint vouch for a file that was changed."""
    state = json.loads((file.parent / "state.json").read_text())
    if file.exists():
        state["tensors"][file.stem] = sha256(file.read_bytes()).hexdigest()
    else:
        del state["tensors"][file.stem]
    state["check"] = ""
    (file.parent / "state.json").write_text(json.dumps(state))


def test_a_file_too_few_or_too_many_is_refused(recipe: Recipe, whole: RunFolder, tmp_path: Path) -> None:
    run = RunFolder(shutil.copytree(whole.path, tmp_path / "run"))
    averages = checkpoint_path(run, 2) / "averages.safetensors"
    without = replace(recipe, optimizer=Optimizer())
    with pytest.raises(InputError, match=r"it has averages\.safetensors, which no checkpoint of this recipe has"):
        resume(make(without), run, train_set(recipe), ALONE)
    averages.unlink()
    rehash(averages)
    with pytest.raises(InputError, match=r"it lacks averages\.safetensors, which every checkpoint of this recipe has"):
        resume(make(recipe), run, train_set(recipe), ALONE)


def test_an_evaluation_with_a_number_of_another_type_is_refused(
    recipe: Recipe, whole: RunFolder, tmp_path: Path
) -> None:
    run = RunFolder(shutil.copytree(whole.path, tmp_path / "run"))
    file = checkpoint_path(run, 2) / "state.json"
    state = json.loads(file.read_text())
    state["state"]["evaluation"]["bbox"]["AP"], state["check"] = "good", ""
    file.write_text(json.dumps(state))
    with pytest.raises(
        InputError, match=r"state\.json: evaluation: bbox\.AP: expected float, got str, here stands 'good'; del"
    ):
        resume(make(recipe), run, train_set(recipe), ALONE)


def test_a_digest_knows_names_shapes_dtypes_and_bits_and_no_memory_format() -> None:
    images = torch.randn(2, 3, 4, 5)
    own = digest({"a": images, "b": torch.ones(2)})
    assert own == digest({"b": torch.ones(2), "a": images.to(memory_format=torch.channels_last)})
    others = [
        {"a": images},
        {"a": images, "c": torch.ones(2)},
        {"a": images.reshape(3, 2, 4, 5), "b": torch.ones(2)},
        {"a": images, "b": torch.ones(2).bfloat16()},
        {"a": images, "b": torch.ones(2).nextafter(torch.zeros(2))},
    ]
    assert len({own, *map(digest, others)}) == 6


def test_a_checkpoint_from_before_there_was_a_watch_is_taken_and_the_watch_begins_anew(
    recipe: Recipe, whole: RunFolder, tmp_path: Path
) -> None:
    run = RunFolder(shutil.copytree(whole.path, tmp_path / "run"))
    old = checkpoint_path(run, 2) / "watch.safetensors"
    assert load_file(old)["num_applied"] == 2
    old.unlink()
    rehash(old)
    trainer = make(recipe)
    assert resume(trainer, run, train_set(recipe), ALONE).step == 2
    assert trainer.watch.num_applied == 0
    saved = load_file(checkpoint_path(run, 2) / "model.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in trainer.model.state_dict().items())


def test_a_bn_size_that_no_norm_uses_is_refused_unless_the_run_began_with_it(recipe: Recipe) -> None:
    norms = {name: "group" for name, norm in recipe.model.norms.items() if norm == "batch" and name != "backbone"}
    model = replace(recipe.model, backbone=replace(recipe.model.backbone, frozen_stages=5))
    model = replace(model, **{name: replace(getattr(model, name), norm=norm) for name, norm in norms.items()})
    with pytest.raises(InputError, match=r"bn_size is \d+, and no batch norm of this detector is trained"):
        make(replace(recipe, model=model))
    layout = choose_layout(recipe.groups_per_step, recipe.images_per_group, 1)
    make_trainer(replace(recipe, model=model), ("a",), layout, ALONE, is_new=False)
    make(replace(recipe, model=model, bn_size=0, group_size=recipe.bn_size))
