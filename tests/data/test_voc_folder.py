"""Pascal VOC as annotation tools leave it: XML and images in any folders."""

import json
from pathlib import Path

import pytest

from data_factories import save_image
from megdet.cli.main import main
from megdet.data.formats.voc import convert_voc
from megdet.data.formats.voc_folder import find_voc, listed_files
from megdet.errors import InputError


def lay_out(folder: Path, *names: str, named: dict[str, str] | None = None) -> Path:
    """Images, XML files of one object and lists of splits by their names; `named` gives an XML another `filename`."""
    for name in names:
        path = folder / name.partition("=")[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".txt":
            path.write_text("\n".join(name.partition("=")[2].split(",")) + "\n")
        elif path.suffix == ".xml":
            box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
            filename = (named or {}).get(name, f"{path.stem}.jpg")
            text = f"<filename>{filename}</filename><object><name>dog</name>{box}</object>"
            path.write_text(f"<annotation>{text}</annotation>")
        else:
            save_image(path, 40, 30)
    return folder


def converted(folder: Path, out: Path) -> tuple[dict[str, list[str]], Path]:
    """The file names of every split, and the folder that they are relative to."""
    parts = convert_voc(folder, out)
    (images,) = {part.image_folder for part in parts}
    found = {}
    for part in parts:
        rows = json.loads(part.annotations_file.read_text())["images"]
        assert all((images / row["file_name"]).is_file() for row in rows)
        assert all((row["width"], row["height"]) == (40, 30) for row in rows)
        found[part.annotations_file.stem] = [row["file_name"] for row in rows]
    return found, images.relative_to(folder)


@pytest.mark.parametrize(
    ("names", "splits", "images"),
    [
        pytest.param(["a.xml", "a.jpg", "b.xml", "b.PNG"], {"all": ["a.jpg", "b.PNG"]}, ".", id="all in one folder"),
        pytest.param(
            ["train/a.xml", "train/a.jpg", "valid/a.xml", "valid/a.jpg", "test/c.xml", "test/c.jpg"],
            {"test": ["test/c.jpg"], "train": ["train/a.jpg"], "valid": ["valid/a.jpg"]},
            ".",
            id="a folder a split",
        ),
        pytest.param(
            ["Annotations/train/a.xml", "Annotations/val/a.xml", "JPEGImages/val/a.jpg", "JPEGImages/train/a.jpg"],
            {"train": ["train/a.jpg"], "val": ["val/a.jpg"]},
            "JPEGImages",
            id="splits within kinds",
        ),
        pytest.param(
            ["Train/xml/a.xml", "Train/images/a.jpg", "Test/xml/b.xml", "Test/images/b.jpg"],
            {"test": ["Test/images/b.jpg"], "train": ["Train/images/a.jpg"]},
            ".",
            id="kinds within splits",
        ),
        pytest.param(
            ["cats/1.xml", "cats/1.jpg", "dogs/1.xml", "dogs/1.jpg", ".idea/misc.xml"],
            {"all": ["cats/1.jpg", "dogs/1.jpg"]},
            ".",
            id="the same names in other folders",
        ),
        pytest.param(
            ["labels/cats/1.xml", "labels/dogs/1.xml", "images/cats/1.jpg", "images/dogs/1.jpg"],
            {"all": ["cats/1.jpg", "dogs/1.jpg"]},
            "images",
            id="like folders",
        ),
        pytest.param(
            ["xml/train/a.xml", "xml/val/b.xml", "pictures/a.jpg", "pictures/b.jpg"],
            {"train": ["a.jpg"], "val": ["b.jpg"]},
            "pictures",
            id="one folder of images",
        ),
        pytest.param(
            [
                *("Annotations/a.xml", "Annotations/b c.xml", "Annotations/d.xml", "Annotations/b.xml"),
                *("JPEGImages/a.jpg", "JPEGImages/b c.jpg", "JPEGImages/d.jpg"),
                "ImageSets/Main/train.txt=a 2,b c +1,d 1",
            ],
            {"train": ["a.jpg", "b c.jpg", "d.jpg"]},
            "JPEGImages",
            id="other columns in a list",
        ),
        pytest.param(
            [
                *("VOC/Annotations/a.xml", "VOC/Annotations/b.xml", "VOC/JPEGImages/a.jpg", "VOC/JPEGImages/b.jpg"),
                *("VOC/ImageSets/Main/train.txt=b", "VOC/ImageSets/Main/mine.txt=a"),
            ],
            {"train": ["b.jpg"]},
            "VOC/JPEGImages",
            id="the 2007 layout a folder further down",
        ),
        pytest.param(
            [
                "x/a.xml",
                "x/a.jpg",
                "y/a.xml",
                "y/a.jpg",
                "ImageSets/Main/one.txt=x/a",
                "ImageSets/Main/two.txt=y/a.jpg",
            ],
            {"one": ["x/a.jpg"], "two": ["y/a.jpg"]},
            ".",
            id="lists with folders",
        ),
    ],
)
def test_xml_images_and_splits_are_found_in_any_folders(tmp_path, names, splits, images):
    assert converted(lay_out(tmp_path / "set", *names), tmp_path / "out") == (splits, Path(images))


@pytest.mark.parametrize(
    "named", ["photo 7.jpg", "photo 7", "C:\\\\Users\\\\me\\\\photo 7.jpg", "/home/me/photo 7.jpg"]
)
def test_an_image_of_another_name_is_found_by_the_filename_in_the_xml(tmp_path, named):
    folder = lay_out(tmp_path / "set", "xml/0001.xml", "pictures/photo 7.jpg", named={"xml/0001.xml": named})
    assert converted(folder, tmp_path / "out") == ({"all": ["photo 7.jpg"]}, Path("pictures"))


def test_the_image_beside_the_xml_comes_before_the_one_it_names(tmp_path):
    folder = lay_out(tmp_path / "set", "a.xml", "a.png", "b.xml", "b.jpg", named={"a.xml": "b.jpg"})
    assert converted(folder, tmp_path / "out")[0] == {"all": ["a.png", "b.jpg"]}


def test_of_two_images_beside_the_xml_it_names_one(tmp_path):
    folder = lay_out(tmp_path / "set", "a.xml", "a.png", "a.jpg", named={"a.xml": "a.png"})
    assert converted(folder, tmp_path / "out")[0] == {"all": ["a.png"]}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["train/a.xml", "train/a.jpg", "b.xml", "b.jpg"],
            r"b\.xml: it is not in the folder of a split, while .*train/a\.xml is",
        ),
        (["train/val/a.xml", "train/val/a.jpg"], r"a\.xml: its folders name the splits train and val: rename one"),
        (["a.xml", "a.png", "a.bmp"], r"a\.xml: its image may be .*a\.bmp or .*a\.png: keep one"),
        (["xml/a.xml", "x/a.jpg", "y/a.jpg"], r"a\.xml: its image may be .*x/a\.jpg or .*y/a\.jpg: keep one"),
        (["train/a.xml", "val/a.jpg"], r"no image a\.\* for a\.xml of the split train, and none called 'a\.jpg'"),
        (["x/a.xml", "y/a.xml", "a.jpg"], r"x/a\.xml and .*y/a\.xml are both of .*a\.jpg: remove one"),
        (
            ["notes.xml", "a.xml", "a.jpg"],
            r"no image notes\.\* .* an XML file that is not an annotation must leave the folder",
        ),
        (
            ["1/a.xml", "1/a.jpg", "1/ImageSets/Main/train.txt=a", "2/ImageSets/Main/train.txt=a"],
            r"several data sets lie in it, .*/1 and .*/2 have ImageSets: convert one",
        ),
        (["1/a.xml", "1/a.jpg", "1/ImageSets/Main/train.txt=a", "b.xml", "b.jpg"], r"b\.xml: it lies outside of .*/1"),
        (
            ["x/a.xml", "x/a.jpg", "y/a.xml", "y/a.jpg", "ImageSets/Main/train.txt=a"],
            r"train\.txt: a may be .*x/a\.xml or .*y/a\.xml: write its folder too",
        ),
    ],
)
def test_what_may_mean_two_things_is_refused_in_one_line_with_the_mend(tmp_path, names, message):
    with pytest.raises(InputError, match=message) as caught:
        convert_voc(lay_out(tmp_path / "set", *names), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert len(str(caught.value).replace(str(tmp_path), "")) < 300


def test_a_split_that_is_a_folder_can_be_asked_for(tmp_path):
    folder = lay_out(tmp_path / "set", "train/a.xml", "train/a.jpg", "test/b.xml", "test/b.jpg")
    (part,) = convert_voc(folder, tmp_path / "out", ["test"])
    assert (part.annotations_file.name, part.image_folder) == ("test.json", folder / "test")
    with pytest.raises(InputError, match=r"set: val: no such split; there are test, train"):
        convert_voc(folder, tmp_path / "out", ["val"])


def test_a_converted_folder_can_be_checked_and_converted_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = lay_out(tmp_path / "set", "train/a.xml", "train/a.jpg", "test/b.xml", "test/b.jpg")
    out = folder / "coco"
    for _ in range(2):  # the link to the images that lies within them is not followed
        assert main(["data", "convert", "--from", "voc", str(folder), str(out)]) == 0
        assert len(find_voc(folder).xml_files) == 2
    for split in ("train", "test"):
        assert main(["data", "check", str(out / "annotations" / f"{split}.json"), str(out / "images")]) == 0
    assert "fit to train on" in capsys.readouterr().out


def test_a_missing_file_of_a_list_is_not_taken_for_another_with_a_column(tmp_path):
    names = ["street.xml", "street 1.xml", "other.xml"]
    lay_out(tmp_path, *(f"Annotations/{name}" for name in names), "ImageSets/Main/train.txt=street 1,street 2")
    found = find_voc(tmp_path)
    with pytest.raises(InputError, match=r"Annotations/street 2\.xml: no such file, but the split train names it"):
        listed_files(found, "train", ["street 1", "street 2"])
    assert [path.name for path in listed_files(found, "train", ["street -1", "other 1"])] == ["street.xml", "other.xml"]


def test_the_filename_comes_before_an_image_whose_name_is_in_another_case(tmp_path):
    folder = lay_out(tmp_path / "voc", "a.xml", "A.jpg", "A.xml", "b.jpg", named={"a.xml": "b.jpg"})
    assert converted(folder, tmp_path / "out")[0] == {"all": ["A.jpg", "b.jpg"]}


def test_an_image_in_another_case_and_one_that_the_xml_names_may_both_be_meant(tmp_path):
    folder = lay_out(tmp_path / "voc", "a.xml", "A.jpg", "b.jpg", named={"a.xml": "b.jpg"})
    (xml_file,) = find_voc(folder).xml_files
    with pytest.raises(InputError, match=r"a\.xml: its image may be .*A\.jpg or .*b\.jpg: keep one, or put"):
        find_voc(folder).image_of(xml_file, "b.jpg", "all")
    assert find_voc(folder).image_of(xml_file, "c.jpg", "all") == folder / "A.jpg"


def test_an_image_elsewhere_with_an_xml_of_its_own_is_not_taken_for_another(tmp_path):
    names = ["x/b.jpg", "y/a.jpg", "y/b.xml"]
    folder = lay_out(tmp_path / "one", *names, named={"y/b.xml": "c.jpg"})
    assert converted(folder, tmp_path / "out") == ({"all": ["b.jpg"]}, Path("x"))
    folder = lay_out(tmp_path / "two", *names, "x/b.xml", named={"y/b.xml": "a.jpg"})
    assert converted(folder, tmp_path / "out")[0] == {"all": ["x/b.jpg", "y/a.jpg"]}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a -1", "b  1", "c  1"], r"Annotations/c.xml: no such file, but the split train names it"),
        (["a 1", "a 1"], r"a.xml is named twice: remove one of the two lines"),
    ],
)
def test_the_message_on_a_list_names_the_line_that_is_wrong(tmp_path, lines, message):
    names = ["Annotations/a.xml", "Annotations/b.xml", "JPEGImages/a.jpg", "JPEGImages/b.jpg"]
    folder = lay_out(tmp_path / "voc", *names, f"ImageSets/Main/train.txt={','.join(lines)}")
    with pytest.raises(InputError, match=message):
        listed_files(find_voc(folder), "train", lines)


