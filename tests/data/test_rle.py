import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as coco_masks

from megdet.data.rle import decode_mask, encode_mask, packed_pixels, pixels_of_runs, runs_of_text


def test_runs_go_down_the_columns_and_begin_outside_by_hand():
    assert pixels_of_runs(np.array([1, 2, 2, 1]), 2, 3).tolist() == [[False, True, False], [True, False, True]]
    assert pixels_of_runs(np.array([0, 6]), 2, 3).all()
    assert not pixels_of_runs(np.array([6]), 2, 3).any()


@given(arrays(np.uint8, st.tuples(st.integers(1, 30), st.integers(1, 30)), elements=st.integers(0, 1)))
def test_a_compressed_text_of_the_coco_api_has_the_pixels_it_was_made_of(pixels):
    text = coco_masks.encode(np.asfortranarray(pixels))["counts"]
    for kind in (text, text.decode()):
        runs = runs_of_text(kind)
        assert runs.sum() == pixels.size
        assert np.array_equal(pixels_of_runs(runs, *pixels.shape), pixels.astype(bool))


def compressed(runs: list[int]) -> str:
    """The compressed text of runs: differences from the last but one, five bits a letter."""
    letters = []
    for place, run in enumerate(runs):
        rest, has_more = run - (runs[place - 2] if place > 2 else 0), True
        while has_more:
            bits, rest = rest & 31, rest >> 5
            has_more = rest != (-1 if bits & 16 else 0)
            letters.append(chr(48 + bits + 32 * has_more))
    return "".join(letters)


@given(st.lists(st.integers(0, 2**24 - 1), min_size=1, max_size=12))
def test_runs_are_read_as_the_coco_api_writes_them(runs):
    # the API has room for six letters a run, with the end of the text: for longer runs it writes beyond its memory
    text = coco_masks.frPyObjects({"size": [1, sum(runs)], "counts": runs}, 1, 1)["counts"]
    assert text.decode() == compressed(runs)
    assert runs_of_text(text).tolist() == runs


@given(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=12))
def test_runs_of_any_length_are_read(runs):
    assert runs_of_text(compressed(runs)).tolist() == runs


@pytest.mark.parametrize("text", ["P", "0P", "\x1f", "p", "ü", "0 0", "O", "PPPPPPPP0", "Z"])
def test_what_is_no_compressed_text_gives_no_runs(text):
    assert runs_of_text(text) is None


@given(st.text(max_size=12) | st.text("0123456789:;<=>?@AOPQZ_`ano", max_size=12))
def test_no_text_makes_it_fall_over(text):
    runs = runs_of_text(text)
    assert runs is None or (runs >= 0).all()


def whole(pixels: np.ndarray, x: int, y: int, size: tuple[int, int]) -> np.ndarray:
    image = np.zeros(size, dtype=np.uint8, order="F")
    image[y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels
    return image


def by_pycocotools(image: np.ndarray) -> dict:
    rle = coco_masks.encode(np.asfortranarray(image))
    return {"size": list(image.shape), "counts": rle["counts"].decode()}


@st.composite
def masks(draw):
    size = draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    y, x = draw(st.integers(0, size[0] - 1)), draw(st.integers(0, size[1] - 1))
    height, width = draw(st.integers(1, size[0] - y)), draw(st.integers(1, size[1] - x))
    share, seed = draw(st.sampled_from([0.0, 0.1, 0.9, 1.0])), draw(st.integers(0, 2**32 - 1))
    pixels = np.random.default_rng(seed).random((height, width)) < share
    return pixels, x, y, size


@given(masks())
def test_a_mask_is_encoded_as_pycocotools_does_and_comes_back(drawn):
    image = whole(*drawn)
    rle = encode_mask(*drawn)
    assert rle == by_pycocotools(image)
    assert np.array_equal(decode_mask(rle), image.astype(bool))


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (1000, 1500)])
def test_a_mask_without_a_pixel_is_one_run(size):
    assert encode_mask(np.zeros((0, 0), bool), 0, 0, size) == by_pycocotools(np.zeros(size, np.uint8))


def test_full_columns_that_touch_are_one_run():
    mask = np.ones((4, 3), bool), 2, 0, (4, 9)
    rle = encode_mask(*mask)
    assert rle == by_pycocotools(whole(*mask))
    assert rle["counts"] == "8<`0"


@given(st.lists(masks(), min_size=1, max_size=8))
def test_packed_lengths_are_about_the_pixels_of_their_image(drawn):
    texts = [encode_mask(*mask)["counts"] for mask in drawn]
    assert packed_pixels(texts).tolist() == [height * width for *_, (height, width) in drawn]


def test_packed_lengths_of_a_large_image_are_counted():
    plain = {"size": [50_000, 60_000], "counts": [0, 1_234_567_890, 3, 1_765_432_107]}
    text = coco_masks.frPyObjects(plain, 50_000, 60_000)["counts"].decode()
    assert packed_pixels([text, "1", text]).tolist() == [3_000_000_000, 1, 3_000_000_000]


def test_no_texts_have_no_pixels():
    assert packed_pixels([]).tolist() == []


@pytest.mark.parametrize("text", ["", "o", "11o", "oooooooo0", "/", "p", "1\x00", "ö", "\udcff", " "])
def test_a_text_that_is_no_packed_lengths_is_told(text):
    assert packed_pixels(["5", text, "6"]).tolist() == [5, -1, 6]
