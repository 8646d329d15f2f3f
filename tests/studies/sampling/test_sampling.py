"""Table 1 from the lines of runs, and the proposals of Figure 2 by the model's own functions."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from factories import TINY, with_model
from megdet.data.loader import training_batches
from megdet.distributed.layout import recipe_layout
from megdet.errors import InputError
from megdet.recipe import Recipe
from megdet.recipe_file import dump_recipe
from megdet.run_folder.checkpoint_files import save_checkpoint
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.metrics import MetricsWriter
from megdet.studies.gradients.units import Study, load_study
from megdet.studies.sampling.pictures import (
    SampledImage,
    draw_proposals,
    most_and_least_balanced,
    sampled_images,
    samples_of,
)
from megdet.studies.sampling.ratios import sampling_table
from small_runs import CPU, run_state, save_run, small_recipe, write_small_set


def run_of(folder: Path, recipe: Recipe, num_images: int, steps: int, /, **state: Any) -> RunFolder:
    """A run whose step s has s% positive RoIs and s positive anchors an image."""
    run = RunFolder(folder).create()
    run.write_recipe(dump_recipe(recipe))
    known = run_state(steps, ("a",), **{"num_images": num_images, "data": "x", **state})
    save_checkpoint(run, known, {"model": {"w": torch.zeros(1)}}, keep=1)
    with MetricsWriter(run.metrics) as metrics:
        for step in range(1, steps + 1):
            epoch = round(step * recipe.batch_size / num_images, 6)
            metrics.write({"step": step, "epoch": epoch, "box_head_positive": step / 100, "rpn_positive": step})
            metrics.write({"step": step, "evaluation": {"AP": 0.1}})
    return run


def test_a_row_is_the_mean_over_the_steps_that_began_in_the_epoch(tmp_path: Path) -> None:
    # 10 images, 4 a step: epoch 1 is steps 1 to 3, epoch 2 steps 4 and 5, epoch 3 steps 6 to 8
    run = run_of(tmp_path / "a", replace(TINY, batch_size=4), 10, 8)
    rows = sampling_table([run])
    assert [(row.epoch, row.steps, row.epoch_steps) for row in rows] == [(1, 3, 3), (2, 2, 2), (3, 3, 3)]
    assert [row.ratios["RoI"] for row in rows] == pytest.approx([0.02, 0.045, 0.07])
    assert [row.ratios["anchor"] for row in rows] == pytest.approx([2 / 32, 4.5 / 32, 7 / 32])
    assert {(row.batch_size, row.bn_size, row.paper) for row in rows} == {(4, 2, None)}


def test_long_runs_have_the_epochs_of_the_paper_beside_its_numbers(tmp_path: Path) -> None:
    small = run_of(tmp_path / "a", replace(TINY, batch_size=16), 16, 12)
    large = run_of(tmp_path / "b", replace(TINY, batch_size=256), 256, 13, num_images=16)
    rows = sampling_table([small, large])
    assert [(row.epoch, row.batch_size, row.paper) for row in rows] == [
        (1, 16, 0.0558),
        (1, 256, 0.0982),
        (6, 16, 0.1177),
        (6, 256, 0.1611),
        (12, 16, 0.1659),
        (12, 256, 0.1691),
    ]
    assert [row.run for row in rows[:2]] == [str(small.path), str(large.path)]
    assert [row.ratios["RoI"] for row in sampling_table([small], [2])] == pytest.approx([0.02])


def test_runs_that_do_not_compare_are_refused(tmp_path: Path) -> None:
    first = run_of(tmp_path / "a", TINY, 16, 8)

    def refusal(recipe: Recipe = TINY, **state: Any) -> str:
        other = run_of(tmp_path / f"other-{len(list(tmp_path.iterdir()))}", recipe, 16, 8, **state)
        with pytest.raises(InputError) as refused:
            sampling_table([first, other])
        return str(refused.value)

    assert "trained on other data (16 images of 1 classes, 20 of 1)" in refusal(num_images=20)
    assert "16 of 1, which are not the same)" in refusal(data="y")
    sampling = with_model(TINY, box_head={"positive_fraction": 0.5})
    assert "model.box_head.positive_fraction is 0.25 there and 0.5 here" in refusal(sampling)


@pytest.mark.parametrize(
    "change",
    [
        {"data": {"short_edges": (400,)}},
        {"data": {"max_long_edge": 600}},
        {"data": {"scale_jitter": (0.5, 2.0)}},
        {"anchors": {"sizes": (16.0, 32.0, 48.0, 64.0, 96.0)}},
        {"anchors": {"ratios": (1.0,)}},
        {"anchors": {"stride_from_grid": True}},
        {"rpn": {"negative_iou": 0.4}},
        {"rpn": {"train_proposals_before_nms": 41}},
        {"rpn": {"nms_iou": 0.8}},
        {"rpn": {"min_size": 2.0}},
    ],
    ids=str,
)
def test_runs_of_other_anchors_or_proposals_do_not_compare(tmp_path: Path, change: dict[str, dict[str, Any]]) -> None:
    [(section, keys)] = change.items()
    other = replace(TINY, data=replace(TINY.data, **keys)) if section == "data" else with_model(TINY, **change)
    [key] = keys
    runs = [run_of(tmp_path / "a", TINY, 16, 8), run_of(tmp_path / "b", other, 16, 8)]
    with pytest.raises(InputError, match=rf"do not compare: (model\.)?{section}\.{key} is .* there and .* here"):
        sampling_table(runs)


def test_runs_compare_whose_mini_batches_rates_and_tests_differ(tmp_path: Path) -> None:
    # what a sweep changes, and what detects after the training
    other = replace(
        TINY,
        batch_size=8,
        bn_size=4,
        optimizer=replace(TINY.optimizer, base_lr=0.1),
    )
    other = with_model(other, rpn={"test_proposals": 7, "smooth_l1_beta": 1.0}, box_head={"nms_iou": 0.6})
    rows = sampling_table([run_of(tmp_path / "a", TINY, 16, 8), run_of(tmp_path / "b", other, 16, 8)], [1])
    assert [row.batch_size for row in rows] == [4, 8]


def test_lines_that_are_lost_are_told_of(tmp_path: Path) -> None:
    # 10 images, 4 a step: epoch 1 is steps 1 to 3, epoch 2 steps 4 and 5, epoch 3 steps 6 to 8
    run = run_of(tmp_path / "a", replace(TINY, batch_size=4), 10, 8)
    lines = [line for line in run.metrics.read_text().splitlines() if json.loads(line)["step"] not in (2, 4, 5)]
    run.metrics.write_text("".join(f"{line}\n" for line in lines))
    rows = sampling_table([run], [1, 3])
    assert [(row.epoch, row.steps, row.epoch_steps) for row in rows] == [(1, 2, 3), (3, 3, 3)]
    with pytest.raises(InputError, match=r"metrics\.jsonl: the lines of epoch 2 are missing; choose other --epochs"):
        sampling_table([run], [2])


def test_what_has_no_table_is_refused(tmp_path: Path) -> None:
    def refusal(run: RunFolder, *epochs: int) -> str:
        with pytest.raises(InputError) as refused:
            sampling_table([run], epochs or None)
        return str(refused.value)

    run = run_of(tmp_path / "a", TINY, 16, 8)
    assert "--epochs 3: " in refusal(run, 1, 3)
    assert "has finished epochs 1 to 2" in refusal(run, 0)
    assert "no epoch is finished yet" in refusal(run_of(tmp_path / "b", TINY, 16, 3))
    run.metrics.write_text("")
    assert "no line of a step" in refusal(run)
    run.metrics.unlink()
    assert "has no metrics.jsonl" in refusal(run)
    assert "not a run folder" in refusal(RunFolder(tmp_path / "c"))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("data")
    write_small_set(folder, "train", 9)
    write_small_set(folder, "val", 2, seed=1)
    recipe = small_recipe(folder, batch_size=4, bn_size=2)
    save_run(folder / "run", recipe)
    return load_study(RunFolder(folder / "run"), CPU)


def test_the_proposals_that_are_drawn_are_those_that_the_training_samples(study: Study) -> None:
    layout = recipe_layout(study.recipe, 1)
    batches = training_batches(study.dataset, study.plan, layout, 0, (0, 1), workers=0, device=CPU)
    images = sampled_images(study, 4, 0)
    for batch in batches:
        sampled = samples_of(study, batch)
        with torch.no_grad():
            reported = study.model(batch)["box_head_positive"]
        part = sampled.is_positive.sum(1) / sampled.is_valid.sum(1)
        torch.testing.assert_close(part.double(), reported.double())
        for index, ratio in zip(batch.image_index, reported.tolist(), strict=True):
            [image] = [own for own in images if own.file_name == study.dataset.file_names[index]]
            assert image.ratio == pytest.approx(ratio)
            assert len(image.rois) <= study.recipe.model.box_head.samples
            assert len(image.truth) == len(study.dataset.annotations[index].boxes)


def image(ratio: float) -> SampledImage:
    rois = torch.tensor([[1.0, 2.0, 20.0, 30.0]]).repeat(20, 1)
    is_positive = torch.arange(20) < round(20 * ratio)
    return SampledImage(f"{ratio}.png", torch.full((40, 40, 3), 128, dtype=torch.uint8), rois[:1], rois, is_positive)


def test_the_most_and_the_least_balanced_images_are_shown() -> None:
    images = [image(ratio) for ratio in (0.2, 0.05, 0.25, 0.1, 0.15)]
    assert [own.ratio for own in most_and_least_balanced(images, 3)] == pytest.approx([0.05, 0.1, 0.25])
    assert len(most_and_least_balanced(images, 8)) == 5


def test_positives_are_green_and_negatives_red(tmp_path: Path) -> None:
    def colours(*shown: SampledImage) -> tuple[int, int]:
        draw_proposals(list(shown), "tiny", tmp_path / "a/proposals.png")
        with Image.open(tmp_path / "a/proposals.png") as picture:
            height = picture.height * 4 // 5  # above the legend
            pixels = np.asarray(picture.convert("RGB")).astype(int)[:height]
        red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
        return int(((green > 180) & (red < 100)).sum()), int(((red > 200) & (green < 120) & (blue < 120)).sum())

    green, red = colours(image(1.0))
    assert green > 100
    assert red == 0
    green, red = colours(image(0.0))
    assert green == 0
    assert red > 50


@pytest.mark.parametrize("number", [0, 10])
def test_more_images_than_there_are_cannot_be_drawn(study: Study, number: int) -> None:
    with pytest.raises(InputError, match=f"--images {number}: choose 1 to 9"):
        sampled_images(study, number, 0)
