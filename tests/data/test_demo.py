import json
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_factories import coco_mask
from megdet.data.check import check_dataset
from megdet.data.demo import CLASS_NAMES, DEMO_SETS, DemoSettings, draw_demo, draw_picture
from megdet.data.image import read_image
from megdet.data.shapes import OUTLINES, Shape, coverage, place, visible_parts
from megdet.errors import InputError


def _contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_any_number_of_processes_draws_the_same_set(tmp_path):
    assert draw_demo(tmp_path / "one", num_train=50, num_val=3, workers=1)
    assert draw_demo(tmp_path / "two", num_train=50, num_val=3, workers=2)
    assert _contents(tmp_path / "one") == _contents(tmp_path / "two")
    assert len(_contents(tmp_path / "one")) == 55


def test_a_script_that_starts_its_work_as_it_is_read_is_told_what_to_do(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\nfrom megdet.data.demo import draw_demo\n"
        f"draw_demo(Path({str(tmp_path / 'set')!r}), num_train=50, num_val=3, workers=1 + 1)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode != 0
    # Python's own warnings of the processes that ended may follow it.
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("megdet.errors.InputError")]
    assert "a process that draws pictures has ended; a script of your own must start its work under" in said


def test_a_drawn_set_has_no_problems(tmp_path):
    draw_demo(tmp_path, num_train=40, num_val=20, workers=1)
    for split in ("train", "val"):
        file = tmp_path / "annotations" / f"{split}.json"
        assert check_dataset(file, tmp_path / split, with_masks=True) == []


def test_the_tiny_set_has_objects_in_every_one_of_its_few_pictures_of_several_sizes(tmp_path):
    draw_demo(tmp_path, **asdict(DEMO_SETS["tiny"]))
    for split, count in (("train", 22), ("val", 8)):
        document = json.loads((tmp_path / "annotations" / f"{split}.json").read_text())
        sizes = [(row["height"], row["width"]) for row in document["images"]]
        assert {size: sizes.count(size) for size in set(sizes)}.keys() == {
            (96, 48),
            (48, 96),
            (96, 96),
            (96, 36),
            (36, 96),
            (72, 96),
            (84, 36),
            (36, 84),
        }
        for row, size in zip(document["images"], sizes, strict=True):
            assert read_image(tmp_path / split / row["file_name"]).shape[:2] == size
        assert check_dataset(tmp_path / "annotations" / f"{split}.json", tmp_path / split) == []
        assert len(document["images"]) == count
        assert {row["image_id"] for row in document["annotations"]} == set(range(1, count + 1))


def test_a_complete_set_is_left_alone_and_a_half_drawn_one_completed(tmp_path):
    draw_demo(tmp_path, num_train=4, num_val=2, workers=1)
    expected = _contents(tmp_path)
    (tmp_path / "train" / "000001.jpg").write_bytes(b"mine")
    assert not draw_demo(tmp_path, num_train=4, num_val=2, workers=1)
    assert (tmp_path / "train" / "000001.jpg").read_bytes() == b"mine"

    (tmp_path / "annotations" / "train.json").unlink()
    assert draw_demo(tmp_path, num_train=4, num_val=2, workers=1)
    (tmp_path / "val" / "000000.jpg").unlink()
    assert draw_demo(tmp_path, num_train=4, num_val=2, workers=1)
    assert _contents(tmp_path) == expected


def test_another_set_in_the_folder_is_not_overwritten(tmp_path):
    draw_demo(tmp_path, num_train=1, num_val=1, workers=1)
    expected = _contents(tmp_path)
    for other in ({"seed": 1}, {"hard": True}, {"num_train": 2}, {"size": 64}, {"several_sizes": True}):
        with pytest.raises(InputError, match="demo data of other settings"):
            draw_demo(tmp_path, **{"num_train": 1, "num_val": 1, "workers": 1, **other})
    assert _contents(tmp_path) == expected
    (tmp_path / "annotations" / "val.json").write_text('{"images": []}')
    with pytest.raises(InputError, match=r"val\.json: this is not the demo data"):
        draw_demo(tmp_path, num_train=1, num_val=1, workers=1)


def test_a_folder_that_cannot_be_made_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="the demo data cannot be written"):
        draw_demo(tmp_path / "file" / "demo", num_train=1, num_val=1, workers=1)


def test_annotations_tell_what_is_drawn(tmp_path):
    draw_demo(tmp_path, num_train=3, num_val=1, workers=1)
    document = json.loads((tmp_path / "annotations" / "train.json").read_text())
    assert [row["name"] for row in document["categories"]] == list(CLASS_NAMES)
    assert [row["id"] for row in document["annotations"]] == list(range(1, len(document["annotations"]) + 1))
    for row in document["annotations"]:
        x, y, width, height = row["bbox"]
        assert 0 < row["area"] < width * height + 0.1
        if isinstance(row["segmentation"], list):
            points = np.array(row["segmentation"][0]).reshape(-1, 2)
            np.testing.assert_allclose(points.min(axis=0), [x, y], atol=0.01)
            np.testing.assert_allclose(points.max(axis=0), [x + width, y + height], atol=0.011)
    pixels, _ = draw_picture(DemoSettings(), "train", 1)
    decoded = read_image(tmp_path / "train" / "000001.jpg")
    assert abs(decoded.astype(int) - pixels).mean() < 4  # what JPEG loses


