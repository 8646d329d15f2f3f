"""Runs compared: recipes, intervals over images and seeds, verdicts, and the verb."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from megdet.cli.main import main
from megdet.errors import InputError
from megdet.evaluation.coco_numbers import evaluate_files
from megdet.evaluation.matches import match
from megdet.evaluation.resampling import average_precisions, draw_images, interval, mean_ap
from megdet.evaluation.task import read_task
from megdet.run_folder.folder import RunFolder
from megdet.studies.comparison.comparison import compare_runs
from megdet.studies.comparison.recipes import departures, differences
from megdet.studies.comparison.runs import read_scored_run
from megdet.studies.comparison.student import (
    pooled_deviation,
    seeds_needed,
    t_cdf,
    t_quantile,
    welch_interval,
)
from megdet.studies.comparison.verdict import judge
from written_runs import noisy_detections, write_run, write_validation_set, written_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six runs: a0 to a2 precise and b0 to b2 with boxes that are pixels off; the digit is the seed."""
    folder = tmp_path_factory.mktemp("runs")
    annotations = write_validation_set(folder, images=60)
    for seed in range(3):
        write_run(folder / f"a{seed}", annotations, error=1.0, detections_seed=seed, seed=seed)
        write_run(folder / f"b{seed}", annotations, error=3.0, detections_seed=9 + seed, base_lr=0.04, seed=seed)
    return folder


def compared(folder: Path, *names: str):
    return compare_runs([read_scored_run(RunFolder(folder / name)) for name in names], resamples=200)


def test_the_scores_are_those_of_the_evaluation_and_lie_in_their_intervals(folder):
    found = compared(folder, "a0", "b0")
    for run in found.runs:
        assert run.AP == evaluate_files(folder / "val.json", Path(run.name) / "detections.json").bbox.AP
        assert run.over_images[0] < run.AP < run.over_images[1]


def test_an_interval_lies_around_the_score_and_not_where_repeated_images_lift_it(folder):
    values = np.array([1.0, 2.0, 3.0, 4.0, np.nan, 5.0])
    assert interval(values, 0.5) == (2.0, 4.0)
    assert interval(values, 0.5, around=10.0) == (9.0, 11.0)
    run = read_scored_run(RunFolder(folder / "b0"))
    lifted = mean_ap(average_precisions(run.matches("bbox"), draw_images(60, 200)))
    score = run.evaluation.bbox.AP
    assert lifted.mean() > score
    low, high = compared(folder, "b0", "a0").runs[0].over_images
    assert (low, high) == pytest.approx(np.quantile(lifted, [0.025, 0.975]) - lifted.mean() + score)


def test_the_interval_of_a_difference_lies_around_it_also_where_one_run_is_lifted_more(folder, tmp_path):
    """A run that finds nothing is lifted by nothing, so the difference has the whole lift of the other."""
    nothing = write_run(tmp_path / "nothing", folder / "val.json", base_lr=0.5)
    nothing.detections.write_text("[]")
    runs = [read_scored_run(nothing), read_scored_run(RunFolder(folder / "a0"))]
    (difference,) = compare_runs(runs, resamples=200).differences
    score = runs[1].evaluation.bbox.AP
    lifted = mean_ap(average_precisions(runs[1].matches("bbox"), draw_images(60, 200)))
    assert score == difference.AP
    assert lifted.mean() > score
    assert difference.over_images == pytest.approx(np.quantile(lifted, [0.025, 0.975]) - lifted.mean() + score)


def test_a_clear_difference_of_one_seed_each_says_nothing_of_the_recipes(folder):
    (difference,) = compared(folder, "a0", "b0").differences
    assert difference.over_images[1] < 0
    assert difference.over_seeds is None
    assert difference.verdict == "differ on these weights"
    assert "Of the recipes that says nothing yet" in difference.words


def test_a_clear_difference_over_seeds_counts(folder):
    found = compared(folder, "a0", "b1", "a1", "b0", "a2", "b2")
    assert [(group.name, group.seeds) for group in found.groups] == [("A", [0, 1, 2]), ("B", [0, 1, 2])]
    (difference,) = found.differences
    assert difference.over_seeds is not None
    assert difference.over_seeds[1] < 0
    assert difference.verdict == "differ"
    assert found.recipe_differences == {"optimizer.base_lr": [0.02, 0.04]}


