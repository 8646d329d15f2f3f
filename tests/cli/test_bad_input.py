"""What a user can do wrong: one clear line on standard error, exit code 2, nothing lost."""

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cli_runs import OVERRIDES, TinyData, make_data
from megdet.cli.main import main
from megdet.run_folder.folder import RunFolder
from megdet.training import run as run_module

Refused = Callable[..., str]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished_run(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "a"
    assert main(["train", "demo", "--run", str(run), *data.options, *OVERRIDES]) == 0
    return run


def test_missing_annotations_are_refused_before_a_run_folder_is_made(tmp_path: Path, refused: Refused) -> None:
    run = tmp_path / "run"
    line = refused("train", "megdet-r50", "--run", run, "--data.train_annotations", tmp_path / "none.json")
    assert "none.json" in line
    assert not run.exists()


def test_a_wrong_image_folder_is_refused_with_how_many_are_missing(
    data: TinyData, tmp_path: Path, refused: Refused
) -> None:
    line = refused("train", "demo", "--run", tmp_path / "run", *data.options, "--data.train_images", tmp_path)
    assert str(tmp_path) in line
    assert "24" in line


def test_corrupt_json_is_refused_with_its_line(data: TinyData, tmp_path: Path, refused: Refused) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text('{"images": [\n{"id": 1,, }]}')
    line = refused("train", "demo", "--run", tmp_path / "run", *data.options, "--data.train_annotations", broken)
    assert "broken.json" in line
    assert "line 2" in line


def test_too_few_images_for_one_mini_batch_are_refused(data: TinyData, tmp_path: Path, refused: Refused) -> None:
    line = refused(
        "train", "demo", "--run", tmp_path / "run", *data.options, *OVERRIDES, "--batch_size", 32, "--bn_size", 32
    )
    assert "24 images" in line
    assert "mini-batch of 32" in line


def test_data_without_any_box_is_refused(data: TinyData, tmp_path: Path, refused: Refused) -> None:
    content = json.loads(data.train.read_text())
    content["annotations"] = []
    empty = tmp_path / "empty.json"
    empty.write_text(json.dumps(content))
    options = [*data.options, "--data.train_annotations", empty, "--data.keep_empty_images", "true"]
    assert "no image has a box" in refused("train", "demo", "--run", tmp_path / "run", *options, *OVERRIDES)


def test_a_class_without_boxes_is_a_warning_of_the_check_and_can_be_trained_on(
    data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads(data.train.read_text())
    content["categories"].append({"id": 99, "name": "unicorn"})
    more = tmp_path / "more.json"
    more.write_text(json.dumps(content))
    assert main(["data", "check", str(more), str(data.train_images)]) == 0
    assert "unicorn" in capsys.readouterr().out
    options = [*data.options, "--data.train_annotations", str(more)]
    assert main(["train", "demo", "--run", str(tmp_path / "run"), *options, *OVERRIDES]) == 0


def test_a_class_that_only_the_validation_set_has_is_refused(data: TinyData, tmp_path: Path, refused: Refused) -> None:
    content = json.loads(data.val.read_text())
    content["categories"][0]["name"] = "unicorn"
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content))
    options = [*data.options, "--data.val_annotations", other]
    assert "'unicorn'" in refused("train", "demo", "--run", tmp_path / "run", *options, *OVERRIDES)


def test_a_run_folder_of_another_recipe_is_refused_with_the_first_difference(
    data: TinyData, finished_run: Path, refused: Refused
) -> None:
    before = (finished_run / "recipe.yaml").read_bytes()
    line = refused("train", "demo", "--run", finished_run, *data.options, *OVERRIDES, "--seed", 9)
    assert "seed: 9 here, 0 there" in line
    assert (finished_run / "recipe.yaml").read_bytes() == before


def test_a_run_folder_that_cannot_be_written_is_refused(data: TinyData, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "file").write_text("in the way")
    line = refused("train", "demo", "--run", tmp_path / "file" / "run", *data.options, *OVERRIDES)
    assert "cannot be written" in line


