"""What the report is made of: the scores, the course of a run, its notes, and the verb `megdet report`."""

import json
import os
import re
import shutil
import webbrowser

import pytest

from megdet.cli.main import main
from megdet.report.page import embedded
from megdet.report.report import write_report
from megdet.report.run_page import Places
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.metrics import read_metrics
from reports import HOSTILE, data_of


def test_a_crowd_in_the_file_moves_no_detection_to_another_object(folder, tmp_path):
    """The objects of a picture are numbered without crowds, and so are those that its detections have found."""
    truth, found = (
        json.loads((folder / "val.json").read_text()),
        json.loads((folder / "a0/detections.json").read_text()),
    )
    images = {row["image_id"] for row in truth["annotations"]}
    crowds = [
        {"id": 1000 + image, "image_id": image, "category_id": 1, "iscrowd": 1, "bbox": [0, 0, 1, 1], "area": 1}
        for image in images
    ]
    (tmp_path / "val.json").write_text(json.dumps(truth | {"annotations": crowds + truth["annotations"]}))
    shutil.copytree(folder / "a0", tmp_path / "a0")
    places = Places(tmp_path / "val.json", folder / "val")
    (own,) = data_of(write_report([tmp_path / "a0"], None, places, resamples=3))["runs"]
    pairs = [
        (picture["truth"][box[6]], box)
        for picture in [*own["pictures"]["bbox"]["worst"], *own["pictures"]["bbox"]["best"]]
        for box in picture["found"]
        if box[6] >= 0
    ]
    assert len(pairs) > len(found) / 10
    for (x, y, *_, label, _), box in pairs:
        assert label == box[4]
        assert box[:2] == pytest.approx([x, y], abs=8)


def test_no_text_can_end_the_element_that_the_data_stand_in():
    text = embedded({"name": HOSTILE + "<!--\u2028&amp;", "lost": float("nan")})
    assert not re.search("[<>&\u2028\u2029]", text)
    assert json.loads(text) == {"name": HOSTILE + "<!--\u2028&amp;", "lost": "NaN"}


def test_a_run_without_an_evaluation_or_without_its_data_says_so(folder, tmp_path):
    run = RunFolder(tmp_path / "young").create()
    shutil.copy(folder / "a0/recipe.yaml", run.recipe)
    (own,) = data_of(write_report([run.path]))["runs"]
    assert (own["numbers"], own["analysis"], own["course"]["charts"]) == ({}, {}, [])
    assert "has no evaluation yet" in own["notes"][0]
    run = RunFolder(tmp_path / "moved").create()
    for name in ("metrics.jsonl", "detections.json", "evaluation.json"):
        shutil.copy(folder / "a0" / name, run.path / name)
    run.write_recipe((folder / "a0/recipe.yaml").read_text().replace(str(folder), str(tmp_path / "gone")))
    (own,) = data_of(write_report([run.path]))["runs"]
    assert own["numbers"]["bbox"]["AP"] > 0
    assert "are not here" in own["notes"][0]
    assert main(["report", str(run.path), "--annotations", str(folder / "val.json"), "--resamples", "9"]) == 0
    (own,) = data_of(run.path / "report.html")["runs"]
    assert own["analysis"]["bbox"]["numbers"] == own["numbers"]["bbox"]
    assert "is left out" in own["notes"][0]  # the pictures are gone


def test_the_course_is_told_over_epochs_and_hours_with_its_decay(folder):
    course = data_of(folder / "one.html")["runs"][0]["course"]
    assert course["epochs"] == [step / 4 for step in range(1, 9)]
    assert course["hours"] == pytest.approx(
        [s / 3600 for s in (1, 2, 3, 4, 7, 8, 9, 10)], rel=1e-5
    )  # an evaluation of 2 s
    assert [one["epoch"] for one in course["evaluations"]] == [1.0, 2.0]
    assert course["evaluations"][1]["hours"] == pytest.approx(12 / 3600)
    assert course["decays"] == [{"epoch": 1.5, "hours": pytest.approx(8 / 3600)}]
    assert course["images_per_second"] == pytest.approx(8.0)
    parts = [chart["lines"] for chart in course["charts"] if chart["unit"] == "as a part of 1"]
    assert parts == [{"rpn positive": [4 / 256] * 8}, {"box head positive": [0.1] * 8}]
    titles = [chart["title"] for chart in course["charts"]]
    assert titles[:3] == ["Loss", "Learning rate", "Images a second"]
    losses = course["charts"][0]["lines"]
    assert list(losses) == ["loss", "rpn objectness", "rpn box", "box head class", "box head box"]
    assert losses["loss"] == pytest.approx(
        [line["loss"] for line in read_metrics(folder / "a0/metrics.jsonl") if "loss" in line], rel=1e-5
    )


