import contextlib
import os
import socket

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image, ImageOps

from data_factories import SHARED_DATA, needs_shared_data
from megdet.data import image
from megdet.data.image import image_size, read_header, read_image, whole_header
from megdet.data.room import Room
from megdet.errors import InputError


def _picture(height=12, width=20):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tiff", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_undone_as_pillow_does(tmp_path, suffix, orientation):
    path = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    exif[0x112] = orientation
    Image.fromarray(_picture()).save(path, exif=exif)

    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    pixels = read_image(path)
    np.testing.assert_array_equal(pixels, expected)
    assert pixels.shape == ((20, 12, 3) if orientation >= 5 else (12, 20, 3))
    assert image_size(path) == pixels.shape[:2]
    assert read_header(path).is_swapped == (orientation >= 5)


@pytest.fixture
def pillow_alone(monkeypatch):
    """read_image without the fast decoder."""

    def read(path):
        with monkeypatch.context() as patch:
            patch.setattr(image, "_decode_jpeg", lambda _: None)
            return read_image(path)

    return read


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}, {"optimize": True}])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_plain_jpeg_pixels_are_those_of_pillow_to_the_bit(
    tmp_path, monkeypatch, pillow_alone, mode, subsampling, options
):
    path = tmp_path / "a.jpg"
    Image.fromarray(_picture(61, 47)).convert(mode).save(path, quality=90, subsampling=subsampling, **options)
    expected = pillow_alone(path)
    monkeypatch.setattr(image, "_to_rgb", None)  # would fail if it were called
    np.testing.assert_array_equal(read_image(path), expected)


@pytest.mark.parametrize("mode", ["CMYK", "RGB png", "RGB mpo"])
def test_other_pictures_never_meet_the_fast_decoder(tmp_path, monkeypatch, mode):
    mode, _, suffix = mode.partition(" ")
    path = tmp_path / f"a.{suffix or 'jpg'}"
    picture = Image.fromarray(_picture()).convert(mode)
    more = {"save_all": True, "append_images": [picture]} if suffix == "mpo" else {}
    picture.save(path, **more)
    monkeypatch.setattr(image, "_decode_jpeg", None)
    assert read_image(path).shape == (12, 20, 3)


@settings(max_examples=150)
@given(data=st.data())
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_jpeg_is_what_pillow_makes_of_it(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damaged") / "a.jpg"
    Image.fromarray(_picture(24, 32)).save(path, quality=60)
    content = bytearray(path.read_bytes())
    for position, value in data.draw(
        st.dictionaries(st.integers(2, len(content) - 1), st.integers(0, 255), max_size=3)
    ).items():
        content[position] = value
    path.write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
    outcomes = []
    for decoder in (image._decode_jpeg, lambda _: None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(image, "_decode_jpeg", decoder)
            try:
                outcomes.append(read_image(path).tolist())
            except InputError as error:
                outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


def test_gray_is_repeated_over_the_channels(tmp_path):
    path = tmp_path / "gray.png"
    Image.fromarray(np.array([[0, 100], [200, 255]], np.uint8)).save(path)
    np.testing.assert_array_equal(read_image(path)[:, :, 1], [[0, 100], [200, 255]])


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@settings(max_examples=20)
@given(value=st.integers(0, 65535))
def test_sixteen_bits_are_scaled_and_not_cut_off(tmp_path_factory, suffix, value):
    path = tmp_path_factory.mktemp("deep") / f"deep.{suffix}"
    Image.fromarray(np.full((2, 3), value, np.uint16)).save(path)
    assert abs(read_image(path).astype(float) - value / 257).max() <= 0.5


def test_transparent_pixels_show_white(tmp_path):
    rgba = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 127]]], np.uint8)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    np.testing.assert_array_equal(read_image(tmp_path / "rgba.png")[0], [[255, 0, 0], [255, 255, 255], [128, 128, 128]])
    Image.fromarray(np.array([[[50, 255], [50, 0]]], np.uint8), "LA").save(tmp_path / "la.png")
    np.testing.assert_array_equal(read_image(tmp_path / "la.png")[0], [[50] * 3, [255] * 3])


def test_palettes_are_looked_up_with_and_without_transparency(tmp_path):
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "plain.png")
    np.testing.assert_array_equal(read_image(tmp_path / "plain.png")[0], [[10, 20, 30], [200, 100, 50]])
    palette.save(tmp_path / "clear.png", transparency=bytes([0, 255]))
    np.testing.assert_array_equal(read_image(tmp_path / "clear.png")[0], [[255, 255, 255], [200, 100, 50]])


