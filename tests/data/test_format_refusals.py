"""What a bad file of a labelling tool is told: its place, what is wrong, before anything is written."""

import json

import pytest

from data_factories import save_image
from megdet.data.formats.csv_table import convert_csv
from megdet.data.formats.cvat import convert_cvat
from megdet.data.formats.label_studio import convert_label_studio
from megdet.data.formats.labelme import convert_labelme
from megdet.errors import InputError

SIZE = (40, 30)


@pytest.fixture
def photos(tmp_path):
    """Two images of one name in two folders."""
    for name in ("train/a.jpg", "val/a.jpg"):
        save_image(tmp_path / "photos" / name, *SIZE)
    return tmp_path / "photos"


HEADER = "filename,class,xmin,ymin,xmax,ymax\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", r"labels\.csv: its first line needs a column for each of image: filename"),
        (HEADER + "val/a.jpg,cat,1,2,3\n", r"labels\.csv:2: 5 fields, fewer"),
        (HEADER + "\nval/a.jpg,cat,1,x,3,4\n", r"labels\.csv:3: four numbers .* found \['1', 'x', '3', '4'\]"),
        (HEADER + "val/a.jpg,cat,1,nan,3,4\n", r"labels\.csv:2: four numbers"),
        (HEADER + "val/a.jpg,cat,3,2,1,4\n", r"labels\.csv:2: the second corner lies before the first"),
        (HEADER + "val/a.jpg,,1,2,3,4\n", r"labels\.csv:2: the name of the class is empty"),
        (HEADER + ",cat,1,2,3,4\n", r"labels\.csv:2: the name of the image is empty"),
        (HEADER + "absent.jpg,cat,1,2,3,4\n", r"labels\.csv:2: no image 'absent\.jpg' in"),
        (HEADER + "a.jpg,cat,1,2,3,4\n", r"labels\.csv:2: its image may be .*train/a\.jpg or .*val/a\.jpg: keep one"),
        (HEADER + '"val/a.jpg,cat\n', r"labels\.csv:\d: not a valid CSV line"),
        ("filename,width,height,class,xmin,ymin,xmax,ymax\nval/a.jpg,4,3,x,1,2,3,4\n", "says 4 x 3 pixels, but"),
    ],
)
def test_a_bad_table_is_refused_with_its_line(photos, tmp_path, text, message):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        convert_csv(tmp_path / "labels.csv", tmp_path / "out", photos)
    assert not (tmp_path / "out").exists()


SHAPE = {"label": "x", "points": [[1, 2], [3, 4]], "shape_type": "rectangle"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], r"a\.json: expected object, got array"),
        ({"shapes": []}, "missing required field imagePath"),
        (
            {"imagePath": "val/a.jpg", "shapes": [{**SHAPE, "points": [[1], [2]]}]},
            r"shapes\[0\]\.points\[0\]: expected",
        ),
        ({"imagePath": "val/a.jpg", "shapes": [{**SHAPE, "shape_type": "point"}]}, "shape 1 .'x'.: a 'point' of 2"),
        ({"imagePath": "val/a.jpg", "shapes": [SHAPE, {**SHAPE, "label": " "}]}, "shape 2 has no label"),
        ({"imagePath": "val/a.jpg", "shapes": [{**SHAPE, "shape_type": "polygon"}]}, "a 'polygon' of 2 point"),
        ({"imagePath": "val/a.jpg", "shapes": [], "imageHeight": 3, "imageWidth": 4}, "it says 4 x 3 pixels"),
        ({"imagePath": "../../etc/passwd", "shapes": []}, "no image 'passwd' in"),
    ],
)
def test_a_bad_labelme_file_is_refused_with_its_place(photos, tmp_path, content, message):
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        convert_labelme(tmp_path / "a.json", tmp_path / "out", photos)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<a/>", "no CVAT file: its root is <a>"),
        ("<annotations/>", "no image in this file"),
        ("<annotations><track/></annotations>", "tracks of a video"),
        ('<annotations><image name="x.jpg"/></annotations>', "image 'x.jpg': no image 'x.jpg' in"),
        ("<box/>", "image 'val/a.jpg', box 1: it has no label"),
        ('<tag label="t"/><box label="x" xtl="1"/>', "box 1: ytl is None, not a number"),
        ('<box label="x" xtl="3" ytl="1" xbr="2" ybr="2"/>', "its second corner lies before the first"),
        ('<polygon label="x" points="1,2;3"/>', "polygon 1: its points should be three pairs"),
        ('<points label="x" points="1,2"/>', "points 1: <points> has no box"),
        ('<ellipse label="x" cx="1" cy="1" rx="1" ry="1" rotation="r"/>', "ellipse 1: rotation is 'r', not a number"),
        ("<annotations>", "not valid XML"),
        ('<annotations><image name="val/a.jpg" subset="../x"/></annotations>', "'../x' cannot be the name of a split"),
        ('<ellipse label="x" cx="1" cy="1" rx="1e30" ry="1"/>', "not finite or far too large"),
    ],
)
def test_a_bad_cvat_file_is_refused_with_its_place(photos, tmp_path, content, message):
    if "annotations" not in content and content != "<a/>":
        content = f'<annotations><image name="val/a.jpg">{content}</image></annotations>'
    (tmp_path / "a.xml").write_text(content)
    with pytest.raises(InputError, match=message):
        convert_cvat(tmp_path / "a.xml", tmp_path / "out", photos)


