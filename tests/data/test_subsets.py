import json

import numpy as np
import pytest

from data_factories import box_row, image_row, two_images, write_set
from megdet.data.check import check_dataset
from megdet.data.subsets import deal, merge_documents, read_document, sample_document, split_document
from megdet.errors import InputError


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def document_of(folder, classes, num_groups=100, **more):
    """A file with an image for each entry of `classes`, the classes of its boxes."""
    ids = sorted({name for own in classes for name in own})
    rows = {
        "images": [
            {**image_row(n, f"patient_{n % num_groups}/{n}.jpg"), "license": 3, "date": f"day {n}"}
            for n in range(len(classes))
        ],
        "annotations": [
            box_row(1000 * n + k, n, ids.index(name) * 2 + 1, [1, 2, 3, 4], note="kept")
            for n, own in enumerate(classes)
            for k, name in enumerate(own)
        ],
        "categories": [{"id": number * 2 + 1, "name": name, "supercategory": "x"} for number, name in enumerate(ids)],
        **more,
    }
    folder.mkdir(exist_ok=True)
    (folder / "all.json").write_text(json.dumps(rows))
    return read_document(folder / "all.json")


def counts_of(document):
    """Boxes of each class by name."""
    names = {row["id"]: row["name"] for row in document.categories}
    return {
        name: sum(names[row["category_id"]] == name for row in document.annotations) for name in names.values()
    }  # fmt: skip


def test_every_class_and_the_empty_images_are_dealt_in_proportion(tmp_path):
    # 10 images with the rare class, 50 with the common one, 40 without a box
    document = document_of(tmp_path, [["rare", "common"]] * 10 + [["common"]] * 40 + [[]] * 50)
    parts = split_document(document, {"train": 70.0, "val": 20.0, "test": 10.0})
    assert {name: counts_of(own) for name, own in parts.items()} == {
        "train": {"common": 35, "rare": 7},
        "val": {"common": 10, "rare": 2},
        "test": {"common": 5, "rare": 1},
    }
    assert [len(own.images) for own in parts.values()] == [70, 20, 10]
    ids = [row["id"] for own in parts.values() for row in own.images]
    assert sorted(ids) == list(range(100))


