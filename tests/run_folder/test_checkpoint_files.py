import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch

from megdet.errors import InputError
from megdet.run_folder.checkpoint_files import (
    DamagedError,
    Kind,
    LeftBehindError,
    checkpoint_step,
    checkpoints,
    delete_old_checkpoints,
    latest_checkpoint,
    open_checkpoint,
    save_checkpoint,
    set_aside,
    update_state,
)
from megdet.run_folder.folder import RunFolder
from run_folders import load_checkpoint
from small_runs import run_state

TENSORS: dict[Kind, dict[str, torch.Tensor]] = {
    "model": {"weight": torch.arange(6.0).reshape(2, 3)},
    "optimizer": {"momentum": torch.ones(2)},
}


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run").create()


def save(folder, step, keep=3, tensors=TENSORS, **known):
    return save_checkpoint(folder, run_state(step, **known), tensors, keep)


def steps(folder):
    return [checkpoint_step(path) for path in checkpoints(folder)]


def names_in(folder):
    return sorted(path.name for path in folder.checkpoints.iterdir())


def test_a_checkpoint_gives_back_tensors_and_state_bit_by_bit(folder):
    model = {
        "double": torch.randn(3, 4, dtype=torch.float64),
        "half": torch.randn(5).to(torch.bfloat16),
        "not finite": torch.tensor([math.nan, math.inf, -0.0]),
        "count": torch.tensor(7),
        "mask": torch.tensor([True, False]),
        "empty": torch.empty(0, 4),
        "empty too": torch.empty(0, 4),
    }
    known = {
        "class_names": ("猫", "é", "a"),
        "data": "a hash",
        "evaluation": {"AP": 0.1 + 0.2},
        "evaluated_step": 9,
    }
    path = save(folder, 123, tensors={"model": model, "averages": {}}, **known)
    assert path == folder.checkpoints / "step_00000123"
    tensors, state = load_checkpoint(path)
    assert state == run_state(123, **known)
    assert set(tensors) == {"model", "averages"}
    for name, tensor in model.items():
        assert tensors["model"][name].dtype == tensor.dtype
        assert torch.equal(tensors["model"][name].nan_to_num(5), tensor.nan_to_num(5)), name


OLDER = """{"format": 2, "tensors": {"model": "87efb554fef01a9836e0bbab0dc4ebcc12a6655dea16a9d49e015be985c6f843"},
"state": {"step": 3, "class_names": ["a", "é"], "category_ids": [1, 2], "num_images": 5, "data": "", "evaluation":
{"z": 0.25, "a": {"y": 1, "b": null}}, "evaluated_step": 3, "best_score": 0.25, "best_step": 3, "roll_backs": 0,
"rolled_back_to": -1},
"check": "3fc417889adbf3314aa59ae8d3c19a3af3962b7a551571aaca77d4bf91bae88c"}"""
"""A state.json that megdet wrote before the state had a fingerprint of the validation data."""


def test_a_checkpoint_of_an_older_megdet_is_whole(folder):
    path = save(folder, 3)
    (path / "state.json").write_text(OLDER, encoding="utf-8")
    state = open_checkpoint(path).state
    assert (state.class_names, state.best_score, state.val_data) == (("a", "é"), 0.25, "")
    update_state(path, state)
    assert open_checkpoint(path).state == state
    for wrong in (OLDER.replace('"y": 1', '"y": 2'), OLDER.replace('"data": "", ', "")):
        (path / "state.json").write_text(wrong, encoding="utf-8")
        with pytest.raises(InputError, match="its SHA-256 differs"):
            open_checkpoint(path)


def test_shared_and_channels_last_tensors_and_views_are_stored(folder):
    images = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    flat = torch.randn(10, requires_grad=True)
    model = {"a": images, "b": images, "first": flat[:4], "all": flat, "transposed": torch.randn(3, 4).T}
    tensors, _ = load_checkpoint(save(folder, 1, tensors={"model": model}))
    assert set(tensors["model"]) == set(model)
    for name, tensor in model.items():
        assert torch.equal(tensors["model"][name], tensor), name


def test_tensor_files_have_the_permissions_of_any_new_file(folder, tmp_path):
    (tmp_path / "new").write_text("")
    assert (save(folder, 1) / "model.safetensors").stat().st_mode == (tmp_path / "new").stat().st_mode


def test_the_oldest_checkpoints_are_deleted(folder):
    for step in (5, 9, 10, 100_000_000):
        save(folder, step, keep=2)
    assert steps(folder) == [10, 100_000_000]
    assert latest_checkpoint(folder) == folder.checkpoints / "step_100000000"


def test_spared_checkpoints_stay_beside_those_that_are_kept(folder):
    for step in (1, 2, 3, 4):
        save_checkpoint(folder, run_state(step), TENSORS, 1, spared=[2, 3])
    assert steps(folder) == [2, 3, 4]
    delete_old_checkpoints(folder, 1, spared=[3])
    assert steps(folder) == [3, 4]
    delete_old_checkpoints(folder, 5)
    assert steps(folder) == [3, 4]


