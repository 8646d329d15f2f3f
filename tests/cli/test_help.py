"""What `--help` says: true, and no more than the verb has to do with."""

import re

import pytest

from megdet.cli.main import VERBS, main
from megdet.contract.chaos import chaos
from megdet.contract.verify import DEVICES, STEPS
from megdet.distributed.world import DEFAULT_TIMEOUT
from megdet.planning.measured_steps import TIMED_SECONDS, TIMED_STEPS
from megdet.recipe_file import recipe_keys
from megdet.studies.gradients.variance import FACTORS
from megdet.studies.rates.trial import AFTER_WARMUP

BUILD_A_RECIPE = {"train", "describe", "lr-test", "plan", "verify", "chaos"}
CHANGE_A_RECIPE = {
    "audit",
    "reproduce",
    "replay",
    "demo",
    "import",
    "evaluate",
    "detect",
    "export",
    "serve",
    "submit",
    "analyse variance",
}


def printed_help(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main([*words.split(), "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


OPTIONS_LIKE_KEYS = {"audit": {"seed"}}
"""Options of verbs that cannot change the key of this name."""


def in_one_line(text: str) -> str:
    return " ".join(text.split())


def test_the_program_lists_every_verb_with_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    text = in_one_line(printed_help("", capsys))
    assert all(f" {name} {verb.help} " in f"{text} " for name, verb in VERBS.items())


@pytest.mark.parametrize("verb", sorted({*VERBS, "analyse variance", "analyse sampling", "data check"}))
def test_only_a_verb_that_builds_a_recipe_explains_the_keys(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed_help(verb, capsys)
    explained = set(re.findall(r"(?m)^  --([a-z0-9_.]+) ", text)) & set(recipe_keys())
    assert explained == (set(recipe_keys()) if verb in BUILD_A_RECIPE else OPTIONS_LIKE_KEYS.get(verb, set()))
    assert text.count("docs/recipe.md") == (verb in BUILD_A_RECIPE | CHANGE_A_RECIPE)


def test_the_keys_stand_in_sections_behind_the_options_of_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed_help("train", capsys)
    order = ["--run FOLDER", "--lane-width K", "--device cpu|cuda", "Every key of the recipe", "--batch_size"]
    order += ["Where the images are", "--data.train_annotations", "--model.backbone.", "--model.fpn.", "--evaluation."]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    assert "CONFIG" not in text


def test_the_defaults_that_the_help_names_are_those_of_the_functions(capsys: pytest.CaptureFixture[str]) -> None:
    verify, plan = in_one_line(printed_help("verify", capsys)), in_one_line(printed_help("plan", capsys))
    assert f"each is compared with the first, default {','.join(map(str, DEVICES))} " in verify
    assert f"of a run, default {STEPS} " in verify
    assert f"of each kind, in {TIMED_SECONDS:.0f} seconds at most; default {TIMED_STEPS} " in plan
    variance = in_one_line(printed_help("analyse variance", capsys))
    assert f"of k x N images, default {','.join(map(str, FACTORS))} " in variance
    test = in_one_line(printed_help("lr-test", capsys))
    assert f"rate of a stability run, default {AFTER_WARMUP} " in test
    disturbed = in_one_line(printed_help("chaos", capsys))
    assert f"signals to send, default {chaos.KILLS} " in disturbed
    assert f"number of ranks, default {','.join(map(str, chaos.DEVICES))};" in disturbed
    assert f"waits for another one, default {chaos.TIMEOUT.total_seconds() / 60:g} " in disturbed
    assert f"waits for another one, default {DEFAULT_TIMEOUT.total_seconds() / 60:.0f}" in test
