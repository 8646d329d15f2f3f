"""Images behind links, in another Unicode form or in another case than the annotations have."""

import json
import unicodedata
from pathlib import Path

import pytest

from data_factories import save_image
from megdet.data.formats.csv_table import convert_csv
from megdet.data.formats.image_files import ImageFiles, visible_files
from megdet.data.formats.voc import convert_voc
from megdet.data.formats.yolo import convert_yolo
from megdet.errors import InputError

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))


def names_below(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in visible_files(folder)]


def test_images_behind_a_link_to_their_folder_are_found(tmp_path):
    save_image(tmp_path / "disk" / "deep" / "a.jpg", 40, 30)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "images").symlink_to(tmp_path / "disk")
    (tmp_path / "set" / "labels.csv").write_text("filename,class,xmin,ymin,xmax,ymax\na.jpg,cat,1,2,3,4\n")
    (found,) = convert_csv(tmp_path / "set", tmp_path / "out")
    assert found.image_folder == tmp_path / "set" / "images" / "deep"
    assert json.loads(found.annotations_file.read_text())["images"][0]["file_name"] == "a.jpg"


def test_a_folder_counts_once_and_links_in_circles_end(tmp_path):
    save_image(tmp_path / "disk" / "a.jpg", 40, 30)
    save_image(tmp_path / "set" / "photos" / "b.jpg", 40, 30)
    save_image(tmp_path / "set" / ".hidden" / "c.jpg", 40, 30)
    links = {
        "set/album": tmp_path / "set" / "photos",  # it comes before the folder itself
        "set/photos/up": tmp_path / "set",
        "set/top": tmp_path,
        "set/one": tmp_path / "disk",
        "set/two": tmp_path / "disk",
        "disk/back": tmp_path / "set",
        "disk/self": tmp_path / "disk" / "self",
        "set/.secret": tmp_path / "disk",
    }
    for name, target in links.items():
        (tmp_path / name).symlink_to(target)
    assert names_below(tmp_path / "set") == ["one/a.jpg", "photos/b.jpg"]
    assert names_below(tmp_path / "set" / "one") == ["a.jpg", "back/photos/b.jpg"]


@pytest.mark.parametrize(("named", "there"), [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
def test_both_forms_of_an_accent_are_one_name(tmp_path, named, there):
    for folder in ("train", "val"):
        save_image(tmp_path / f"caf{there}" / folder / f"{there}.jpg", 40, 30)
        save_image(tmp_path / folder / f"{there}.jpg", 40, 30)
    files = ImageFiles(tmp_path)
    assert files.find(f"caf{named}/val/{named}.jpg", "x").parent == tmp_path / f"caf{there}" / "val"
    assert ImageFiles(tmp_path / "val").find(named, "x").name == f"{there}.jpg"


def test_where_both_forms_are_files_the_one_that_is_written_is_taken(tmp_path):
    for name in (COMPOSED, DECOMPOSED):
        save_image(tmp_path / f"{name}.jpg", 40, 30)
    there = {file.stem for file in tmp_path.iterdir()}  # one, where the file system takes both for one name
    files = ImageFiles(tmp_path)
    for name in (COMPOSED, DECOMPOSED):
        assert files.find(f"{name}.jpg", "x").stem in ({name} if name in there else there)


def test_voc_and_yolo_match_both_forms_too(tmp_path):
    voc, yolo = tmp_path / "voc", tmp_path / "yolo"
    for folder in (voc / "JPEGImages", yolo):
        save_image(folder / f"{DECOMPOSED}.jpg", 40, 30)
    for folder in ("Annotations", "ImageSets/Main"):
        (voc / folder).mkdir(parents=True)
    (voc / "Annotations" / f"{COMPOSED}.xml").write_text("<a/>")
    (voc / "ImageSets" / "Main" / "train.txt").write_text(f"{DECOMPOSED}\n", encoding="utf-8")
    assert convert_voc(voc, tmp_path / "a")[0].num_images == 1
    (yolo / f"{COMPOSED}.txt").write_text("0 0.5 0.5 1 1\n")
    (yolo / "classes.txt").write_text("cat\n")
    assert convert_yolo(yolo, tmp_path / "b")[0].num_boxes == 1


def test_the_only_image_of_a_name_in_another_case_is_taken(tmp_path):
    save_image(tmp_path / "A.JPG", 40, 30)
    files = ImageFiles(tmp_path)
    assert [files.find(named, "x") for named in ("a.jpg", "A.jpg", "a", "A.JPG")] == [tmp_path / "A.JPG"] * 4
    with pytest.raises(InputError, match=r"x: no image 'a\.png' in .* or below: put it there"):
        files.find("a.png", "x")


def test_of_several_images_in_another_case_none_is_guessed(tmp_path):
    for name in ("one/B.JPG", "two/b.jpg"):
        save_image(tmp_path / name, 40, 30)
    files = ImageFiles(tmp_path)
    assert files.find("b.jpg", "x") == tmp_path / "two" / "b.jpg"
    with pytest.raises(InputError, match=r"x: its image may be .*one/B\.JPG or .*two/b\.jpg: keep one"):
        files.find("b.JPG", "x")
    assert files.find("b.JPG", "x", beside=tmp_path / "one") == tmp_path / "one" / "B.JPG"
    assert files.find("One/b.JPG", "x") == tmp_path / "one" / "B.JPG", "folders count in another case too"
    assert files.find("One/b.jpg", "x") == tmp_path / "two" / "b.jpg", "a name as it is written comes first"


def test_labels_and_xml_files_find_images_in_another_case(tmp_path):
    voc, yolo = tmp_path / "voc", tmp_path / "yolo"
    save_image(voc / "IMG_1.JPG", 40, 30)
    (voc / "other.xml").write_text("<annotation><filename>img_1.jpg</filename></annotation>")
    assert convert_voc(voc, tmp_path / "a")[0].num_images == 1
    save_image(yolo / "IMG_1.JPG", 40, 30)
    (yolo / "img_1.txt").write_text("0 0.5 0.5 1 1\n")
    (yolo / "classes.txt").write_text("cat\n")
    assert convert_yolo(yolo, tmp_path / "b")[0].num_boxes == 1