def test_a_state_is_read_without_the_tensors(folder):
    path = save(folder, 3, num_images=5)
    (path / "model.safetensors").unlink()
    assert open_checkpoint(path).state == run_state(3, num_images=5)


def test_a_state_is_replaced_and_the_tensors_stay(folder):
    path = save(folder, 3)
    update_state(path, run_state(3, evaluated_step=3))
    tensors, state = load_checkpoint(path)
    assert state.evaluated_step == 3
    assert torch.equal(tensors["model"]["weight"], TENSORS["model"]["weight"])


def test_a_run_that_went_back_leaves_no_checkpoints_of_its_abandoned_future(folder):
    for step in (10, 20, 30, 15):
        save(folder, step, keep=5)
    assert steps(folder) == [10, 15]


def test_saving_a_step_again_replaces_it(folder):
    save(folder, 5, num_images=1)
    save(folder, 5, num_images=2)
    assert load_checkpoint(folder.checkpoints / "step_00000005")[1].num_images == 2
    assert names_in(folder) == ["step_00000005"]


def undeletable(monkeypatch, *names):
    """Folders of these names cannot be deleted, as those of another user."""
    real = shutil.rmtree

    def rmtree(path, ignore_errors=False):
        if path.name in names and not ignore_errors:
            raise PermissionError(13, "Permission denied", str(path))
        if path.name not in names:
            real(path, ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", rmtree)


@pytest.mark.parametrize("kind", ["old", "later", "replaced"])
def test_a_checkpoint_that_cannot_be_deleted_is_told_of_once_and_costs_no_other(folder, monkeypatch, kind):
    saved = {"old": (1, 2), "later": (1, 9), "replaced": (1, 3)}[kind]
    for step in saved:
        save(folder, step, keep=5)
    left = {"old": "deleted_step_00000001", "later": "deleted_step_00000009", "replaced": "replaced_step_00000003"}[
        kind
    ]
    undeletable(monkeypatch, f".unfinished_{left}")
    with pytest.raises(LeftBehindError, match=rf"\(Permission denied\): delete .*\.unfinished_{left} yourself"):
        save(folder, 3, keep=1, num_images=7)
    assert steps(folder) == [3]
    assert load_checkpoint(folder.checkpoints / "step_00000003")[1].num_images == 7
    for step in (4, 5):
        save(folder, step, keep=1)
    assert names_in(folder) == [f".unfinished_{left}", "step_00000005"]
    monkeypatch.undo()
    save(folder, 6, keep=1)
    assert names_in(folder) == ["step_00000006"]


def test_a_hidden_name_that_is_taken_costs_no_save(folder, monkeypatch):
    """The same steps are saved, abandoned and replaced again and again, and nothing hidden can be deleted."""
    later, replaced, unfinished = "deleted_step_00000004", "replaced_step_00000003", "step_00000003"
    hidden = [f".unfinished_{name}{number}" for name in (later, replaced) for number in ("", "_2")]
    (folder.checkpoints / f".unfinished_{unfinished}").mkdir(parents=True)
    with monkeypatch.context() as patches:
        undeletable(patches, *hidden, f".unfinished_{unfinished}")
        save(folder, 3)
        for images in (1, 2):
            save(folder, 4)
            with pytest.raises(LeftBehindError):
                save(folder, 3, num_images=images)
        assert load_checkpoint(folder.checkpoints / "step_00000003")[1].num_images == 2
        assert names_in(folder) == sorted([*hidden, f".unfinished_{unfinished}", "step_00000003"])
    save(folder, 5)
    assert names_in(folder) == ["step_00000003", "step_00000005"], "all of them are found once they can be deleted"


def test_a_folder_without_checkpoints_has_no_latest(tmp_path, folder):
    assert latest_checkpoint(folder) is None
    assert latest_checkpoint(RunFolder(tmp_path / "missing")) is None
    (folder.checkpoints / "notes").mkdir()
    (folder.checkpoints / "step_00000009").write_text("a file is no checkpoint")
    assert latest_checkpoint(folder) is None


@pytest.mark.parametrize("step", [5, 6])
def test_a_save_that_fails_at_the_last_moment_leaves_the_checkpoints_as_they_were(folder, monkeypatch, step):
    save(folder, 5, keep=1, num_images=1)
    rename = Path.rename

    def full(self, target):
        if self.name == f".unfinished_step_{step:08d}":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(InputError, match="cannot be written: No space left on device"):
        save(folder, step, keep=1, num_images=2)
    assert names_in(folder) == ["step_00000005"]
    assert load_checkpoint(folder.checkpoints / "step_00000005")[1].num_images == 1


def test_a_process_killed_while_it_saves_loses_nothing_and_the_next_save_cleans_up(folder):
    save(folder, 5)
    script = f"""
import os, pathlib, signal, torch
from megdet.run_folder.checkpoint_files import save_checkpoint
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.run_state import RunState
pathlib.Path.rename = lambda self, target: os.kill(os.getpid(), signal.SIGKILL)
state = RunState(step=6, class_names=(), category_ids=(), num_images=0)
save_checkpoint(RunFolder({str(folder.path)!r}), state, {{"model": {{"w": torch.ones(3)}}}}, 3)
"""
    killed = subprocess.run([sys.executable, "-c", script], check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert killed.returncode == -signal.SIGKILL
    assert names_in(folder) == [".unfinished_step_00000006", "step_00000005"]
    assert latest_checkpoint(folder) == folder.checkpoints / "step_00000005"
    save(folder, 7)
    assert names_in(folder) == ["step_00000005", "step_00000007"]


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", [cut, Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_damaged_checkpoint_is_refused_with_the_file_and_the_way_out(folder, file, damage):
    path = save(folder, 5)
    damage(path / file)
    with pytest.raises(InputError, match=f"{file}.*delete the folder .*step_00000005") as refused:
        load_checkpoint(path)
    assert "\n" not in str(refused.value)


def test_a_tensor_file_of_another_checkpoint_is_refused(folder):
    other = {"model": TENSORS["model"], "optimizer": {"momentum": torch.ones(2) + 1}}
    older, newer = save(folder, 4, tensors=other), save(folder, 5)
    shutil.copy(older / "optimizer.safetensors", newer / "optimizer.safetensors")
    with pytest.raises(
        InputError, match=r"optimizer\.safetensors is not what was saved, its SHA-256 .*delete the folder"
    ):
        load_checkpoint(newer)
    assert open_checkpoint(newer).tensors("model").keys() == {"weight"}, "the others are what they were"


def test_one_flipped_bit_is_noticed(folder):
    path = save(folder, 5)
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"model\.safetensors is not what was saved"):
        load_checkpoint(path)


def test_a_state_that_reads_well_and_is_not_what_was_saved_is_noticed(folder):
    path = save(folder, 5, num_images=1)
    text = (path / "state.json").read_text()
    (path / "state.json").write_text(text.replace('"num_images": 1', '"num_images": 7'))
    with pytest.raises(DamagedError, match=r"state\.json is not what was saved, its SHA-256 differs"):
        open_checkpoint(path)
    update_state(save(folder, 6), run_state(6, evaluated_step=6))
    assert open_checkpoint(folder.checkpoints / "step_00000006").state.evaluated_step == 6


def test_a_damaged_checkpoint_that_is_set_aside_is_none_any_more(folder):
    save(folder, 4)
    for _ in range(2):  # the second replaces the first
        assert names_in(folder) in (["step_00000004"], ["damaged_step_00000005", "step_00000004"])
        aside = set_aside(save(folder, 5))
        assert aside.name == "damaged_step_00000005"
        assert latest_checkpoint(folder) == folder.checkpoints / "step_00000004"


def of(**changes):
    """state.json with some values of its state changed, or taken away."""
    state = {**msgspec.to_builtins(run_state(5)), **changes}
    state = {key: value for key, value in state.items() if value != "away"}
    return json.dumps({"format": 2, "tensors": {"model": "00", "optimizer": "00"}, "state": state})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "expected object, got array"),
        ("{}", "missing required field format"),
        ('{"format": 2}', "missing required field tensors"),
        ('{"format": 2, "tensors": 3, "state": {}}', "tensors: expected object, got int, here stands 3"),
        ('{"format": 2, "tensors": {"../../x": "00"}, "state": {}}', r"invalid enum value '\.\./\.\./x'"),
        (of(step=6), "is of step 6"),
        (of(step=5.0), r"state\.step: expected int, got float, here stands 5\.0"),
        (of(step="5"), "expected int, got str"),
        (of(step=-5), "expected int >= 0, here stands -5"),
        (of(num_images="away"), "missing required field num_images"),
        (of(class_names="bolt"), r"state\.class_names: expected array, got str"),
        (of(class_names=["bolt"]), "1 class names and 3 category ids"),
        (of(surplus=1), "unknown field surplus"),
        ("[" * 100_000, "expected object, got array"),
    ],
)
def test_a_state_of_another_format_or_of_wrong_types_is_refused_in_one_line(folder, content, message):
    path = save(folder, 5)
    (path / "state.json").write_text(content)
    with pytest.raises(InputError, match=rf"state\.json.*{message}.*delete the folder") as refused:
        open_checkpoint(path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("number", "mend"), [(4, "update megdet"), (1, "go on with the version that began the run")])
def test_a_checkpoint_of_another_megdet_is_not_called_damaged(folder, number, mend):
    path = save(folder, 5)
    (path / "state.json").write_text(f'{{"format": {number}, "state": [], "tensors": "elsewhere"}}')
    with pytest.raises(
        InputError, match=rf"state\.json has format {number}, this megdet reads 2 and 3: {mend}$"
    ) as refused:
        open_checkpoint(path)
    assert not isinstance(refused.value, DamagedError)


def test_a_missing_checkpoint_is_refused(folder):
    with pytest.raises(InputError, match="there is no checkpoint"):
        load_checkpoint(folder.checkpoints / "step_00000001")


def test_a_run_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        save(RunFolder(tmp_path / "run"), 5)


def test_keeping_no_checkpoint_is_a_bug(folder):
    with pytest.raises(ValueError, match="keep must be at least 1"):
        save(folder, 5, keep=0)