def test_black_and_white_pixels_become_0_and_255(tmp_path):
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(read_image(tmp_path / "bits.png")[0], [[255] * 3, [0] * 3])


def test_float_pixels_are_read_as_0_to_1_or_as_0_to_255(tmp_path):
    path = tmp_path / "float.tiff"
    Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32)).save(path)
    np.testing.assert_array_equal(read_image(path)[0, :, 0], [0, 128, 255])
    Image.fromarray(np.array([[0.0, 0.5, 200.0]], np.float32)).save(path)
    np.testing.assert_array_equal(read_image(path)[0, :, 0], [0, 1, 200])


@pytest.mark.parametrize(("value", "message"), [(np.nan, "NaN"), (np.inf, "NaN or infinite"), (-3.0, "neither")])
def test_float_pixels_without_meaning_are_refused(tmp_path, value, message):
    path = tmp_path / "float.tiff"
    Image.fromarray(np.array([[value, 0.5]], np.float32)).save(path)
    with pytest.raises(InputError, match=rf"float\.tiff.*{message}"):
        read_image(path)


def test_integers_beyond_16_bits_are_refused(tmp_path):
    path = tmp_path / "wide.tiff"
    Image.fromarray(np.array([[70000, 1]], np.int32)).save(path)
    with pytest.raises(InputError, match=r"wide\.tiff.*16 bits"):
        read_image(path)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_truncated_image_is_refused_by_name(tmp_path, suffix):
    path = tmp_path / f"cut.{suffix}"
    Image.fromarray(_picture(64, 64)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=rf"cut\.{suffix}: cannot be read as an image"):
        read_image(path)
    assert image_size(path) == (64, 64)


def test_text_and_missing_files_are_refused_by_name(tmp_path):
    path = tmp_path / "notes.jpg"
    path.write_text("no image")
    for read in (read_image, image_size):
        with pytest.raises(InputError, match=r"notes\.jpg: cannot be read"):
            read(path)
        with pytest.raises(InputError, match=r"absent\.jpg: no such image file"):
            read(tmp_path / "absent.jpg")


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_file_that_is_cut_off_is_noticed_with_its_header(tmp_path, suffix):
    path = tmp_path / f"cut.{suffix}"
    Image.fromarray(_picture(64, 64)).save(path)
    whole = path.read_bytes()
    assert whole_header(path)[:2] == (64, 64)
    path.write_bytes(whole + b"trailing bytes, as some cameras write them")
    assert whole_header(path)[:2] == (64, 64)
    for length in (len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=rf"cut\.{suffix}: cannot be read as an image"):
            whole_header(path)


def test_the_end_of_a_whole_file_is_all_that_is_read_beside_its_header(tmp_path, monkeypatch):
    for suffix in ("jpg", "png", "bmp", "mpo"):
        Image.fromarray(_picture()).save(tmp_path / f"a.{suffix}", **({"save_all": True} if suffix == "mpo" else {}))
    monkeypatch.setattr(image, "read_image", None)
    assert {whole_header(path)[:2] for path in tmp_path.iterdir()} == {(12, 20)}


def test_a_path_may_be_a_string_and_a_fault_in_the_call_blames_no_file(tmp_path):
    Image.fromarray(_picture()).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(str(tmp_path / "a.png")), _picture())
    assert image_size(str(tmp_path / "a.png")) == whole_header(str(tmp_path / "a.png"))[:2] == (12, 20)
    with pytest.raises(InputError, match=r"^absent\.png: no such image file$"):
        read_image("absent.png")


def test_content_of_another_format_is_refused_whatever_the_file_is_called(tmp_path, monkeypatch):
    path = tmp_path / "page.jpg"
    Image.fromarray(_picture()).save(path, "EPS")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", None)  # would fail if it were called
    for read in (read_image, image_size, whole_header):
        with pytest.raises(InputError, match=r"page\.jpg: cannot be read as an image \(it is none of JPEG, PNG, BMP"):
            read(path)
    assert len({Image.EXTENSION[suffix] for suffix in image.IMAGE_SUFFIXES} - set(image.FORMATS)) == 0