def test_a_split_depends_on_the_seed_alone_and_keeps_every_key(tmp_path):
    document = document_of(tmp_path, [["a"]] * 30, info={"year": 2024}, licenses=[{"id": 3}])
    halves = {"one": 1.0, "two": 1.0}
    first, again, other = (split_document(document, halves, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first["one"].images != other["one"].images
    first["one"].write(tmp_path / "one.json")
    written = json.loads((tmp_path / "one.json").read_text())
    assert (written["info"], written["licenses"]) == ({"year": 2024}, [{"id": 3}])
    assert written["images"][0]["date"].startswith("day ")
    assert {row["note"] for row in written["annotations"]} == {"kept"}
    assert written["categories"] == list(document.categories)
    with pytest.raises(InputError, match="exists"):
        first["one"].write(tmp_path / "one.json")


def test_images_of_a_group_stay_together(tmp_path):
    document = document_of(tmp_path, [["a"]] * 60, num_groups=12)
    parts = split_document(document, {"train": 0.75, "val": 0.25}, group="^(patient_[0-9]+)/")
    groups = [{row["file_name"].split("/")[0] for row in own.images} for own in parts.values()]
    assert not groups[0] & groups[1]
    assert [len(own) for own in groups] == [9, 3]


def test_dealing_by_hand():
    # images, boxes of two classes; the second class is rarer and is dealt first: its boxes 2, 1, 1 over two equal parts
    counts = np.array([[1, 0, 1], [1, 0, 2], [1, 1, 1], [1, 4, 0], [1, 3, 0]])
    part = deal(counts, np.array([0.5, 0.5]), np.array([2, 0, 1, 3, 4]))
    # group 1 (2 boxes) to part 0; groups 2 and 0 to part 1; of the first class part 0 lacks 4 and part 1 lacks 3, so
    # group 3 (4 boxes) goes to part 0, group 4 to part 1
    assert part.tolist() == [1, 0, 1, 0, 1]


def test_what_cannot_be_split_is_refused(tmp_path):
    document = document_of(tmp_path, [["a"]] * 3)
    with pytest.raises(InputError, match="3 images are too few for 4 parts: d is empty"):
        split_document(document, dict.fromkeys("abcd", 1.0))
    with pytest.raises(InputError, match=r"'patient_0/0\.jpg' does not match 'x'"):
        split_document(document, {"a": 1.0, "b": 1.0}, group="x")
    with pytest.raises(InputError, match="is no regular expression"):
        split_document(document, {"a": 1.0, "b": 1.0}, group="(")
    (tmp_path / "bad.json").write_text(json.dumps({**two_images(), "annotations": [box_row(1, 99, 4, [1, 2, 3, 4])]}))
    with pytest.raises(InputError, match="99"):
        read_document(tmp_path / "bad.json")


def test_samples_are_nested_and_may_be_of_some_classes(tmp_path):
    document = document_of(tmp_path, [["a", "b"]] * 10 + [["b"]] * 10)
    small, large = (sample_document(document, count, seed=3) for count in (4, 9))
    assert (len(small.images), len(large.images)) == (4, 9)
    assert {row["id"] for row in small.images} < {row["id"] for row in large.images}
    only = sample_document(document, 10, class_names=["a"])
    assert counts_of(only) == {"a": 10}
    assert counts_of(sample_document(document, None, class_names=["b"])) == {"b": 20}
    with pytest.raises(InputError, match="11 images were asked for, it has 10"):
        sample_document(document, 11, class_names=["a"])
    with pytest.raises(InputError, match="no class 'aa'; did you mean 'a'"):
        sample_document(document, 1, class_names=["aa"])


def test_merged_sets_match_classes_by_name(tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    other = {
        "images": [image_row("x", "c.jpg")],
        "annotations": [box_row("y", "x", 9, [1, 1, 2, 2]), box_row("z", "x", 4, [1, 1, 3, 3])],
        "categories": [{"id": 9, "name": "cow"}, {"id": 4, "name": "dog"}],
    }
    files = [write_set(folders[0], two_images()), write_set(folders[1], other)]
    documents = [read_document(file) for file, _ in files]
    merged = merge_documents(documents, [images for _, images in files], tmp_path)
    assert [row["file_name"] for row in merged.images] == ["one/images/a.jpg", "one/images/b.jpg", "two/images/c.jpg"]
    assert counts_of(merged) == {"dog": 2, "cat": 2, "cow": 1}
    assert [row["id"] for row in merged.annotations] == [1, 2, 3, 4, 5]
    assert [row["bbox"] for row in merged.annotations][3:] == [[1, 1, 2, 2], [1, 1, 3, 3]]
    merged.write(tmp_path / "merged.json")
    assert read_document(tmp_path / "merged.json").images == merged.images
    with pytest.raises(InputError, match=r"a\.jpg is in .*instances\.json too: remove it from one"):
        merge_documents([documents[0]] * 2, [files[0][1]] * 2, tmp_path)
    with pytest.raises(InputError, match=r"a\.jpg is in .*instances\.json too: remove it from one"):
        merge_documents(
            [*documents, read_document(tmp_path / "merged.json")], [*(i for _, i in files), tmp_path], tmp_path
        )


def test_names_that_lead_out_and_back_are_mended(tmp_path):
    file, images = write_set(tmp_path, two_images())
    rows = two_images()
    for row, name in zip(rows["images"], (str(images / "a.jpg"), "below/../b.jpg"), strict=True):
        row["file_name"] = name
    file.write_text(json.dumps(rows))
    (images / "below").mkdir()
    merged = merge_documents([read_document(file)], [images], tmp_path)
    assert [row["file_name"] for row in merged.images] == ["images/a.jpg", "images/b.jpg"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/elsewhere/a.jpg", r"image 7: file_name '/elsewhere/a\.jpg' leads out of .*images: give a folder above"),
        ("../a.jpg", r"image 7: file_name '\.\./a\.jpg' leads out of .*images: give a folder above"),
        ("a\0.jpg", r"image 7: no file in .*images can be called 'a\\x00\.jpg'"),
        ("loop.jpg", r"image 7: no file in .*images can be called 'loop\.jpg'"),
    ],
)
def test_names_that_data_check_calls_fatal_are_not_merged(tmp_path, name, message):
    file, images = write_set(tmp_path, two_images())
    (images / "loop.jpg").symlink_to("loop.jpg")
    rows = two_images()
    rows["images"][0]["file_name"] = name
    file.write_text(json.dumps(rows))
    assert any(problem.fatal for problem in check_dataset(file, images))
    with pytest.raises(InputError, match=message):
        merge_documents([read_document(file)], [images], tmp_path)


def test_a_file_that_one_set_names_twice_stays_so_as_data_check_has_it(tmp_path):
    rows = two_images()
    rows["images"][1]["file_name"] = "a.jpg"
    file, images = write_set(tmp_path, rows)
    merge_documents([read_document(file)], [images], tmp_path).write(tmp_path / "merged.json")
    for problems in (check_dataset(file, images), check_dataset(tmp_path / "merged.json", tmp_path)):
        assert [(own.kind, own.fatal) for own in problems] == [("duplicate file name", False)]
