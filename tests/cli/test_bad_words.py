"""Words of the command line that cannot be meant: verbs, recipes, options, keys. One line, exit code 2."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megdet.cli.main import main

Refused = Callable[..., str]


def test_an_unknown_verb_is_refused_with_the_nearest(refused: Refused) -> None:
    assert "did you mean 'train'?" in refused("trian", "demo")


def test_no_verb_is_refused_with_the_list(refused: Refused) -> None:
    assert "evaluate" in refused()


def test_an_unknown_recipe_is_refused_with_the_nearest(refused: Refused) -> None:
    assert "did you mean 'bccd'?" in refused("train", "bcd")


def test_an_unknown_key_on_the_command_line_is_refused_with_the_nearest(refused: Refused) -> None:
    assert "did you mean 'model.fpn.channels'?" in refused("train", "demo", "--model.fpn.chanels", "3")


def test_an_unknown_key_in_a_file_is_refused_with_the_nearest(tmp_path: Path, refused: Refused) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("optimizer: {base_rl: 0.1}")
    line = refused("train", recipe)
    assert "mine.yaml" in line
    assert "did you mean 'optimizer.base_lr'?" in line


def test_keys_may_stand_before_the_recipe(refused: Refused, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no recipe 'nothing'" in refused("describe", "--optimizer.kind", "adamw", "--batch_size", "8", "nothing")
    assert main(["describe", "--batch_size", "8", "--bn_size=4", "megdet-r50", "--devices", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["batch_size"] == 8
    assert "unknown option '--batch-size'; did you mean 'batch_size'?" in refused(
        "describe", "--batch-size", "8", "demo"
    )
    assert "unknown option '--bogus'" in refused("describe", "--bogus", "8", "demo")
    assert "unknown option '--bogus'" in refused("describe", "--bogus=8", "demo")
    assert "unknown option '--bogus'" in refused("train", "--bogus", "demo"), "not: RECIPE is missing"
    assert "unknown option '--model.bogus'" in refused("describe", "--model.bogus", "8", "demo")
    for word, option in {"workrs": "workers", "devcie": "device", "timeut": "timeout"}.items():
        assert f"unknown option '--{word}'; did you mean '--{option}'?" in refused("train", f"--{word}", "1", "demo")
    assert "'--model' is a section of the recipe: name a key in it, such as --model.kind" in refused(
        "train", "--model", "x", "demo"
    )
    assert "no recipe '--demo'" in refused("describe", "--", "--demo")
    assert "--batch_size' needs a value" in refused("describe", "demo", "--batch_size")
    assert "recipe verify: batch_size is 0" in refused(
        "verify", "--batch_size", "0", "--cases", "base", "--devices", "1,2"
    )


@pytest.mark.parametrize("verb", [("describe",), ("plan", "--devices", "1")])
def test_what_only_a_new_run_is_refused_is_not_described_or_planned(refused: Refused, verb: tuple[str, ...]) -> None:
    flat = "--model.anchors.sizes", "[0.5,1,2,4,8]", "--model.anchors.whole_pixels", "true"
    assert "would have no area in whole pixels: set it false" in refused(*verb, "demo", *flat)


def test_a_wrong_type_is_refused_with_its_key(refused: Refused) -> None:
    line = refused("describe", "demo", "--batch_size", "many")
    assert "batch_size" in line
    assert "many" in line


def test_an_option_without_a_value_is_refused(refused: Refused) -> None:
    assert "--model.fpn.channels" in refused("describe", "demo", "--model.fpn.channels")


def test_an_option_of_no_recipe_is_refused_where_a_verb_takes_none(refused: Refused) -> None:
    assert "--fast" in refused("data", "demo", "--fast", "yes")
    assert "unknown option '--json'; see `megdet completion --help`" in refused("completion", "bash", "--json")


def test_more_devices_than_images_are_refused(refused: Refused) -> None:
    assert "17 devices for a mini-batch of 16 images" in refused("describe", "demo", "--devices", "17")


def test_zero_devices_are_refused(refused: Refused) -> None:
    assert "device" in refused("describe", "demo", "--devices", "0")