def test_runs_that_find_the_same_are_equal_and_paired_to_nothing(folder, tmp_path):
    for name in ("x", "y"):
        write_run(tmp_path / name, folder / "val.json", detections_seed=3)
    (difference,) = compared(tmp_path, "x", "y").differences
    assert (difference.AP, difference.over_images, difference.verdict) == (0.0, (0.0, 0.0), "equal")


def test_two_seeds_of_one_recipe_are_compared_with_each_other(folder):
    found = compared(folder, "a0", "a1")
    assert found.recipe_differences == {"seed": [0, 1]}
    assert "may be noise" in found.differences[0].words or "it is the seed" in found.differences[0].words


def test_a_paired_interval_is_narrower_than_that_of_the_runs(folder, tmp_path):
    """The same detections but a few: what is hard for one is hard for the other."""
    rows = json.loads((folder / "a0/detections.json").read_text())
    near = write_run(tmp_path / "near", folder / "val.json", base_lr=0.03)
    near.detections.write_text(json.dumps(rows[:-3]))
    runs = [read_scored_run(RunFolder(folder / "a0")), read_scored_run(near)]
    found = compare_runs(runs, resamples=200)
    low, high = found.differences[0].over_images
    own_low, own_high = found.runs[0].over_images
    assert high - low < 0.5 * (own_high - own_low)


def test_more_comparisons_need_wider_intervals(folder):
    two, three = compared(folder, "a0", "b0"), compared(folder, "a0", "b0", "a1")
    assert two.level == pytest.approx(0.95)
    assert three.level == pytest.approx(0.95)  # a0 and a1 are one recipe
    write_run(folder / "c0", folder / "val.json", error=2.0, base_lr=0.08)
    assert compared(folder, "a0", "b0", "c0").level == pytest.approx(0.975)


def test_keys_without_effect_make_no_other_recipe(folder, tmp_path):
    recipe = written_recipe(folder / "val.json")
    other = written_recipe(folder / "val.json", checkpoint_minutes=5.0, batch_size=16)
    assert list(differences([recipe, other])) == ["batch_size", "checkpoint_minutes"]
    assert departures(recipe)["schedule.milestones"] == ((1.5,), ())
    assert "optimizer.base_lr" not in departures(recipe)


def test_the_cdf_of_students_t_is_the_one_of_the_tables():
    """Student (1908) and every table since."""
    assert t_quantile(0.975, 1.0) == pytest.approx(12.706, abs=1e-3)
    assert t_quantile(0.975, 4.0) == pytest.approx(2.776, abs=1e-3)
    assert t_quantile(0.95, 10.0) == pytest.approx(1.812, abs=1e-3)
    assert t_quantile(0.975, 1e6) == pytest.approx(1.95996, abs=1e-4)
    assert t_cdf(-2.776, 4.0) == pytest.approx(0.025, abs=1e-4)
    assert t_cdf(0.0, 3.0) == 0.5


@pytest.mark.parametrize(("effect", "seeds"), [(0.2, 394), (0.5, 64), (0.8, 26), (1.0, 17), (2.0, 6)])
def test_the_seeds_needed_are_those_of_cohens_tables(effect, seeds):
    """Cohen (1988): a two-sided t-test at 5% with power 0.8."""
    assert seeds_needed(-effect * 0.3, 0.3) == seeds


def test_no_number_of_seeds_finds_no_difference():
    assert seeds_needed(0.0, 1.0) is None
    assert seeds_needed(1e-6, 1.0) is None
    assert seeds_needed(0.1, 0.0) == 2


