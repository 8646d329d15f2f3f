"""The proof beside a file: what it compares, and that it fails where it must."""

from dataclasses import replace

import numpy as np
import pytest

from exported_file import NAMES, description, small_recipe
from factories import TINY, with_model
from megdet.detections import Detections
from megdet.errors import InputError
from megdet.export.card import model_card
from megdet.export.proof import Difference, Look, Proof, markdown, matching, some_of
from megdet.export.refusals import refuse_unexportable
from megdet.recipe import Evaluation


def detections(*rows):
    """Rows of box, score and label."""
    boxes, scores, labels = zip(*rows, strict=True)
    return Detections(np.array(boxes, float), np.array(scores, float), np.array(labels), NAMES, (3, 5, 8), (99, 99))


OURS = detections(([0, 0, 10, 10], 0.9, 0), ([0, 0, 10, 10], 0.7, 1), ([50, 50, 60, 60], 0.5, 0))


def test_equal_detections_have_no_difference():
    difference = Difference()
    difference.add(OURS, OURS)
    assert difference == Difference(matched=3)


def test_differences_are_those_of_pairs_of_one_class_and_the_others_are_counted():
    theirs = detections(([0, 0, 10, 10.5], 0.8, 0), ([0, 0, 10, 10], 0.7, 2), ([50, 50, 60, 60.25], 0.5, 0))
    difference = Difference()
    difference.add(OURS, theirs)
    assert (difference.matched, difference.unmatched) == (2, 2)  # class 1 of the one, class 2 of the other
    assert difference.box == pytest.approx(0.5)
    assert difference.score == pytest.approx(0.1)


def test_two_detections_in_the_same_place_are_told_apart_by_their_scores():
    ours = detections(([0, 0, 10, 10], 0.9, 0), ([0, 0, 10, 10], 0.3, 0))
    theirs = detections(([0, 0, 10, 10], 0.3, 0), ([0, 0, 10, 10], 0.9, 0))
    assert matching(ours, theirs) == [(0, 1), (1, 0)]


def test_nothing_matches_nothing():
    nothing = OURS[:0]
    assert matching(nothing, OURS) == matching(OURS, nothing) == []


def proof_of(ap: float) -> Proof:
    looks = [Look("batch 1", ap={"bbox": 0.5}), Look("files", ap={"bbox": ap})]
    return Proof("a.onnx", 5, 9, "val.json", "float32", {"bbox": 0.5}, looks)


def test_a_proof_holds_up_to_a_tenth_of_a_point():
    assert proof_of(0.5009).holds
    assert not proof_of(0.4988).holds
    assert proof_of(0.4988).worst == pytest.approx(0.0012)
    assert proof_of(0.4988).as_dict()["holds"] is False


def test_the_card_says_whether_the_proof_holds_and_what_the_file_takes():
    card = model_card("a.onnx", description(small_recipe()), proof_of(0.5))
    assert "It\nholds" in card
    assert "5 of 9 images" in card
    assert "bolt, nut, gear" in card
    assert "does NOT hold" in model_card("a.onnx", description(small_recipe()), proof_of(0.4))


def test_the_card_says_to_what_size_the_file_resizes_and_on_what_canvas():
    recipe = small_recipe()
    data = replace(recipe.data, short_edges=(64, 800), max_long_edge=1000, canvas_edges=(), canvas_multiple=32)
    card = " ".join(model_card("a.onnx", description(replace(recipe, data=data)), proof_of(0.5)).split())
    assert "shorter edge has 800 pixels, unless the longer one would exceed 1000." in card
    assert "rounded up to a multiple of 32." in card
    recipe = replace(
        recipe,
        data=replace(data, canvas_edges=(512, 1024)),
        evaluation=replace(recipe.evaluation, scales=(640,)),
    )
    card = " ".join(model_card("a.onnx", description(recipe), proof_of(0.5)).split())
    assert "shorter edge has 640 pixels, unless the longer one would exceed 800." in card
    assert "rounded up to the next of 512, 1024, beyond these to a multiple of 32." in card


def test_equal_aps_of_nothing_are_no_proof_without_a_warning():
    assert proof_of(0.5).warning == ""
    for nothing in (0.0, -1.0):
        looks = [Look("batch 1", ap={"bbox": nothing})]
        proof = Proof("a.onnx", 5, 9, "val.json", "float32", {"bbox": nothing}, looks)
        assert "prove little" in proof.as_dict()["warning"]
        assert "prove little" in model_card("a.onnx", description(small_recipe()), proof)


@pytest.mark.parametrize(("resize", "kind"), [("torchvision", "float32"), ("antialias", "uint8")])
def test_the_example_in_the_card_gives_pixels_of_the_type_the_file_takes(resize, kind):
    recipe = small_recipe()
    recipe = replace(recipe, data=replace(recipe.data, resize=resize))
    code = model_card("a.onnx", description(recipe), proof_of(0.5)).split("```python")[1].split("```")[0]
    assert f'convert("RGB"), "{kind}")' in code
    compile(code, "card", "exec")


def test_a_table_survives_names_with_bars():
    assert markdown([("a|b", "c"), ("d", "e")]) == "| a/b | c |\n| --- | --- |\n| d | e |"


def test_some_images_are_spread_over_all():
    assert some_of(10, 3).tolist() == [0, 4, 9]
    assert some_of(3, None).tolist() == some_of(3, 8).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("recipe", "key"),
    [
        (replace(TINY, evaluation=Evaluation(flip=True)), "evaluation.flip"),
        (replace(TINY, evaluation=Evaluation(scales=(64, 80))), "evaluation.scales"),
        (replace(TINY, evaluation=Evaluation(object_ranges=((0.0, 9.0),))), "evaluation.object_ranges"),
        (with_model(TINY, box_head={"test_iterations": 1}), "model.box_head.test_iterations"),
        (with_model(TINY, box_head={"vote_iou": 0.5}), "model.box_head.vote_iou"),
    ],
)
def test_a_detector_that_looks_more_than_once_is_refused_by_its_key(recipe, key):
    with pytest.raises(InputError, match=key):
        refuse_unexportable(recipe)


def test_a_detector_that_looks_once_is_not_refused():
    refuse_unexportable(TINY)
