import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from megdet.data import cache as cache_module
from megdet.data.cache import ImageCache, image_cache
from small_runs import small_recipe, train_set, write_small_set

PIXELS = np.random.default_rng(0).integers(0, 256, (31, 40, 3), dtype=np.uint8)


@pytest.fixture
def image(tmp_path) -> Path:
    file = tmp_path / "image.jpg"
    file.write_bytes(b"an image")
    return file


def cache_in(folder: Path, num_kept: int = 10, *, is_resized: bool = False) -> ImageCache:
    return ImageCache(folder / "cache", num_kept, is_resized=is_resized)


def read(cache: ImageCache, image: Path, pixels: np.ndarray = PIXELS, index: int = 0, kind: str = "decoded") -> bool:
    """Whether the pixels had to be made; they are right in any case."""
    made = []

    def make():
        made.append(True)
        return pixels

    found = cache.pixels(index, image, kind, make)
    np.testing.assert_array_equal(found, pixels)
    assert found.flags.writeable
    return bool(made)


def only_file(folder: Path) -> Path:
    (file,) = (folder / "cache").rglob("*.pixels")
    return file


def test_pixels_are_made_once_and_then_read_by_every_process(tmp_path, image):
    assert read(cache_in(tmp_path), image)
    assert not read(cache_in(tmp_path), image)
    assert read(cache_in(tmp_path), image, PIXELS[:10], kind="resized to 10x40"), "another kind is another file"


def test_an_image_that_changed_is_made_anew_without_a_word(tmp_path, image):
    read(cache_in(tmp_path), image)
    cache = cache_in(tmp_path)
    os.utime(image, ns=(1, 1))
    assert read(cache, image, PIXELS[::-1])
    image.write_bytes(b"a longer image")
    os.utime(image, ns=(1, 1))
    assert read(cache, image, PIXELS[::-1])
    assert not read(cache, image, PIXELS[::-1])
    assert cache.take_notices() == []


@pytest.mark.parametrize("library", ["PIL", "simplejpeg", "torch", "torchvision"])
def test_another_version_of_a_library_makes_it_anew(tmp_path, image, library, monkeypatch):
    read(cache_in(tmp_path, is_resized=True), image)
    monkeypatch.setattr(getattr(cache_module, library), "__version__", "0.0.1")
    assert read(cache_in(tmp_path, is_resized=True), image)


@pytest.mark.parametrize("damage", ["a bit", "cut", "empty", "zeros", "swapped"])
def test_a_damaged_file_is_made_anew_with_one_line(tmp_path, image, damage):
    read(cache_in(tmp_path), image, np.tile(PIXELS, (4, 1, 1)))
    file = only_file(tmp_path)
    content = bytearray(file.read_bytes())
    if damage == "a bit":
        content[1000] ^= 4
    elif damage == "zeros":
        content[-100:] = bytes(100)
    elif damage == "swapped":
        start = len(content) - PIXELS.size * 4
        content[start : start + 4096], content[start + 4096 : start + 8192] = (
            content[start + 4096 : start + 8192],
            content[start : start + 4096],
        )
    file.write_bytes({"cut": content[:-1], "empty": b""}.get(damage, content))
    cache = cache_in(tmp_path)
    assert read(cache, image, np.tile(PIXELS, (4, 1, 1)))
    (line,) = cache.take_notices()
    assert "damaged" in line
    assert str(image) in line
    assert "\n" not in line
    assert not read(cache_in(tmp_path), image, np.tile(PIXELS, (4, 1, 1)))
    assert cache.take_notices() == []


def test_a_full_disk_ends_the_caching_and_not_the_run(tmp_path, image, monkeypatch):
    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module, "replace_file", full)
    cache = cache_in(tmp_path)
    assert read(cache, image)
    assert read(cache, image)
    (line,) = cache.take_notices()
    assert "No space left on device" in line
    assert "\n" not in line


def test_a_file_that_a_killed_process_did_not_finish_is_deleted_when_the_cache_is_opened(tmp_path, monkeypatch):
    write_small_set(tmp_path, "train", 2, same_size=True)
    recipe = small_recipe(tmp_path)
    dataset = train_set(recipe)
    data = replace(recipe.data, cache="decoded", cache_folder=str(tmp_path / "cache"))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    cache = image_cache(data, dataset)
    assert cache is not None
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # SIGKILL leaves no time to clean up
        with pytest.raises(KeyboardInterrupt):
            read(cache, dataset.image_path(0))
    (leftover,) = (path for path in (tmp_path / "cache").rglob("*") if path.is_file())
    dead = leftover.with_name(leftover.name.replace(f".{os.getpid()}.", f".{2**22 + 1}."))  # no process has this number
    leftover.rename(dead)
    os.utime(dead, (0, 0))
    assert image_cache(data, dataset) is not None
    assert not dead.exists()


def test_the_first_images_are_kept_as_many_as_fit(tmp_path):
    write_small_set(tmp_path, "train", 8, same_size=True)
    recipe = small_recipe(tmp_path)
    dataset = train_set(recipe)

    def num_kept(**changes) -> int:
        cache = image_cache(replace(recipe.data, cache_folder=str(tmp_path / "cache"), **changes), dataset)
        return -1 if cache is None else cache.num_kept

    one = 64 * 64 * 3 + 56
    assert num_kept(cache="none") == -1
    assert num_kept(cache="decoded") == 8
    assert num_kept(cache="decoded", cache_gib=(3 * one + 1) / 2**30) == 3
    assert num_kept(cache="decoded", cache_gib=0.0) == 0
    resized = 32 * 32 * 3 + 56
    assert num_kept(cache="resized", short_edges=(32,), cache_gib=5 * resized / 2**30) == 5
    outside = cache_in(tmp_path, num_kept=3)
    assert read(outside, dataset.image_path(3), index=3)
    assert not (tmp_path / "cache").exists()


@given(arrays.arrays(np.uint8, st.integers(1, 9000)), st.data())
def test_every_byte_counts_in_the_checksum(pixels, data):
    other = pixels.copy()
    other[data.draw(st.integers(0, len(pixels) - 1))] ^= data.draw(st.integers(1, 255))
    assert cache_module._checksum(other) != cache_module._checksum(pixels)
