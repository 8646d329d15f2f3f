import json
from pathlib import Path

import pytest

from data_factories import box_row, image_row, write_set
from megdet.cli.main import main


@pytest.fixture
def files(tmp_path, monkeypatch) -> tuple[str, str]:
    """Ten images of 60 x 40 with two boxes each, in a folder with a space."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    document = {
        "images": [image_row(number, f"{number}.jpg", 60, 40) for number in range(10)],
        "annotations": [box_row(number, number // 2, 1, [5, 5, 20, 20]) for number in range(20)],
        "categories": [{"id": 1, "name": "cat"}],
    }
    folder = tmp_path / "my set"
    folder.mkdir()
    annotations, images = write_set(folder, document)
    return str(annotations), str(images)


def test_a_new_recipe_is_described_as_it_is(files, capsys):
    assert main(["recipes", "new", "mine", "--data", *files, "--epochs", "7", "--json"]) == 0
    printed = capsys.readouterr()
    values = {own["key"]: own["value"] for own in json.loads(printed.out)["values"]}
    assert "warning: without --val the training images are evaluated" in printed.err
    assert "random weights" in printed.err
    assert main(["describe", "mine.yaml", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert (rows["batch_size"], rows["epochs"]) == (8, 7) == (values["batch_size"], values["schedule.epochs"])
    assert rows["steps"] == -(-7 * 10 // 8)
    assert rows["rate_after_warmup"] == pytest.approx(values["optimizer.base_lr"] / 2**0.5)


def test_the_statistics_end_with_the_advice(files, capsys):
    assert main(["data", "stats", *files, "--short-edge", "32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    advised = {own["key"]: own["value"] for own in found["advice"]["values"]}
    assert advised["data.short_edges"] == [32]
    assert advised["data.max_long_edge"] == 48
    assert found["quantiles"]["box_sizes"] == [20.0] * 7
    assert main(["data", "stats", *files]) == 0
    assert "model.anchors.sizes" in capsys.readouterr().out


def test_the_statistics_of_images_without_boxes_have_no_advice(files, capsys):
    document = json.loads(Path(files[0]).read_text())
    Path(files[0]).write_text(json.dumps({**document, "annotations": []}))
    assert main(["data", "stats", *files, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["advice"] is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "needs a name"),
        (("mine",), "needs --data ANNOTATIONS IMAGES"),
        (("demo", "--data", "FILE", "IMAGES"), "name of a packaged recipe"),
        (("mine", "--data", "none.json", "IMAGES"), "none.json"),
        (("mine", "--data", "FILE", "IMAGES", "--val", "none.json", "IMAGES"), "none.json"),
        (("mine", "--data", "FILE", "IMAGES", "--weights", "none.pth"), "none.pth: no such file"),
        (("mine", "--data", "FILE", "IMAGES", "--batch-size", "11"), "batch size 11 is more than the 10 images"),
        (("mine", "--data", "FILE", "IMAGES", "--backbone", "vgg"), "invalid choice: 'vgg'"),
        (("my set/file/mine", "--data", "FILE", "IMAGES"), "my set/file cannot be written"),
    ],
)
def test_a_new_recipe_that_cannot_be_is_refused_in_one_line(files, refused, words, said):
    places = {"FILE": files[0], "IMAGES": files[1]}
    Path("my set/file").write_text("no folder")
    assert said in refused("recipes", "new", *(places.get(word, word) for word in words))
    assert not Path("mine.yaml").exists()


def test_the_folder_of_a_new_recipe_is_made(files):
    assert main(["recipes", "new", "runs/new/mine", "--data", *files]) == 0
    assert Path("runs/new/mine.yaml").read_text().startswith("# mine: 10 images, 20 boxes, 1 class.\n")


def test_a_new_recipe_is_not_evaluated_on_a_class_that_it_does_not_train(files, refused):
    document = json.loads(Path(files[0]).read_text())
    document["categories"].append({"id": 2, "name": "cats"})
    Path("val.json").write_text(json.dumps(document))
    said = refused("recipes", "new", "mine", "--data", *files, "--val", "val.json", files[1])
    assert "val.json: class 'cats' is not among the detector's 1 classes; did you mean 'cat'? rename it there" in said
    assert not Path("mine.yaml").exists()


def test_options_of_new_are_refused_elsewhere(refused):
    assert "unexpected '--epochs': only `megdet recipes new NAME" in refused("recipes", "demo", "--epochs", "3")
    assert "unexpected 'bccd'" in refused("recipes", "demo", "bccd")
