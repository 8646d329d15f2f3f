"""Images in every form that a program has them in are the same pixels."""

import io
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from far_servers import zip_of
from megdet.api import images as images_module
from megdet.api.images import each_image, is_one_image, pixels_of_any
from megdet.errors import InputError

MOST = 10_000


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def file(pixels, tmp_path_factory) -> Path:
    path: Path = tmp_path_factory.mktemp("images") / "a b.png"
    Image.fromarray(pixels).save(path)
    return path


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def address(file) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(file.parent)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_paths_addresses_arrays_tensors_and_pillow_images_are_the_same(tmp_path, file, pixels, address):
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    with Image.open(file) as opened:
        assert np.array_equal(pixels_of_any(opened, MOST).values, pixels)
    for image in (
        zip_of(file.parent, tmp_path / "a.zip").replace("://", f"://{file.name}"),
        *(str(file), file, file.as_uri(), f"{address}/a%20b.png", pixels, np.asfortranarray(pixels)),
        *(tensor, tensor.float() / 255, tensor.double() / 255),
    ):
        assert is_one_image(image)
        own = pixels_of_any(image, MOST)
        assert np.array_equal(own.values, pixels), image
        assert own.values.flags.c_contiguous
    assert pixels_of_any(file, MOST) == (pytest.approx(pixels), str(file), True)


def test_gray_is_repeated_and_a_photo_is_turned_as_its_camera_says(pixels, tmp_path):
    gray = pixels[:, :, 0]
    expected = np.repeat(gray[:, :, None], 3, axis=2)
    for image in (gray, gray[:, :, None], torch.from_numpy(gray), torch.from_numpy(gray)[None], Image.fromarray(gray)):
        assert np.array_equal(pixels_of_any(image, MOST).values, expected)
    exif = Image.Exif()
    exif[0x112] = 6
    Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "lying.png", exif=exif)
    with Image.open(tmp_path / "lying.png") as lying:
        assert np.array_equal(pixels_of_any(lying, MOST).values, pixels)


def test_several_are_a_list_a_folder_or_one_array_more(file, pixels):
    assert not is_one_image([file])
    assert list(each_image(file)) == [file]
    assert list(each_image([file, pixels])) == [file, pixels]
    assert list(each_image(file.parent)) == [file]
    stack = np.stack([pixels, pixels])
    assert not is_one_image(stack)
    assert [own.shape for own in each_image(stack)] == [pixels.shape] * 2
    assert len(list(each_image(own for own in (file, file)))) == 2


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((20, 30, 3)), "array of float64 is no image: it has numbers of 8 bits"),
        (np.zeros((20, 30, 4), np.uint8), r"array of shape \(20, 30, 4\) is no image"),
        (np.zeros((0, 30, 3), np.uint8), r"array of shape \(0, 30, 3\) is no image"),
        (torch.zeros(20, 30, 3), r"tensor of shape \(20, 30, 3\) is no image: it is \(3, height, width\)"),
        (
            torch.full((3, 4, 4), 255.0),
            "floats from 0 to 1 are needed, found 255 to 255, 100% of them outside: divide bytes by 255",
        ),
        (torch.full((3, 4, 4), float("nan")), "floats from 0 to 1 are needed, found nan to nan"),
        (torch.zeros(3, 0, 4), r"tensor of shape \(3, 0, 4\) is no image"),
        (Image.new("RGB", (0, 5)), "an image of 0 x 5 pixels has none"),
        (torch.full((3, 4, 4), 300), "tensor of torch.int64 is no image: it has 8 bits"),
        (torch.ones(3, 4, 4, dtype=torch.bool), "tensor of torch.bool is no image"),
        (7, "of type int is no image"),
        ("nowhere.png", "nowhere.png: no such image file"),
        (Image.new("RGB", (200, 100)), "200 x 100 pixels are more than data.max_pixels 10000"),
    ],
)
def test_what_is_no_image_is_refused_with_what_is_wanted(image, message):
    with pytest.raises(InputError, match=message):
        pixels_of_any(image, MOST)


def test_an_address_that_has_no_image_or_too_much_is_refused(address, file, monkeypatch):
    with pytest.raises(InputError, match=r"http://127.0.0.1:\d+/b.png: cannot be fetched .*404"):
        pixels_of_any(f"{address}/b.png", MOST)
    with pytest.raises(InputError, match=r"http://127.0.0.1:\d+/: cannot be read as an image"):
        pixels_of_any(f"{address}/", MOST)
    monkeypatch.setattr(images_module, "MOST_BYTES", 100)
    with pytest.raises(InputError, match="fetch it yourself"):
        pixels_of_any(f"{address}/a%20b.png", MOST)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="no image in this folder"):
        list(each_image(tmp_path))


def test_floats_that_resizing_left_a_little_out_of_range_are_cut_there():
    floats = torch.full((3, 2, 50), 0.5)
    floats[:, :, :4] = torch.tensor([-0.2, 0.0, 1.0000001, 1.2])
    assert pixels_of_any(floats, MOST).values[0, :5, 0].tolist() == [0, 0, 255, 255, 128]


def test_a_normalised_image_of_low_contrast_is_not_taken_for_one_a_little_out_of_range():
    grey = 0.4 + 0.1 * torch.rand(3, 8, 8)
    for floats in ((grey - 0.45) / 0.225, grey - 0.5):
        with pytest.raises(InputError, match=r"floats from 0 to 1 are needed, .*% of them outside: .*normalisation"):
            pixels_of_any(floats, MOST)


class Sequence:
    def __len__(self):
        return 2

    def __getitem__(self, index):
        if index > 1:
            raise IndexError
        return np.full((4, 4), index, np.uint8)


def test_several_may_be_anything_with_an_index():
    assert [int(own.max()) for own in each_image(Sequence())] == [0, 1]


@pytest.mark.parametrize(
    "images", [None, 3, b"bytes of a file", io.BytesIO(b"an open file"), np.array(3), torch.tensor(3.0)]
)
def test_what_is_neither_an_image_nor_several_is_refused(images):
    with pytest.raises(InputError, match=f"something of type {type(images).__name__} is no image, and not several"):
        list(each_image(images))