def test_an_evaluation_beside_the_training_stands_at_the_epoch_of_its_weights(folder, tmp_path):
    run = RunFolder(tmp_path / "run").create()
    shutil.copy(folder / "a0/recipe.yaml", run.recipe)
    lines = [json.loads(line) for line in (folder / "a0/metrics.jsonl").read_text().splitlines()]
    late = [line for line in lines if "loss" in line] + [line for line in lines if "evaluation" in line]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in late))
    (own,) = data_of(write_report([run.path]))["runs"]
    assert [one["epoch"] for one in own["course"]["evaluations"]] == [1.0, 2.0]


def test_scores_of_an_earlier_epoch_are_told_as_such(folder, tmp_path):
    shutil.copytree(folder / "a0", tmp_path / "a0")
    metrics = RunFolder(tmp_path / "a0").metrics
    before = metrics.read_text()
    step = json.loads(before.splitlines()[0]) | {"step": 9, "epoch": 2.25}
    metrics.write_text(before + json.dumps(step) + "\n")
    (own,) = data_of(write_report([tmp_path / "a0"], resamples=3))["runs"]
    assert own["notes"] == ["The scores are those after epoch 2; the run has gone on to epoch 2.25 since."]
    metrics.write_text(before)
    (own,) = data_of(write_report([tmp_path / "a0"], resamples=3))["runs"]
    assert own["notes"] == []


def test_folders_whose_names_are_no_text_are_compared(folder, tmp_path):
    bad = tmp_path / os.fsdecode(b"caf\xe9\x1b[2J")
    for name in ("a0", "b0"):
        shutil.copytree(folder / name, bad / name)
    own = data_of(write_report([bad / "a0", bad / "b0"], tmp_path / "r.html", resamples=9))
    assert "caf\\udce9\\u001b[2J" in own["runs"][0]["name"]
    assert own["comparisons"]["bbox"]["groups"][0]["runs"] == [own["runs"][0]["name"]]


def test_pictures_outside_of_the_image_folder_are_not_shown(folder, tmp_path):
    for name in ("a0", "val"):
        shutil.copytree(folder / name, tmp_path / name)
    shutil.copy(folder / "val/1.jpg", tmp_path / "secret.jpg")
    names = re.sub(r'"file_name":"\d+\.jpg"', '"file_name":"../secret.jpg"', (folder / "val.json").read_text())
    (tmp_path / "val.json").write_text(names)
    places = ("--annotations", tmp_path / "val.json", "--images", tmp_path / "val", "--resamples", 9)
    assert main([str(word) for word in ("report", tmp_path / "a0", *places)]) == 0
    (own,) = data_of(tmp_path / "a0/report.html")["runs"]
    assert own["pictures"] == {"bbox": {"worst": [], "best": []}}
    assert "leads out of the image folder" in own["notes"][0]


def test_open_shows_the_file_and_says_where_there_is_no_browser(folder, tmp_path, monkeypatch, capsys):
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda address: opened.append(address) or len(opened) == 1)
    for _ in range(2):
        words = ("report", folder / "a0", "--out", tmp_path / "r.html", "--resamples", 3, "--open")
        assert main([str(word) for word in words]) == 0
    assert opened == [(tmp_path / "r.html").as_uri()] * 2
    assert capsys.readouterr().out.count("no browser was found") == 1


def test_the_verb_writes_into_the_run_and_refuses_in_one_line(folder, tmp_path, capsys):
    shutil.copytree(folder / "a0", tmp_path / "a0")
    assert main(["report", str(tmp_path / "a0"), "--resamples", "9"]) == 0
    assert str(tmp_path / "a0/report.html") in capsys.readouterr().out.replace("\n", "")
    assert (tmp_path / "a0/report.html").stat().st_size < 1_000_000

    def refused(*words: object) -> str:
        assert main(["report", *map(str, words)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "no such folder" in refused(tmp_path / "none")
    assert "it has no recipe.yaml" in refused(tmp_path)
    assert "is a folder: name a file" in refused(tmp_path / "a0", "--out", tmp_path)
    assert "named twice" in refused(tmp_path / "a0", tmp_path / "a0")
    environment = (tmp_path / "a0/environment.json").read_text()
    for broken in ("[]", '{"sessions": [{"versions": []}]}', '{"sessions": [{"devices": [3]}]}'):
        (tmp_path / "a0/environment.json").write_text(broken)
        assert "environment.json" in refused(tmp_path / "a0")
    (tmp_path / "a0/environment.json").write_text(environment)
    (tmp_path / "a0/metrics.jsonl").write_text("nothing\n{}\n")
    assert "metrics.jsonl line 1" in refused(tmp_path / "a0")
    steps = {"epoch": 1.0, "learning_rate": 0.1, "seconds": 1.0}
    for line in (
        {"loss": 1.0},
        {"evaluation": {}},
        {"evaluation": {"bbox": {"AP": "x"}}},
        {"loss": 1, "noise": 3} | steps,
    ):
        (tmp_path / "a0/metrics.jsonl").write_text(json.dumps({"step": 7} | line) + "\n")
        assert "metrics.jsonl: a line of step 7 is none that a training writes" in refused(tmp_path / "a0")
