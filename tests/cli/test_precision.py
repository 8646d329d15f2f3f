"""Which arithmetic a verb computes in, on machines whose speeds are made up."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cli_runs import OVERRIDES, TinyData, make_data
from megdet import runtime
from megdet.api import runs
from megdet.cli.main import main
from megdet.cli.results import overrides_here
from megdet.distributed.local_ranks import run_in_ranks
from megdet.distributed.world import World
from megdet.errors import InputError
from megdet.recipe import Recipe
from megdet.recipe_file import load_recipe
from megdet.run_folder.folder import RunFolder

Pretend = Callable[..., list[torch.dtype]]
SLOW, QUICK = {"float32": 0.001, "bfloat16": 0.002}, {"float32": 0.002, "bfloat16": 0.001}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in bfloat16."""
    folder = tmp_path_factory.mktemp("runs") / "a"
    options = [*data.options, *OVERRIDES, "--model.box_head.score_threshold", "0.0", "--precision", "bfloat16"]
    assert main(["train", "demo", "--run", str(folder), "--device", "cpu", *options]) == 0
    return folder


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """The recipes that would be trained; training itself is refused."""
    recipes = []

    def stop(recipe: Recipe, *_: Any) -> None:
        recipes.append(recipe)
        raise InputError("enough")

    monkeypatch.setattr(runs, "train_recipe", stop)
    return recipes


def test_the_demo_trains_in_what_is_faster_and_says_the_figures(
    trained: list[Recipe], pretend_speeds: Pretend, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["demo", "--device", "cpu", "--run", str(tmp_path / "run")]
    for speeds in (SLOW, QUICK):
        pretend_speeds(**speeds)
        assert main(words) == 2
    assert [recipe.precision for recipe in trained] == ["float32", "bfloat16"]
    pattern = r"Training in (\w+): .* reach (\S+) GFLOP/s in float32, (\S+) in bfloat16 here\."
    lines = [re.fullmatch(pattern, line) for line in capsys.readouterr().out.splitlines()]
    chosen = [(line[1], float(line[2]) / float(line[3])) for line in lines if line]
    assert chosen == [("float32", pytest.approx(2, rel=0.1)), ("bfloat16", pytest.approx(1 / 2, rel=0.1))]


def test_a_demo_goes_on_in_the_precision_that_it_began_with(
    trained: list[Recipe], pretend_speeds: Pretend, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.yaml").write_text("precision: bfloat16\n")
    pretend_speeds(**SLOW)
    assert main(["demo", "--device", "cpu", "--run", str(tmp_path / "run")]) == 2
    assert [recipe.precision for recipe in trained] == ["bfloat16"]


@pytest.mark.parametrize("words", [["demo"], ["train", "demo"]])
def test_a_precision_that_is_asked_for_stays_with_a_warning_where_it_is_slow(
    words: list[str],
    trained: list[Recipe],
    pretend_speeds: Pretend,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [*words, "--device", "cpu", "--run", str(tmp_path / "run"), "--precision", "bfloat16"]
    pretend_speeds(**SLOW)
    assert main(words) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("Warning: this machine is slow at bfloat16, ")
    assert " GFLOP/s in float32, " in line
    pretend_speeds(**QUICK)
    assert main(words) == 2
    assert capsys.readouterr().out == ""
    assert [recipe.precision for recipe in trained] == ["bfloat16"] * 2


@pytest.mark.parametrize("verb", ["detect", "evaluate"])
def test_a_run_in_bfloat16_detects_in_float32_where_bfloat16_is_slow(
    verb: str, run: Path, data: TinyData, pretend_speeds: Pretend, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [verb, str(run), *([str(data.val_images)] if verb == "detect" else []), "--workers", "0", "--device", "cpu"]

    def found(name: str, speeds: dict[str, float], *more: str) -> bytes:
        pretend_speeds(**speeds)
        assert main([*words, "--out", str(tmp_path / name), *more]) == 0
        return (tmp_path / name / "detections.json").read_bytes()

    asked = {name: found(name, QUICK, "--precision", name) for name in ("bfloat16", "float32")}
    assert asked["bfloat16"] != asked["float32"]
    assert found("quick", QUICK) == asked["bfloat16"]
    assert "float32" not in capsys.readouterr().out.replace(str(tmp_path), "").replace("/float32/", "")
    assert found("slow", SLOW) == asked["float32"]
    lines = [line for line in capsys.readouterr().out.splitlines() if "GFLOP/s in float32" in line]
    assert len(lines) == 1
    assert "in float32" in lines[0]
    assert found("kept", SLOW, "--precision", "bfloat16") == asked["bfloat16"]


def _choose(world: World, folder: str) -> tuple[dict[str, str], bool]:
    """What a rank computes in where bfloat16 seems slow to rank 0 and quick to the others."""
    speeds = SLOW if world.is_first else QUICK
    runtime._seconds = lambda run, _: speeds[str(run().dtype).removeprefix("torch.")]
    return overrides_here({}, RunFolder(folder), world), bool(runtime.slow_at("bfloat16", world.device))


@pytest.mark.distributed
def test_all_ranks_choose_what_the_first_one_measures(run: Path) -> None:
    assert load_recipe(str(run / "recipe.yaml")).precision == "bfloat16"
    chosen = run_in_ranks(_choose, 2, str(run))
    assert chosen == [({"precision": "float32"}, True), ({"precision": "float32"}, False)]
