"""The verbs as a user calls them."""

import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import detectron2_reference
from cli_runs import OVERRIDES, TinyData, make_data
from data_factories import two_images, with_masks, write_set
from factories import SHARED_DATA
from megdet.cli.main import main
from megdet.recipe_file import dump_recipe, load_recipe
from megdet.run_folder.checkpoint_files import latest_checkpoint, open_checkpoint
from megdet.run_folder.folder import RunFolder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "a"
    options = [*data.options, *OVERRIDES, "--model.box_head.score_threshold", "0.0"]
    assert main(["train", "demo", "--run", str(folder), *options]) == 0
    return folder


@pytest.fixture
def run(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy for each test: some write into it, and tests have no order."""
    return shutil.copytree(trained, tmp_path_factory.mktemp("copy") / "a")


def test_the_checkpoint_holds_the_tensors_of_the_final_model(run: Path) -> None:
    newest = max((run / "checkpoints").iterdir())
    assert "fpn.lateral.0.0.weight" in load_file(newest / "model.safetensors")


def test_train_leaves_the_whole_run_folder(run: Path) -> None:
    assert {path.name for path in run.iterdir()} == {
        "recipe.yaml",
        "environment.json",
        "metrics.jsonl",
        "evaluation.json",
        "detections.json",
        "checkpoints",
        "ledger.jsonl",
        "image_digests.json",
        "pictures",
        "report.html",
    }
    assert {path.name for path in (run / "pictures").iterdir()} == {"course.png", "detections.png"}
    numbers = json.loads((run / "evaluation.json").read_text())
    assert list(numbers) == ["bbox"]
    assert set(numbers["bbox"]) == {*"AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split(), "per_class"}


def test_the_recipe_of_a_run_repeats_it(run: Path, data: TinyData, tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert main(["train", str(run / "recipe.yaml"), "--run", str(again), "--workers", "0"]) == 0
    assert (again / "recipe.yaml").read_bytes() == (run / "recipe.yaml").read_bytes()
    assert (again / "detections.json").read_bytes() == (run / "detections.json").read_bytes()
    complete = load_recipe(str(run / "recipe.yaml"))
    assert dump_recipe(complete) == (run / "recipe.yaml").read_text()


def test_evaluate_repeats_the_numbers_of_the_last_epoch(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = json.loads((run / "evaluation.json").read_text())
    assert main(["evaluate", str(run), "--out", str(tmp_path), "--workers", "0"]) == 0
    assert json.loads((tmp_path / "evaluation.json").read_text()) == before
    assert (tmp_path / "detections.json").read_bytes() == (run / "detections.json").read_bytes()
    printed = capsys.readouterr().out
    assert printed.index("mmAP") < printed.index("mmAR") < printed.index("AP50")


def test_evaluating_other_data_leaves_the_numbers_of_the_run_alone(run: Path, data: TinyData) -> None:
    before = (run / "evaluation.json").read_bytes()
    options = ["--data", str(data.train), str(data.train_images), "--workers", "0"]
    assert main(["evaluate", str(run), *options]) == 0
    assert (run / "evaluation.json").read_bytes() == before
    assert (run / "evaluations/train/evaluation.json").is_file()


def test_the_best_checkpoint_is_evaluated_and_drawn_beside_the_run(run: Path, data: TinyData, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in (run / "evaluation.json", run / "detections.json")}
    assert main(["evaluate", str(run / "checkpoints" / "best"), "--device", "cpu"]) == 0
    assert before == {path: path.read_bytes() for path in before}
    (folder,) = (run / "evaluations").glob("val-step-*")
    step = open_checkpoint(latest_checkpoint(RunFolder(run))).state.best_step
    assert folder.name == f"val-step-{step}"
    picture = next(data.folder.rglob("*.jpg"))
    words = ["detect", str(run / "checkpoints" / "best"), str(picture), "--out", str(tmp_path / "out")]
    assert main([*words, "--device", "cpu"]) == 0
    assert (tmp_path / "out" / "detections.json").is_file()


def test_detect_draws_all_kinds_of_pictures_and_writes_one_file(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    pixels = np.arange(64 * 48 * 3, dtype=np.uint32).reshape(48, 64, 3).astype(np.uint8)
    Image.fromarray(pixels[..., 0]).save(folder / "gray.png")
    Image.fromarray(pixels).convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 256).save(folder / "deep.png")
    Image.fromarray(np.dstack([pixels, pixels[..., :1]])).save(folder / "alpha.png")
    turned = Image.fromarray(pixels)
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(folder / "turned.jpg", exif=exif)
    assert main(["detect", str(run), str(folder), "--out", str(tmp_path / "out"), "--score", "0.01"]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"gray.png", "cmyk.png", "deep.png", "alpha.png", "turned.png", "detections.json"}
    found = json.loads((tmp_path / "out/detections.json").read_text())
    assert {item["image_id"] for item in found} == {"gray.png", "cmyk.jpg", "deep.png", "alpha.png", "turned.jpg"}
    for item in found:
        x, y, width, height = item["bbox"]
        limits = (48, 64) if item["image_id"] == "turned.jpg" else (64, 48)
        assert min(x, y, width, height) >= 0
        assert x + width <= limits[0] + 0.01
        assert y + height <= limits[1] + 0.01


def test_detect_replaces_no_picture_and_no_evaluation(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo, link = tmp_path / "photo.png", tmp_path / "links" / "photo.png"
    Image.new("RGB", (64, 48)).save(photo)
    link.parent.mkdir()
    link.symlink_to(photo)
    before = photo.read_bytes(), (run / "detections.json").read_bytes()
    for picture, out in ((photo, tmp_path), (link, link.parent), (link, tmp_path)):
        assert main(["detect", str(run), str(picture), "--out", str(out)]) == 2
        assert f"--out {out}: the picture {out / 'photo.png'} was given" in " ".join(capsys.readouterr().err.split())
    assert main(["detect", str(run), str(photo), "--out", str(run)]) == 2
    assert "its detections.json belongs to the evaluation there" in " ".join(capsys.readouterr().err.split())
    assert (photo.read_bytes(), (run / "detections.json").read_bytes()) == before


def test_detect_replaces_its_own_pictures_only(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo, drawn, other = tmp_path / "photo.jpg", tmp_path / "photo.png", tmp_path / "other.png"
    Image.new("RGB", (64, 48)).save(photo)
    command = ["detect", str(run), str(photo), str(photo), "--out", str(tmp_path)]
    assert main(command) == main(command) == 0  # beside the photo, and a second time
    assert {path.name for path in tmp_path.iterdir()} == {"photo.jpg", "photo.png", "detections.json"}
    found = [*map(json.dumps, json.loads((tmp_path / "detections.json").read_text()))]
    assert len(found) == len({*found}) > 0, "a photo that is named twice has its rows once"
    capsys.readouterr()
    assert main(["detect", str(run), str(drawn), "--out", str(tmp_path)]) == 2
    assert f"the picture {drawn} was given and would be replaced" in " ".join(capsys.readouterr().err.split())
    photo.rename(tmp_path / "other.jpg")
    own = io.BytesIO()
    Image.new("RGB", (64, 48)).save(own, "png")
    for content in (b"a note", own.getvalue()):
        other.write_bytes(content)
        assert main(["detect", str(run), str(tmp_path / "other.jpg"), "--out", str(tmp_path)]) == 2
        assert f"{other} would be replaced, which detect did not draw" in " ".join(capsys.readouterr().err.split())
        assert other.read_bytes() == content


def test_describe_prints_the_arithmetic_of_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", "megdet-r50-b256-bn32", "--devices", "128", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    wanted = {"batch_size": 256, "groups": 8, "lanes": 8, "images_a_device": 2, "accumulation": 1, "idle": 0.0}
    assert {key: rows[key] for key in wanted} == wanted
    assert rows["rate_first"] == pytest.approx(0.02)
    assert rows["rate_after_warmup"] == pytest.approx(0.32)
    assert rows["warmup_steps"] == 500
    assert rows["epochs"] == 11
    assert rows["steps"] == -(-11 * 117266 // 256)


def test_describe_on_uneven_devices_names_better_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", "demo", "--devices", "3"]) == 0
    printed = capsys.readouterr().out
    assert "numbers of devices that idle less" in printed
    assert "warmup" in printed


def test_recipes_are_listed_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    assert "megdet-r50" in capsys.readouterr().out
    assert main(["recipes", "bccd"]) == 0
    assert capsys.readouterr().out.startswith("# ")


def test_every_key_of_the_recipe_is_explained_by_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--model.backbone.frozen_stages" in text
    assert "images per optimizer step" in text


def test_importing_torchvision_makes_a_run_that_detects(tmp_path: Path, data: TinyData) -> None:
    torch.manual_seed(0)
    model = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=4)
    torch.save(model.state_dict(), tmp_path / "tv.pth")
    run = tmp_path / "run"
    options = ["--run", str(run), "--norm-eps", "0", "--data.short_edges", "[64]"]
    assert main(["import", "torchvision", str(tmp_path / "tv.pth"), *options]) == 0
    assert load_recipe(str(run / "recipe.yaml")).model.backbone.norm_eps == 0
    picture = next(data.val_images.iterdir())
    assert main(["detect", str(run), str(picture)]) == 0
    assert (run / "pictures/detect" / f"{picture.stem}.png").is_file()


def test_importing_detectron2_makes_a_run_that_detects(tmp_path: Path, data: TinyData) -> None:
    arrays = {name: tensor.numpy() for name, tensor in detectron2_reference.random_state().items()}
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"model": arrays}))
    run = tmp_path / "run"
    options = ["--run", str(run), "--data.short_edges", "[64]"]
    assert main(["import", "detectron2", str(tmp_path / "model.pkl"), *options]) == 0
    assert load_recipe(str(run / "recipe.yaml")).model.backbone.stride_in_1x1
    assert main(["detect", str(run), str(next(data.val_images.iterdir()))]) == 0


def test_convert_check_and_stats_go_through_from_the_example(tmp_path: Path) -> None:
    example = Path(__file__).parents[2] / "examples/voc"
    out = tmp_path / "out"
    assert main(["data", "convert", "--from", "voc", str(example), str(out)]) == 0
    train = [str(out / "annotations/train.json"), str(out / "images")]
    assert main(["data", "check", *train]) == 0
    assert main(["data", "stats", *train, "--picture", str(tmp_path / "stats.png")]) == 0
    with Image.open(tmp_path / "stats.png") as picture:
        assert picture.width > 600


def test_check_and_stats_tell_of_masks_where_they_are_asked_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    document = with_masks(two_images())
    files = [str(file) for file in write_set(tmp_path, document)]
    assert main(["data", "check", *files, "--masks"]) == 0
    assert main(["data", "stats", *files, "--masks"]) == 0
    assert re.search(r"masks\W+2 of 2 boxes have one", capsys.readouterr().out)
    document["annotations"][0]["segmentation"] = [[1, 2, 3, 4]]
    write_set(tmp_path, document)
    assert main(["data", "check", *files]) == 0
    assert "warning: " in capsys.readouterr().out
    assert main(["data", "check", *files, "--masks"]) == 2
    assert "annotation 11: segmentation has a polygon [1, 2, 3, 4] of 2 points" in capsys.readouterr().out


def test_the_golden_numbers_come_out_of_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = SHARED_DATA / "coco_eval_golden"
    if not folder.is_dir():
        pytest.skip("the COCO API's example files are not at ../shared/data")
    files = [
        "--ground-truth",
        str(folder / "sampled_gts_bbox_area.json"),
        "--detections",
        str(folder / "results/instances_val2014_fakebbox100_results.json"),
    ]
    assert main(["evaluate", *files, "--out", str(tmp_path)]) == 0
    numbers = json.loads((tmp_path / "evaluation.json").read_text())
    golden = (
        "0.503647 0.696973 0.571667 0.593252 0.557991 0.489363 0.386813 0.593680 0.595353 0.654764 0.603130 0.553744"
    )
    keys = "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl"
    for key, value in zip(keys.split(), golden.split(), strict=True):
        assert numbers["bbox"][key] == pytest.approx(float(value), abs=1e-6)


@pytest.mark.distributed
def test_torchrun_needs_no_other_change(data: TinyData, run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "two"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "megdet",
        "--",
    ]
    options = [*data.options, *OVERRIDES, "--model.box_head.score_threshold", "0.0"]
    done = subprocess.run(
        [*command, "train", "demo", "--run", str(folder), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first = [json.loads(path.read_text().splitlines()[0]) for path in (run / "metrics.jsonl", folder / "metrics.jsonl")]
    assert first[1]["loss"] == pytest.approx(first[0]["loss"], rel=1e-4)
    assert first[1]["gradient_norm"] == pytest.approx(first[0]["gradient_norm"], rel=1e-3)


def test_tensorboard_gets_the_metrics_where_the_recipe_asks_for_it(data: TinyData, tmp_path: Path) -> None:
    options = [*data.options, *OVERRIDES, "--trackers", "[tensorboard]", "--noise_interval", "1"]
    assert main(["train", "demo", "--run", str(tmp_path / "run"), *options]) == 0
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses)
    assert len(events.Scalars("evaluation/bbox/AP")) == 1
    variances = [line["noise"]["backbone"]["variance"] for line in lines if "noise" in line]
    assert variances
    assert [event.value for event in events.Scalars("train/noise/backbone/variance")] == pytest.approx(variances)