def test_the_image_beside_in_another_case_comes_before_one_elsewhere(tmp_path):
    folder = lay_out(tmp_path / "voc", "train/a/img.xml", "train/a/IMG.jpg", "train/b/img.jpg", "train/b/img.xml")
    found = find_voc(folder)
    images = {file: found.image_of(file, "img.jpg", "train").relative_to(folder) for file in found.xml_files}
    assert sorted(map(str, images.values())) == ["train/a/IMG.jpg", "train/b/img.jpg"]


def test_a_list_without_a_name_is_refused(tmp_path):
    folder = lay_out(tmp_path / "voc", "Annotations/a.xml", "JPEGImages/a.jpg", "ImageSets/Main/train.txt=")
    with pytest.raises(InputError, match=r"train.txt: it names no image"):
        convert_voc(folder, tmp_path / "out")


def test_a_list_without_a_name_beside_others_is_left_out_unless_it_is_asked_for(tmp_path):
    lists = ["ImageSets/Main/train.txt=a", "ImageSets/Main/val.txt="]
    folder = lay_out(tmp_path / "voc", "Annotations/a.xml", "JPEGImages/a.jpg", *lists)
    assert converted(folder, tmp_path / "out")[0] == {"train": ["a.jpg"]}
    with pytest.raises(InputError, match=r"val.txt: it names no image: write their names, or delete it"):
        convert_voc(folder, tmp_path / "out", ["train", "val"])