def test_welch_by_hand():
    """Means 2 and 5, variances 1 and 4 over 3 each: standard error root(5/3), freedom (5/3)^2 / (1/18 + 16/18)."""
    low, high = welch_interval([1.0, 2.0, 3.0], [3.0, 5.0, 7.0], 0.95)
    half = t_quantile(0.975, (5 / 3) ** 2 / (17 / 18)) * np.sqrt(5 / 3)
    assert (low, high) == pytest.approx((3 - half, 3 + half))
    assert welch_interval([1.0], [2.0, 3.0], 0.95) is None
    assert welch_interval([1.0, 1.0], [2.0, 2.0], 0.95) == (1.0, 1.0)
    assert pooled_deviation([[1.0, 2.0, 3.0], [3.0, 5.0, 7.0]]) == pytest.approx(np.sqrt((2 + 8) / 4))
    assert pooled_deviation([[1.0], [2.0]]) is None


def test_verdicts_in_words():
    names = ("A", "B")
    assert judge(names, 0.01, (-0.02, 0.04), (0.005, 0.02), 7) == (
        "noise of images",
        "B scores 1.0 mmAP more than A, which may be noise: over images -2.0 to +4.0. With 7 seeds of each, a "
        "difference of this size would be found in 8 of 10 cases.",
    )
    assert judge(names, 0.03, (0.01, 0.05), (-0.01, 0.07), 7)[0] == "noise of seeds"
    assert judge(names, 0.03, (0.01, 0.05), (0.01, 0.05), 3)[0] == "differ"


def test_runs_of_other_images_are_refused(folder, tmp_path):
    other = write_run(tmp_path / "other", write_validation_set(tmp_path, images=60, seed=5))
    with pytest.raises(InputError, match="is evaluated on other images"):
        compare_runs([read_scored_run(RunFolder(folder / "a0")), read_scored_run(other)])


def test_the_verb_prints_tables_words_and_json(folder, capsys):
    names = [str(folder / name) for name in ("a0", "a1", "b0", "b1")]
    assert main(["compare", *names, "--resamples", "50"]) == 0
    text = capsys.readouterr().out
    assert "optimizer.base_lr" in text
    assert "A, 2 seeds:" in text
    assert re.search(r"B scores \d+\.\d mmAP less than A", text)
    assert main(["compare", *names, "--json", "--resamples", "50"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [run["name"] for run in told["runs"]] == names
    assert told["differences"][0]["verdict"] in ("differ", "noise of seeds")


def test_the_verb_refuses_in_one_line(folder, tmp_path, capsys):
    def refused(*words: object) -> str:
        assert main(["compare", *map(str, words)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "name two or more" in refused(folder / "a0")
    assert "is named twice" in refused(folder / "a0", folder / "a0")
    assert "no such folder" in refused(folder / "a0", tmp_path / "none")
    assert "it has no recipe.yaml" in refused(folder / "a0", tmp_path)
    assert "have no masks" in refused(folder / "a0", folder / "b0", "--kind", "segm")
    run = write_run(tmp_path / "run", folder / "val.json")
    run.detections.unlink()
    assert "`megdet evaluate" in refused(folder / "a0", run.path)
    assert "--annotations" in refused(folder / "a0", folder / "b0", "--annotations", tmp_path / "gone.json")


@pytest.mark.slow
def test_detectors_of_one_quality_are_told_apart_by_chance_as_often_as_promised(tmp_path):
    """200 pairs whose mistakes are drawn alike, at 90%: about 20 intervals leave out 0, and 20 +- 4.2 in theory."""
    annotations = write_validation_set(tmp_path, images=80)
    truth = json.loads(annotations.read_text())
    draws, one_each, outside = draw_images(80, 300), np.ones((1, 80), np.int32), 0
    for pair in range(200):
        found, scores = [], []
        for seed in (2 * pair, 2 * pair + 1):
            task = read_task(truth, noisy_detections(annotations, 2.0, 1000 + seed))
            matches = match(task.boxes, 80, 3, "bbox")
            found.append(mean_ap(average_precisions(matches, draws)))
            scores.append(mean_ap(average_precisions(matches, one_each)).item())
        low, high = interval(found[1] - found[0], 0.9, scores[1] - scores[0])
        outside += low > 0 or high < 0
    print(f"{outside} of 200")
    assert 6 <= outside <= 38
