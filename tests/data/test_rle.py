import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as coco_masks

from megdet.data.rle import pixels_of_runs, runs_of_text


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


@given(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=12))
def test_runs_of_any_length_are_read_as_the_coco_api_writes_them(runs):
    text = coco_masks.frPyObjects({"size": [1, sum(runs)], "counts": runs}, 1, 1)["counts"]
    assert runs_of_text(text).tolist() == runs


@pytest.mark.parametrize("text", ["P", "0P", "\x1f", "p", "ü", "0 0", "O", "PPPPPPPP0", "Z"])
def test_what_is_no_compressed_text_gives_no_runs(text):
    assert runs_of_text(text) is None


@given(st.text(max_size=12) | st.text("0123456789:;<=>?@AOPQZ_`ano", max_size=12))
def test_no_text_makes_it_fall_over(text):
    runs = runs_of_text(text)
    assert runs is None or (runs >= 0).all()