def task(*results, count=1, image="val/a.jpg"):
    return [{"data": {"image": image}, "annotations": [{"result": list(results)}] * count}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "expected array, got object"),
        ([3], r"\[0\]: expected object, got int"),
        (task(count=2), "task 1: 2 annotations: delete all but one"),
        (task({"type": 3}), "task 1: .*export it as JSON again"),
        ([{"data": {}, "annotations": []}], "task 1: no image in it"),
        (task({"type": "rectanglelabels"}), "a region needs one label, found None"),
        (task({"type": "brushlabels", "value": {}}), "a region of type 'brushlabels' has no box"),
        (task({"type": "rectanglelabels", "value": {"rectanglelabels": ["a", "b"]}}), "one label, found .'a', 'b'"),
        (task({"type": "rectanglelabels", "value": {"rectanglelabels": ["a"], "x": "1"}}), "x is '1', not a number"),
        (task({"type": "polygonlabels", "value": {"polygonlabels": ["a"], "points": [[1, 2]]}}), "needs three points"),
        (task({"type": "polygonlabels", "value": {"polygonlabels": ["a"], "points": [1, 2, 3]}}), "x is None, not a"),
        (task(image="/data/upload/2/deadbeef-none.jpg"), "no image 'none.jpg' in"),
        (task() * 2, "val/a.jpg is labelled in .*task 1 too"),
    ],
)
def test_a_bad_label_studio_file_is_refused_with_its_place(photos, tmp_path, content, message):
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        convert_label_studio(tmp_path / "a.json", tmp_path / "out", photos)


def test_images_in_and_outside_of_split_folders_are_refused(photos, tmp_path):
    save_image(photos / "loose.jpg", *SIZE)
    (tmp_path / "labels.csv").write_text(HEADER + "val/a.jpg,cat,1,2,3,4\nloose.jpg,cat,1,2,3,4\n")
    with pytest.raises(InputError, match=r"loose\.jpg: it is not in the folder of a split, while .*val/a\.jpg is"):
        convert_csv(tmp_path / "labels.csv", tmp_path / "out", photos)


def test_a_wrong_size_in_the_second_split_is_seen_before_the_first_is_written(photos, tmp_path):
    header = "filename,width,height,class,xmin,ymin,xmax,ymax\n"
    (tmp_path / "labels.csv").write_text(header + "train/a.jpg,40,30,x,1,2,3,4\nval/a.jpg,4,3,x,1,2,3,4\n")
    with pytest.raises(InputError, match=r"labels\.csv:3: it says 4 x 3 pixels"):
        convert_csv(tmp_path / "labels.csv", tmp_path / "out", photos)
    assert not (tmp_path / "out").exists()