@pytest.mark.parametrize("kind", ["pipe", "folder", "socket", "device"])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path, kind):
    path = tmp_path / "a.jpg"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to(os.devnull)
    with socket.socket(socket.AF_UNIX) as opened:
        if kind == "socket":
            opened.bind(os.path.relpath(path))  # the whole name of a temporary folder is too long for a socket
        for read in (read_image, image_size):
            with pytest.raises(InputError, match=rf"a\.jpg: it is a {kind}, no image file"):
                read(path)


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = tmp_path / "large.png"
    Image.fromarray(_picture(30, 40)).save(path)
    assert read_image(path, max_pixels=1200).shape == (30, 40, 3)
    Image.new("L", (9000, 9000)).save(path)
    monkeypatch.setattr(image, "_to_rgb", None)  # would fail if it were called
    with pytest.raises(
        InputError, match=r"large\.png: 9000 x 9000 pixels are more than data\.max_pixels 80000000 .* raise"
    ):
        read_image(path)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "1", "I;16", "F"])
def test_a_picture_is_converted_by_bands_as_if_it_were_whole(tmp_path, monkeypatch, mode):
    path = tmp_path / "a.tiff"
    draw = np.random.default_rng(0)
    if mode == "I;16":
        picture = Image.fromarray(draw.integers(0, 65536, (13, 7), dtype=np.uint16))
    elif mode == "F":
        picture = Image.fromarray(draw.uniform(0, 1, (13, 7)).astype(np.float32))
        picture.putpixel((3, 12), 200.0)  # decides how all others are meant
    else:
        picture = Image.fromarray(draw.integers(0, 256, (13, 7, 4), dtype=np.uint8), "RGBA")
        picture = picture.convert("RGB").convert(mode) if mode != "RGBA" else picture
    picture.save(path)
    expected = read_image(path)
    monkeypatch.setattr(image, "_BAND_PIXELS", 15)  # two rows
    np.testing.assert_array_equal(read_image(path), expected)


def test_a_jpeg_of_endless_scans_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = tmp_path / "a.jpg"
    Image.new("L", (64, 64)).save(path, progressive=True)
    content = path.read_bytes()
    scan = content[content.rindex(b"\xff\xda") : -2]
    path.write_bytes(content[:-2] + 40 * scan + content[-2:])
    assert not read_image(path).any()  # of a small picture they take no time
    monkeypatch.setattr(image, "_MOST_SCANS_PIXELS", 40 * 64 * 64)
    monkeypatch.setattr(image, "_decode_jpeg", None)
    with pytest.raises(InputError, match=f"a JPEG of {40 + content.count(bytes([255, 218]))} scans"):
        read_image(path)


def test_cut_off_pictures_are_decoded_together_only_as_far_as_their_pixels_allow(tmp_path, monkeypatch):
    path, taken = tmp_path / "a.png", []
    Image.new("L", (20, 30)).save(path)
    path.write_bytes(path.read_bytes() + b"more")

    class Counted(Room):
        def taken(self, pixels):
            taken.append(pixels)
            return super().taken(pixels)

    monkeypatch.setattr(image, "_ROOM", Counted(1000))
    assert whole_header(path)[:2] == (30, 20)
    assert taken == [600]


def test_a_picture_of_another_size_than_planned_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    exif = Image.Exif()
    exif[0x112] = 6
    Image.fromarray(_picture()).save(path, exif=exif)
    assert read_image(path, size=(20, 12)).shape == (20, 12, 3)
    monkeypatch.setattr(image, "_to_rgb", None)
    with pytest.raises(InputError, match=r"a\.png: the file is 12 x 20 pixels now, it was 20 x 12"):
        read_image(path, size=(12, 20))


@settings(max_examples=60)
@given(position=st.integers(2, 600), value=st.integers(0, 255))
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_byte_gives_a_picture_or_an_input_error(tmp_path_factory, position, value):
    path = tmp_path_factory.mktemp("damaged") / "a.png"
    Image.fromarray(_picture()).save(path)
    content = bytearray(path.read_bytes())
    content[position % len(content)] = value
    path.write_bytes(content)
    with contextlib.suppress(InputError):
        assert read_image(path).shape[2] == 3


@needs_shared_data
def test_real_photos_are_read_with_the_size_of_their_header():
    for path in sorted((SHARED_DATA / "photos").glob("*.[pj][np]g")):
        assert read_image(path).shape == (*image_size(path), 3)