def test_a_filename_in_several_folders_does_not_matter_where_the_xml_has_its_image(tmp_path):
    names = ["a.xml", "a.jpg", "x/photo.jpg", "y/photo.jpg"]
    folder = lay_out(tmp_path / "voc", *names, named={"a.xml": "photo.jpg"})
    assert converted(folder, tmp_path / "out")[0] == {"all": ["a.jpg"]}


@pytest.mark.parametrize(
    "names",
    [
        ["setA/1.xml", "setA/IMG_0001.jpg", "raw/1.jpg"],
        ["setA/1.xml", "setA/IMG_0001.jpg", "raw/1.jpg", "raw2/1.jpg"],
        ["Annotations/1.xml", "JPEGImages/IMG_0001.jpg", "thumbs/1.jpg"],
    ],
)
def test_the_image_that_is_named_and_near_comes_before_one_elsewhere(tmp_path, names):
    folder = lay_out(tmp_path / "voc", *names, named={names[0]: "IMG_0001.jpg"})
    assert converted(folder, tmp_path / "out")[0] == {"all": ["IMG_0001.jpg"]}


def test_the_image_of_another_xml_is_not_taken_by_a_stale_filename(tmp_path):
    names = ["Annotations/1.xml", "Annotations/2.xml", "JPEGImages/2.jpg", "other/1.jpg"]
    folder = lay_out(tmp_path / "voc", *names, named={"Annotations/1.xml": "2.jpg"})
    assert converted(folder, tmp_path / "out")[0] == {"all": ["other/1.jpg", "JPEGImages/2.jpg"]}


@pytest.mark.parametrize("other", ["xml/a.xml", "JPEGImages/a.xml"])
@pytest.mark.parametrize("named", ["a.jpg", "frame_17.jpg", "b.jpg"])
def test_a_second_xml_of_a_name_that_no_list_names_does_not_take_the_image(tmp_path, other, named):
    names = ["Annotations/a.xml", "Annotations/b.xml", "JPEGImages/a.jpg", "JPEGImages/b.jpg", other]
    lists = "ImageSets/Main/train.txt=Annotations/a"
    folder = lay_out(tmp_path / "voc", *names, lists, named={"Annotations/a.xml": named, other: named})
    assert converted(folder, tmp_path / "out")[0] == {"train": ["a.jpg"]}


def test_the_image_beside_that_is_named_comes_before_several_elsewhere(tmp_path):
    names = ["y/img.xml", "y/a.jpg", "x/img.jpg", "z/img.jpg"]
    folder = lay_out(tmp_path / "voc", *names, named={"y/img.xml": "a.jpg"})
    assert converted(folder, tmp_path / "out") == ({"all": ["a.jpg"]}, Path("y"))
