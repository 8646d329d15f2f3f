"""What a verb imports: counted, not timed, so that light verbs stay light."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cli_runs import TinyData, make_data
from megdet.cli.main import VERBS
from written_runs import write_run, write_validation_set

HEAVY = {"torch", "torchvision", "timm", "triton", "matplotlib", "wandb"}
_LOADED = """
import json, sys
from megdet.cli.main import main
try:
    code = main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code
print(json.dumps([code, sorted(sys.modules)]))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return make_data(tmp_path_factory.mktemp("data"))


def heavy_modules(*words: object, cwd: Path | None = None) -> set[str]:
    """The heavy packages that a command loads in a process of its own, in which it must succeed."""
    command = [sys.executable, "-c", _LOADED, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, cwd=cwd)
    assert done.returncode == 0, done.stderr
    code, modules = json.loads(done.stdout.splitlines()[-1])
    assert code == 0, done.stderr
    return HEAVY & set(modules)


@pytest.mark.parametrize("words", ["--help", "--version", "recipes", "recipes demo", "simulate", "simulate --paper"])
def test_a_verb_that_computes_nothing_loads_no_library_that_does(words: str, tmp_path: Path) -> None:
    assert heavy_modules(*words.split(), cwd=tmp_path) == set()


def test_describe_of_a_recipe_whose_data_is_not_here_loads_neither_torch_nor_pictures(tmp_path: Path) -> None:
    assert heavy_modules("describe", "megdet-r50", "--devices", 8, cwd=tmp_path) == set()


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_does_not_load_what_the_verb_computes_with(verb: str, tmp_path: Path) -> None:
    assert heavy_modules(verb, "--help", cwd=tmp_path) == set()


def test_checking_counting_and_converting_data_loads_neither_torch_nor_pictures(data: TinyData, tmp_path: Path) -> None:
    assert heavy_modules("data", "check", data.val, data.val_images) == set()
    assert heavy_modules("data", "stats", data.val, data.val_images) == set()
    voc = Path(__file__).parents[2] / "examples/voc"
    assert heavy_modules("data", "convert", "--from", "voc", voc, tmp_path / "out") == set()


def test_reporting_and_comparing_loads_neither_torch_nor_pictures(tmp_path: Path) -> None:
    annotations = write_validation_set(tmp_path, images=4)
    runs = [write_run(tmp_path / name, annotations, base_lr=rate).path for name, rate in (("a", 0.02), ("b", 0.04))]
    assert heavy_modules("report", *runs, "--resamples", 3) == set()
    assert heavy_modules("compare", *runs, "--resamples", 3) == set()


def test_what_a_verb_needs_is_loaded_when_it_is_called(data: TinyData) -> None:
    assert heavy_modules("data", "stats", data.val, data.val_images, "--picture", data.folder / "a.png") == {
        "matplotlib"
    }
    loaded = heavy_modules("describe", "demo", "--parameters")
    assert {"torch", "timm"} <= loaded
    assert not {"wandb", "matplotlib"} & loaded
