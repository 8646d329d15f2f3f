"""What is kept of an annotation file and of its images' headers, and when it is read again."""

import os
from pathlib import Path

import pytest
from PIL import Image

from data_factories import save_image, two_images, write_set
from megdet.data import coco_file
from megdet.data.coco import load_coco
from megdet.data.headers import read_headers
from megdet.data.user_cache import recall
from megdet.errors import InputError

pytestmark = pytest.mark.usefixtures("cache_folder")


def test_headers_are_read_once_and_again_when_a_file_changes(tmp_path, cache_folder, monkeypatch):
    file, images = write_set(tmp_path, two_images())
    expected = read_headers(file, images, ["a.jpg", "b.jpg"]).tolist()
    assert expected == [[30, 40, 0], [30, 40, 0]]
    assert len(list(cache_folder.glob("headers-*.safetensors"))) == 1

    opened = []
    real_open = Image.open
    monkeypatch.setattr(Image, "open", lambda file, **more: opened.append(Path(file.name)) or real_open(file, **more))
    assert read_headers(file, images, ["b.jpg", "a.jpg"]).tolist() == expected
    assert opened == []
    save_image(images / "b.jpg", 50, 60)
    os.utime(images / "b.jpg", ns=(1, 1))
    for _ in range(2):
        assert read_headers(file, images, ["b.jpg"]).tolist() == [[60, 50, 0]]
        assert opened == [images / "b.jpg"]
    assert read_headers(file, images, ["a.jpg", "b.jpg"]).tolist() == [[30, 40, 0], [60, 50, 0]]
    assert opened == [images / "b.jpg"]


def test_a_damaged_cache_is_read_over_and_one_that_cannot_be_written_does_no_harm(tmp_path, cache_folder, monkeypatch):
    file, images = write_set(tmp_path, two_images())
    expected = read_headers(file, images, ["a.jpg"]).tolist()
    (cache,) = cache_folder.iterdir()
    whole = cache.read_bytes()
    for content in (b"", b"{", bytes(100), whole[:-1], whole.replace(b"a.jpg", b"b.jpg"), whole[:200] + whole[208:]):
        cache.write_bytes(content)
        assert read_headers(file, images, ["a.jpg"]).tolist() == expected
        assert recall(cache) is not None
    (tmp_path / "no_folder").write_text("a file where the cache should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no_folder"))
    assert read_headers(file, images, ["a.jpg"]).tolist() == expected


def _all_of(dataset):
    table = dataset.annotations
    columns = (dataset.sizes, table.counts, table.boxes, table.labels, table.is_crowd, table.areas)
    names = (dataset.image_ids, dataset.file_names, dataset.class_names, dataset.category_ids, dataset.num_dropped)
    return names, [(column.dtype, column.tolist()) for column in columns], table.annotation_ids.tolist()


@pytest.fixture
def decoded(monkeypatch):
    """The annotation files that were parsed."""
    files = []
    real = coco_file.parse
    monkeypatch.setattr(coco_file, "parse", lambda file, content: files.append(file) or real(file, content))
    return files


def _odd_images():
    """Ids that are strings or long, a missing size, polygons."""
    document = two_images()
    document["images"][0].update(id="β", file_name="фото.jpg")
    document["images"][1].pop("width")
    document["annotations"][1].update(id=1 << 70, image_id="β", segmentation=[[1, 2, 3, 4, 5, 6]])
    document["annotations"][0]["segmentation"] = {"counts": "abc", "size": [30, 40]}
    return document


@pytest.mark.parametrize("make", [two_images, _odd_images])
def test_a_file_is_decoded_once_and_then_comes_from_the_cache(tmp_path, cache_folder, decoded, make):
    files = write_set(tmp_path, make())
    first = _all_of(load_coco(*files, keep_empty=False))
    assert len(decoded) == 1
    assert _all_of(load_coco(*files, keep_empty=False)) == first
    assert len(load_coco(*files, keep_empty=True)) == 2
    assert len(decoded) == 1
    assert sorted(path.name.partition("-")[0] for path in cache_folder.iterdir()) == ["annotations", "headers"]


def test_a_file_that_changes_is_decoded_again_though_time_and_length_stay(tmp_path, decoded):
    file, images = write_set(tmp_path, two_images())
    load_coco(file, images, keep_empty=False)
    status, text = file.stat(), file.read_text()
    file.write_text(text.replace("[5, 5, 8, 8]", "[5, 5, 8, 9]"))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.stat().st_size == status.st_size
    assert load_coco(file, images, keep_empty=False).annotations[0].boxes.tolist() == [[5, 5, 13, 14]]
    assert len(decoded) == 2
    file.write_text(text.replace("[5, 5, 8, 8]", "[5, 5, 8]"))
    for _ in range(2):  # what is refused is not remembered
        with pytest.raises(InputError, match="annotation 12: bbox is not a list of four"):
            load_coco(file, images, keep_empty=False)


def test_a_cache_of_another_format_or_that_is_damaged_is_made_anew(tmp_path, cache_folder, decoded, monkeypatch):
    files = write_set(tmp_path, two_images())
    first = _all_of(load_coco(*files, keep_empty=False))
    (cache,) = cache_folder.glob("annotations-*")
    content = bytearray(cache.read_bytes())
    content[-3] ^= 1
    cache.write_bytes(content)
    assert _all_of(load_coco(*files, keep_empty=False)) == first
    assert len(decoded) == 2
    monkeypatch.setattr(coco_file, "FORMAT", "another")
    assert _all_of(load_coco(*files, keep_empty=False)) == first
    assert len(decoded) == 3