@settings(max_examples=25)
@given(
    hard=st.booleans(),
    size=st.sampled_from([96, 128, 200]),
    several_sizes=st.booleans(),
    index=st.integers(0, 10**9),
)
def test_objects_lie_inside_the_picture_and_overlap_little(hard, size, several_sizes, index):
    demo = DemoSettings(hard=hard, size=size, seed=3, several_sizes=several_sizes)
    pixels, shapes = draw_picture(demo, "val", index)
    height, width = demo.picture_size(index)
    assert pixels.shape == (height, width, 3)
    assert several_sizes or height == width == size
    assert min(height, width) >= size * 3 // 8
    assert max(height, width) <= size
    assert 1 <= len(shapes) <= demo.max_objects
    boxes = np.stack([shape.box for shape in shapes])
    assert boxes.min() >= 0
    assert boxes[:, 2].max() <= width
    assert boxes[:, 3].max() <= height
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            common = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None).prod()
            assert common <= 0.4 * min((a[2:] - a[:2]).prod(), (b[2:] - b[:2]).prod()) + 1e-6


@pytest.mark.parametrize("name", list(OUTLINES))
def test_the_polygon_is_what_is_painted(name):
    shape = place(name, 30.0, 0.2, 1.1, np.array([50.0, 48.0]))
    mask = coverage(shape, 100, 100)
    assert mask.sum() == pytest.approx(shape.area, rel=0.04)
    rows, columns = np.flatnonzero((mask > 0.5).any(axis=1)), np.flatnonzero((mask > 0.5).any(axis=0))
    np.testing.assert_allclose([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], shape.box, atol=2.5)


def test_pycocotools_rasterises_the_ring_with_its_hole():
    shape = place("ring", 30.0, 0.0, 1.0, np.array([50.0, 50.0]))
    painted = coco_mask([shape.polygon.ravel().tolist()], (100, 100), (100, 100))
    assert painted[50, 50] == 0
    assert painted.sum() == pytest.approx(shape.area, rel=0.05)


@settings(max_examples=25)
@given(hard=st.booleans(), index=st.integers(0, 10**6))
def test_masks_are_the_visible_parts_by_the_coco_api(hard, index):
    demo = DemoSettings(hard=hard)
    _, shapes = draw_picture(demo, "train", index)
    size = demo.picture_size(index)
    front = np.zeros(size, bool)
    for shape, own in reversed(list(zip(shapes, visible_parts(shapes, size), strict=True))):
        whole = coco_mask([shape.polygon.ravel().tolist()], size, size).astype(bool)
        assert np.array_equal(coco_mask(own, size, size).astype(bool), whole & ~front)
        assert isinstance(own, dict) == bool((whole & front).any())
        assert (whole & ~front).sum() > 0.2 * whole.sum()  # no object hides
        front |= whole


def test_a_part_that_another_shape_hides_is_no_part_of_the_mask_by_hand():
    back, front = (
        Shape(name, np.array(p, float))
        for name, p in (
            ("square", [[2, 2], [10, 2], [10, 10], [2, 10]]),
            ("square", [[6, 6], [14, 6], [14, 14], [6, 14]]),
        )
    )
    first, second = visible_parts([back, front], (16, 16))
    expected = np.zeros((16, 16), bool)
    expected[2:10, 2:10] = True
    expected[6:, 6:] = False
    assert np.array_equal(coco_mask(first, (16, 16), (16, 16)), expected)
    assert second == [[6, 6, 14, 6, 14, 14, 6, 14]]


def test_a_set_of_an_older_version_gets_its_annotations_anew(tmp_path):
    draw_demo(tmp_path, num_train=3, num_val=2, workers=1)
    expected = _contents(tmp_path)
    file = tmp_path / "annotations" / "val.json"
    file.write_text(file.read_text().replace('"version":2', '"version":1'))
    assert draw_demo(tmp_path, num_train=3, num_val=2, workers=1)
    assert _contents(tmp_path) == expected
    assert not draw_demo(tmp_path, num_train=3, num_val=2, workers=1)


def test_every_class_is_drawn_about_as_often_as_the_others():
    names = [shape.name for index in range(150) for shape in draw_picture(DemoSettings(), "train", index)[1]]
    counts = [names.count(name) for name in CLASS_NAMES]
    assert len(names) > 400
    assert min(counts) > 0.5 * len(names) / len(CLASS_NAMES)
