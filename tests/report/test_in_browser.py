"""The report in a real browser: it draws itself, its controls work, and it asks nobody for anything."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from browsers import chromium, needs_chromium, open_page
from megdet.data.rle import encode_mask
from megdet.evaluation.coco_numbers import evaluate_files
from megdet.report.report import write_report
from megdet.report.run_page import Places
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.metrics import MetricsWriter
from reports import HOSTILE, data_of
from written_runs import with_masks, write_run, write_validation_set


@pytest.fixture(scope="module")
def browser():
    with chromium() as opened:
        yield opened


def detections_and_truth(folder: Path, name: str):
    return json.loads((folder / name / "detections.json").read_text()), json.loads((folder / "val.json").read_text())


@needs_chromium
@pytest.mark.parametrize("name", ["one.html", "all.html"])
@pytest.mark.parametrize(("width", "dark"), [(1100, False), (360, True)])
def test_it_draws_itself_without_complaint_network_or_sideways_scrolling(folder, browser, name, width, dark):
    watched = open_page(browser, folder / name, width=width, dark=dark)
    page = watched.page
    assert page.locator("section").count() >= 8
    assert watched.complaints == []
    assert [url for url in watched.requests if not url.startswith("data:")] == [(folder / name).as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", light)[:3])) < 200) is dark
    page.close()


@needs_chromium
def test_a_class_name_is_text_and_nothing_else(folder, browser):
    page = open_page(browser, folder / "one.html").page
    assert page.title() == "a0 - MegDet report"
    assert page.locator("#classes tbody th").nth(2).text_content() == HOSTILE.replace("\u202e", "\\u202e")
    assert page.locator("main b").count() == 0
    page.close()


@needs_chromium
def test_the_scores_are_those_of_the_evaluation(folder, browser):
    page = open_page(browser, folder / "one.html").page
    numbers = evaluate_files(folder / "val.json", folder / "a0/detections.json").bbox
    told = page.locator(".tile strong").all_text_contents()
    assert told == [f"{100 * value:.1f}" for value in (numbers.AP, numbers.AP50, numbers.AP75, numbers.AR100)]
    rows = page.locator("#classes tbody tr")
    for row, own in zip(rows.all(), numbers.per_class.values(), strict=True):
        cells = row.locator("td").all_text_contents()
        assert cells[:3] == [str(own.num_boxes), f"{100 * own.AP:.1f}", f"{100 * own.AP50:.1f}"]
    page.close()


@needs_chromium
def test_the_slider_and_a_pointer_on_the_curve_tell_what_a_hand_count_gives(folder, browser):
    page = open_page(browser, folder / "one.html").page
    points = data_of(folder / "one.html")["runs"][0]["analysis"]["bbox"]["all"]["points"]
    found, truth = detections_and_truth(folder, "a0")

    def told():
        text = page.locator("#curves .threshold-says").text_content()
        return re.fullmatch(
            r"threshold ([\d.]+): precision ([\d.-]+), recall ([\d.-]+), F1 ([\d.-]+) "
            r"\((\d+) of (\d+) objects? found, (\d+) wrong detections?\)",
            text,
        ).groups()

    def check(threshold: float):
        shown = sum(row["score"] >= threshold for row in found)
        said, precision, recall, f1, right, objects, wrong = map(float, told())
        assert said == pytest.approx(threshold, abs=1e-3)
        assert said <= threshold
        assert right + wrong == shown
        assert objects == len(truth["annotations"])
        assert precision == pytest.approx(100 * right / shown, abs=0.051)
        assert recall == pytest.approx(100 * right / objects, abs=0.051)
        assert f1 == pytest.approx(200 * right / (shown + objects), abs=0.051)

    slider = page.locator("#curves input[type=range]")
    for threshold in (0.2, 0.613):  # between two scores
        slider.evaluate("(s, v) => { s.value = v; s.dispatchEvent(new Event('input')); }", threshold)
        nearest = min(point[0] for point in points if point[0] >= threshold)
        assert nearest == min(row["score"] for row in found if row["score"] >= threshold)
        check(nearest)
    chart = page.locator("#curves .chart svg").nth(1)
    chart.scroll_into_view_if_needed()
    frame = chart.bounding_box()
    left, right = 40 / 360 * frame["width"], 12 / 360 * frame["width"]
    for part in (0.3, 0.8):
        page.mouse.move(frame["x"] + left + part * (frame["width"] - left - right), frame["y"] + 60)
        nearest = min((point[0] for point in points), key=lambda value: abs(value - part))
        assert float(told()[0]) == pytest.approx(nearest, abs=0.02)
        check(min((point[0] for point in points), key=lambda value: abs(value - float(told()[0]))))
    before = float(told()[0])
    chart.focus()
    page.keyboard.press("ArrowRight")
    assert float(told()[0]) > before
    assert "threshold" in chart.get_attribute("aria-valuetext")
    page.close()


@needs_chromium
def test_the_score_slider_shows_as_many_boxes_as_detections_of_that_score(folder, browser):
    page = open_page(browser, folder / "one.html").page
    pictures = data_of(folder / "one.html")["runs"][0]["pictures"]["bbox"]
    found, _ = detections_and_truth(folder, "a0")
    names = {picture["name"] for own in pictures.values() for picture in own}
    images = {int(name.removesuffix(".jpg")) for name in names}
    assert len(names) == 12
    counts = []
    threshold = data_of(folder / "one.html")["runs"][0]["analysis"]["bbox"]["threshold"]
    shown = sum(row["score"] >= threshold for row in found if row["image_id"] in images)
    assert page.locator("#pictures rect.found").count() == shown  # it begins at the threshold that chose the pictures
    for score in (0.05, 0.5, 0.95):
        page.locator("#pictures input[type=range]").evaluate(
            "(s, v) => { s.value = v; s.dispatchEvent(new Event('input')); }", score
        )
        shown = sum(row["score"] >= score for row in found if row["image_id"] in images)
        assert page.locator("#pictures rect.found").count() == shown
        assert f"{shown} detections shown" in page.locator("#pictures .threshold-says").text_content()
        counts.append(shown)
    assert counts[0] > counts[1] > counts[2]
    assert page.locator("#pictures rect.truth").count() > 0
    page.locator("#pictures input[type=checkbox]").uncheck()
    assert page.locator("#pictures rect.truth").count() == 0
    page.close()


@needs_chromium
def test_headings_sort_hours_replace_epochs_and_arrow_keys_walk_the_matrix(folder, browser):
    page = open_page(browser, folder / "one.html").page
    page.locator("#classes thead button", has_text="mmAP").click()
    scores = [float(text) for text in page.locator("#classes td:nth-child(3)").all_text_contents()]
    assert scores == sorted(scores, reverse=True)
    assert page.locator("#course .axis").first.text_content() == "epochs"
    assert page.locator("#course .mark").count() > 0
    page.locator("#course input[value=hours]").check(force=True)
    assert page.locator("#course .axis").first.text_content() == "hours"
    page.locator("#confusion td[tabindex='0']").focus()
    first = page.locator("#confusion .says").text_content()
    page.keyboard.press("ArrowDown")
    assert page.locator("#confusion .says").text_content() != first
    page.close()


@needs_chromium
def test_a_matrix_that_scrolls_under_a_pointer_at_rest_keeps_the_words_of_the_focused_cell(folder, browser):
    page = open_page(browser, folder / "one.html").page
    words, cells = page.locator("#confusion .says"), page.locator("#confusion td[tabindex]")
    cells.nth(5).hover()
    hovered = words.text_content()
    assert hovered
    cells.first.focus()
    focused = words.text_content()
    assert focused != hovered
    below = "[...document.querySelectorAll('#confusion td')].findIndex((cell) => cell.matches(':hover'))"
    before = page.evaluate(below)
    page.evaluate("scrollBy(0, document.querySelector('#confusion td[tabindex]').offsetHeight)")
    page.wait_for_function(f"{below} !== {before}")
    assert words.text_content() == focused
    page.close()


@needs_chromium
def test_of_many_classes_the_first_are_shown_until_one_asks_for_all(browser, tmp_path):
    annotations = write_validation_set(tmp_path, images=60, class_names=tuple(f"class {i}" for i in range(60)))
    write_run(tmp_path / "a", annotations)
    watched = open_page(browser, write_report([tmp_path / "a"], resamples=3), width=360)
    page, rows = watched.page, watched.page.locator("#classes tbody tr")
    assert rows.count() == 40
    assert page.locator("#confusion td.right").count() == 12
    page.locator("#classes button.all").click()
    assert rows.count() == 60
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert watched.complaints == []
    page.close()


@needs_chromium
def test_several_runs_stand_side_by_side_and_each_in_detail(folder, browser):
    page = open_page(browser, folder / "all.html").page
    assert page.locator("#compared-bbox .verdicts li").count() == 1  # a0 and a1 are one recipe
    assert "optimizer.base_lr" in page.locator("#compared-bbox").text_content()
    before = page.locator(".detail .tile strong").first.text_content()
    page.locator("input[name=run][value='2']").check(force=True)
    assert page.locator(".detail .tile strong").first.text_content() != before
    assert page.locator("#compared-bbox .charts .line").count() == 6
    page.close()


@needs_chromium
def test_a_run_with_masks_is_counted_by_boxes_or_by_masks(folder, browser, tmp_path):
    shutil.copytree(folder / "a0", tmp_path / "a0")
    truth = json.loads((folder / "val.json").read_text())
    (tmp_path / "val.json").write_text(json.dumps(truth | {"annotations": with_masks(truth["annotations"])}))
    found = with_masks(json.loads((folder / "a0/detections.json").read_text()))
    (tmp_path / "a0/detections.json").write_text(json.dumps(found))
    places = Places(tmp_path / "val.json", folder / "val")
    watched = open_page(browser, write_report([tmp_path / "a0"], None, places, resamples=9))
    page, numbers = watched.page, evaluate_files(tmp_path / "val.json", tmp_path / "a0/detections.json")
    assert [f"{100 * own.AP:.1f}" for own in (numbers.bbox, numbers.segm)] == [
        page.locator(".tile strong").nth(place).text_content() for place in (0, 4)
    ]
    for kind, own in (("segm", numbers.segm), ("bbox", numbers.bbox)):
        page.locator(f"input[name=kind][value={kind}]").check(force=True)
        shown = page.locator("#classes tbody td:nth-child(3)").all_text_contents()
        assert shown == [f"{100 * of_class.AP:.1f}" for of_class in own.per_class.values()]
        pictures = page.locator("#pictures .picture")
        assert pictures.locator("rect.found").count() > 0
        assert (pictures.locator("path.mask").count() > 0) is (kind == "segm")
    assert numbers.bbox.AP != numbers.segm.AP
    assert watched.complaints == []
    page.close()


@needs_chromium
def test_the_pixels_of_a_mask_are_those_that_are_coloured(browser, tmp_path):
    """An object of two columns, and one with a hole, out of the text of COCO."""
    hollow = np.pad(np.ones((3, 4), np.bool_), 1)
    hollow[2, 2] = False
    page = open_page(browser, write_report([write_run(tmp_path / "a", write_validation_set(tmp_path)).path])).page
    for pixels in (
        np.tri(5, 2, dtype=np.bool_),
        hollow,
        np.zeros((4, 4), np.bool_),
        np.random.default_rng(0).random((40, 60)) < 0.5,
    ):
        height, width = pixels.shape
        text = encode_mask(pixels, 0, 0, (height, width))["counts"]
        path = page.evaluate("([text, height]) => maskPath(text, height)", [text, height])
        drawn = np.zeros_like(pixels)
        for x, y, high in re.findall(r"M(\d+) (\d+)v(\d+)h1v-\3z", path):
            drawn[int(y) : int(y) + int(high), int(x)] = True
        assert np.array_equal(drawn, pixels)
    page.close()


@needs_chromium
def test_a_young_run_and_one_with_failures_read_sensibly(folder, browser, tmp_path):
    run = RunFolder(tmp_path / "young").create()
    shutil.copy(folder / "a0/recipe.yaml", run.recipe)
    shutil.copy(folder / "a0/metrics.jsonl", run.metrics)
    with MetricsWriter(run.metrics, resume_step=8) as metrics:
        line = {"step": 9, "epoch": 2.25, "learning_rate": 0.1, "loss": float("nan"), "seconds": 1.0}
        metrics.write(line | {"left_out": "the loss is not finite"})
        metrics.write({"step": 8, "rolled_back": {"from": 9, "why": "it diverged"}})
    watched = open_page(browser, write_report([run.path, folder / "b0"], tmp_path / "r.html", resamples=9))
    text = watched.page.locator("main").text_content()
    assert watched.complaints == []
    assert "updates left out: 1; roll-backs: 1" in text
    assert "has no evaluation yet" in text
    assert "The runs are not compared" in text
    watched.page.close()