def test_evaluating_no_run_is_refused(tmp_path: Path, refused: Refused) -> None:
    assert "not a run folder" in refused("evaluate", tmp_path)


def test_a_checkpoint_of_another_architecture_is_refused_with_the_tensor(
    finished_run: Path, tmp_path: Path, refused: Refused
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "copy")
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("channels: 16", "channels: 24"))
    line = refused("evaluate", run)
    assert "fpn.lateral.0.0.weight" in line
    assert "architecture" in line


def test_a_damaged_checkpoint_is_refused_with_its_file(finished_run: Path, tmp_path: Path, refused: Refused) -> None:
    run = shutil.copytree(finished_run, tmp_path / "copy")
    weights = max((run / "checkpoints").iterdir()) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert str(weights) in refused("evaluate", run)


def test_detecting_on_a_missing_image_is_refused(finished_run: Path, tmp_path: Path, refused: Refused) -> None:
    assert "no such file" in refused("detect", finished_run, tmp_path / "none.jpg")


def test_detecting_on_a_broken_image_is_refused_with_its_name(
    finished_run: Path, tmp_path: Path, refused: Refused
) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"not a picture")
    assert "broken.jpg" in refused("detect", finished_run, tmp_path / "broken.jpg")


def test_an_image_that_breaks_during_training_stops_the_run_with_its_name(
    data: TinyData, tmp_path: Path, refused: Refused
) -> None:
    images = shutil.copytree(data.train_images, tmp_path / "images")
    victim = sorted(images.iterdir())[3]
    victim.write_bytes(victim.read_bytes()[:700])
    options = [*data.options, "--data.train_images", images]
    line = refused("train", "demo", "--run", tmp_path / "run", *options, *OVERRIDES, "--workers", 1)
    assert victim.name in line


def test_evaluating_files_needs_both(tmp_path: Path, refused: Refused) -> None:
    assert "--detections" in refused("evaluate", "--ground-truth", tmp_path / "a.json")


