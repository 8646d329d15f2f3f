import json
from pathlib import Path

import pytest

from data_factories import two_images, write_set
from megdet.cli.main import main


@pytest.fixture
def files(tmp_path, monkeypatch) -> tuple[Path, Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return write_set(tmp_path, two_images())


def printed(capsys, *words):
    assert main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_data_set_goes_out_to_yolo_and_comes_back(files, capsys):
    out = printed(capsys, "data", "convert", "--from", "coco", "--to", "yolo", files[0], "yolo", "--images", files[1])
    assert out == {"folder": "yolo", "split": "instances", "images": 2, "boxes": 2, "crowds": 1}
    (part,) = printed(capsys, "data", "convert", "--from", "yolo", "yolo", "back")["parts"]
    assert (part["images"], part["boxes"], part["classes"]) == (2, 2, ["cat", "dog"])
    assert main(["data", "check", part["annotations"], part["image_folder"]]) == 0


def test_a_split_that_is_merged_again_has_all_images(files, capsys):
    parts = printed(capsys, "data", "split", files[0], "parts", "--parts", "a=1,b=1")
    assert [own["images"] for own in parts.values()] == [1, 1]
    both = [word for name in "ab" for word in ("--data", f"parts/{name}.json", files[1])]
    merged = printed(capsys, "data", "merge", "merged", *both)
    assert (merged["images"], merged["boxes"], merged["classes"]) == (2, 3, ["cat", "dog"])
    assert main(["data", "check", merged["annotations"], merged["image_folder"]]) == 0
    capsys.readouterr()
    assert printed(capsys, "data", "sample", files[0], "one.json", "--images", 1)["images"] == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("convert", "--from", "coco", "FILE", "out"), "give --to voc or --to yolo"),
        (("convert", "--from", "voc", "--to", "yolo", "FILE", "out"), "convert voc to COCO first"),
        (("convert", "--from", "coco", "--to", "voc", "FILE", "out"), "--to voc needs --images"),
        (("convert", "--from", "yolo", "FILE", "out", "--zero-based"), "--zero-based has no effect with --from yolo"),
        (("convert", "--from", "csv", "absent", "out"), "absent: no such folder"),
        (("split", "FILE", "out", "--parts", "a=1"), "name two parts or more"),
        (("split", "FILE", "out", "--parts", "../a=1,b=1"), "names and weights are expected"),
        (("split", "FILE", "out", "--parts", "a=0,b=1"), "0"),
        (("split", "FILE", "out", "--parts", "a=1,b=1,c=1"), "2 images are too few for 3 parts"),
        (("merge", "out", "--data", "FILE", "absent"), "absent: no such folder"),
        (("merge", "out", "--data", "FILE", "IMAGES", "--data", "FILE", "IMAGES"), "no such"),
        (("sample", "FILE", "FILE", "--images", "1"), "exists"),
        (("sample", "FILE", "out.json", "--images", "3"), "3 images were asked for, it has 2"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(files, refused, words, said):
    places = {"FILE": files[0], "IMAGES": files[1]}
    if words[:4] == ("merge", "out", "--data", "FILE") and len(words) > 5:
        said = "a.jpg is in"
        (files[0].parent / "copy.json").write_text(files[0].read_text())
        words = (*words[:6], "copy.json", "IMAGES")
    assert said in refused("data", *(places.get(word, word) for word in words))
    assert not Path("out").exists()


def test_folders_beside_the_working_folder_are_merged(files, tmp_path, monkeypatch, capsys):
    (tmp_path / "project").mkdir()
    link = tmp_path / "project" / "link"
    link.symlink_to(files[1], target_is_directory=True)
    monkeypatch.chdir(tmp_path / "project")
    parts = printed(capsys, "data", "split", files[0], "parts", "--parts", "a=1,b=1")
    for images in (f"../{files[1].relative_to(tmp_path)}", f"link/../{files[1].name}"):
        out = f"out{len(images)}"
        words = ("--data", parts["a"]["annotations"], images, "--data", parts["b"]["annotations"], files[1])
        assert printed(capsys, "data", "merge", out, *words)["images"] == 2


def test_a_table_without_rows_is_refused(tmp_path, capsys):
    write_set(tmp_path, two_images())
    (tmp_path / "t.csv").write_text("filename,class,xmin,ymin,xmax,ymax\n")
    words = ["data", "convert", "--from", "csv", str(tmp_path / "t.csv"), str(tmp_path / "out")]
    assert main([*words, "--images", str(tmp_path)]) == 2
    assert "t.csv: no image in it, so there is nothing to convert" in " ".join(capsys.readouterr().err.split())


def test_links_below_a_folder_beside_stay(files, tmp_path, monkeypatch, capsys):
    parts = printed(capsys, "data", "split", files[0], "parts", "--parts", "a=1,b=1")
    for name in "ab":
        (tmp_path / "far" / name).mkdir(parents=True)
        (tmp_path / "links").mkdir(exist_ok=True)
        (tmp_path / "links" / name).symlink_to(tmp_path / "far" / name, target_is_directory=True)
        (row,) = json.loads(Path(parts[name]["annotations"]).read_text())["images"]
        (tmp_path / "far" / name / row["file_name"]).parent.mkdir(parents=True, exist_ok=True)
        (files[1] / row["file_name"]).rename(tmp_path / "far" / name / row["file_name"])
    (tmp_path / "beside").mkdir()
    monkeypatch.chdir(tmp_path / "beside")
    words = [word for name in "ab" for word in ("--data", f"../parts/{name}.json", f"../links/{name}")]
    assert printed(capsys, "data", "merge", "out", *words)["images"] == 2