def test_weights_of_another_model_are_refused(data: TinyData, tmp_path: Path, refused: Refused) -> None:
    save_file({"a.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    options = [*data.options, *OVERRIDES, "--model.backbone.weights", tmp_path / "other.safetensors"]
    assert "another model" in refused("train", "demo", "--run", tmp_path / "run", *options)


def test_importing_something_else_is_refused(tmp_path: Path, refused: Refused) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    line = refused("import", "torchvision", tmp_path / "other.pth", "--run", tmp_path / "run")
    assert "other.pth" in line
    assert not (tmp_path / "run").exists()


def test_a_data_set_with_fatal_problems_fails_the_check(
    data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads(data.train.read_text())
    content["annotations"][0]["category_id"] = 77
    content["annotations"][1]["bbox"][2] = 0
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps(content))
    assert main(["data", "check", str(bad), str(data.train_images)]) == 2
    printed = capsys.readouterr()
    fatal = next(line for line in printed.out.splitlines() if line.startswith("fatal"))
    assert str(content["annotations"][0]["id"]) in fatal
    assert "77" in fatal
    assert "1 fatal problem" in printed.err


def test_a_broken_validation_image_does_not_cost_the_epoch_and_is_made_up_for(
    data: TinyData, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = shutil.copytree(data.val_images, tmp_path / "val")
    victim = sorted(images.iterdir())[2]
    whole = victim.read_bytes()
    run = tmp_path / "run"
    options = [*data.options, "--data.val_images", str(images), *OVERRIDES]
    step = run_module.train_step

    def break_and_step(*arguments: Any) -> Any:
        victim.write_bytes(whole[: len(whole) * 3 // 4])
        return step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "train_step", break_and_step)
        assert victim.name in refused("train", "demo", "--run", run, *options)
    assert "take the image out of" in refused("train", "demo", "--run", run, *options), "found before work starts"
    assert [path.name for path in (run / "checkpoints").iterdir() if path.is_dir()] == ["step_00000003"]
    assert not (run / "evaluation.json").exists()
    victim.write_bytes(whole)
    assert main(["train", "demo", "--run", str(run), *options]) == 0
    assert (run / "evaluation.json").is_file()


def test_a_second_start_in_the_same_run_folder_is_refused(finished_run: Path, data: TinyData, refused: Refused) -> None:
    with closing(RunFolder(finished_run).lock()):
        line = refused("train", "demo", "--run", finished_run, *data.options, *OVERRIDES)
    assert "another process" in line


def test_brackets_in_names_are_names(data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "a [bold] run [/1]"
    assert main(["train", "demo", "--run", str(run), *data.options, *OVERRIDES]) == 0
    assert str(run) in capsys.readouterr().out


def test_a_set_of_crowds_alone_is_refused(data: TinyData, tmp_path: Path, refused: Refused) -> None:
    content = json.loads(data.train.read_text())
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1
    crowds = tmp_path / "crowds.json"
    crowds.write_text(json.dumps(content))
    options = [*data.options, "--data.train_annotations", crowds, "--data.keep_empty_images", "true"]
    assert "no image has a box" in refused("train", "demo", "--run", tmp_path / "run", *options, *OVERRIDES)


def test_weights_of_a_detector_with_other_anchors_are_refused_with_the_key(
    finished_run: Path, data: TinyData, tmp_path: Path, refused: Refused
) -> None:
    options = [
        *data.options,
        *OVERRIDES,
        "--start_from",
        str(finished_run),
        "--model.anchors.sizes",
        "[4, 8, 16, 32, 64]",
    ]
    assert "anchors.sizes" in refused("train", "demo", "--run", tmp_path / "run", *options)


def test_one_unreadable_picture_does_not_keep_detect_from_the_others(
    finished_run: Path, data: TinyData, tmp_path: Path, refused: Refused
) -> None:
    images = shutil.copytree(data.val_images, tmp_path / "in")
    (images / "000000.jpg").write_bytes(b"not a picture")
    line = refused("detect", finished_run, images, "--out", tmp_path / "out")
    assert "1 of 4 images could not be read" in line
    assert "000000.jpg" in line
    assert len(list((tmp_path / "out").glob("*.png"))) == 3
    assert (tmp_path / "out/detections.json").is_file()


def test_detect_refuses_what_it_would_do_nothing_with(
    finished_run: Path, data: TinyData, tmp_path: Path, refused: Refused
) -> None:
    assert "'30' is not between 0 and 1" in refused("detect", finished_run, data.val_images, "--score", "30")
    shutil.copytree(data.val_images, tmp_path / "in" / "val")
    line = refused("detect", finished_run, tmp_path / "in")
    assert "no image in this folder; name a folder that has some, such as" in line
    assert line.rstrip().endswith("in/val")
    (tmp_path / "broken.jpg").write_bytes(b"not a picture")
    assert "1 of 1 images could not be read" in refused(
        "detect", finished_run, tmp_path / "broken.jpg", "--out", tmp_path / "out"
    )
    assert not (tmp_path / "out").exists()  # not an empty file in the place of an earlier one


def test_a_file_of_a_run_is_answered_with_its_folder(finished_run: Path, data: TinyData, refused: Refused) -> None:
    line = refused("detect", finished_run / "recipe.yaml", data.val_images)
    assert line.rstrip().endswith(f"not a run folder, it has no recipe.yaml; did you mean {finished_run}?")


def test_maps_too_small_for_batch_norm_are_refused(data: TinyData, tmp_path: Path, refused: Refused) -> None:
    options = [*data.options, *OVERRIDES, "--batch_size", 1, "--bn_size", 1]
    small = ["--data.short_edges", "[32]", "--data.max_long_edge", 32]
    assert "no variance" in refused("train", "demo", "--run", tmp_path / "run", *options, *small)
