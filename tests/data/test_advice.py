import json

import numpy as np
import pytest

from data_factories import SHARED_DATA, needs_shared_data
from megdet.data.advice import Wishes, advise
from megdet.data.coco import load_coco
from megdet.data.new_recipe import Places, new_recipe_file, recipe_text, write_recipe
from megdet.data.sizes_advice import (
    BASE_SIZES,
    added_padding,
    advised_anchors,
    advised_canvas_edges,
    advised_edge,
    advised_long_edge,
    best_ious,
    classes_alike,
    resized_objects,
    small_object,
)
from megdet.data.stats import Statistics, dataset_statistics
from megdet.errors import InputError
from megdet.recipe_file import parse_recipe


def statistics(boxes, *, images=((480, 640),) * 100, num_empty=0):
    """Of boxes (class, width, height), dealt to the images in turn."""
    names = list(dict.fromkeys(name for name, _, _ in boxes))
    width, height = (np.array([box[axis] for box in boxes], float) for axis in (1, 2))
    own = np.arange(len(boxes)) % (len(images) - num_empty)
    return Statistics(
        num_images=len(images),
        num_empty_images=num_empty,
        num_boxes=len(boxes),
        num_crowds=0,
        num_dropped=0,
        class_counts={name: sum(box[0] == name for box in boxes) for name in names},
        boxes_per_image=np.bincount(own, minlength=len(images)),
        box_sizes=np.sqrt(width * height),
        aspect_ratios=width / height,
        box_images=own,
        box_classes=np.array([names.index(box[0]) for box in boxes], np.int64),
        image_sizes=np.array(images, np.int64),
        num_small=0,
        num_medium=len(boxes),
        num_large=0,
        mask_fractions=None,
    )


def squares(name, size, count=100):
    return [(name, size, size)] * count


def test_the_edge_gives_small_objects_32_pixels_in_steps_of_32():
    # 50 px of 480 become 32 px at 307.2
    assert advised_edge(statistics(squares("a", 50))) == 320
    assert advised_edge(statistics(squares("a", 60))) == 256  # 32 px at 256 exactly
    assert advised_edge(statistics(squares("a", 400))) == 256
    assert advised_edge(statistics(squares("a", 10))) == 480  # not enlarged
    assert advised_edge(statistics(squares("a", 10), images=[(3000, 4000)] * 5)) == 800
    assert advised_edge(statistics(squares("a", 10), images=[(100, 200)] * 5)) == 100


def test_a_class_of_small_objects_counts_though_it_has_few():
    boxes = squares("large", 200, 95) + squares("small", 40, 5)
    assert small_object(statistics(boxes)) == 40
    assert advised_edge(statistics(boxes)) == 384  # 40 px of 480 become 32
    assert small_object(statistics(squares("large", 200, 199) + squares("odd", 2, 1))) == 200  # half a percent


def test_a_mark_decides_the_edge_and_may_enlarge():
    stats = statistics(squares("a", 400))
    assert advised_edge(stats, mark=10.0) == 384  # 10 px of 480 become 8 px
    assert advised_edge(stats, mark=6.0) == 640
    assert advised_edge(stats, mark=1.0) == 800


def test_the_long_edge_lets_95_percent_of_the_images_reach_the_short_one():
    stats = statistics(squares("a", 100), images=[(480, 640)] * 98 + [(100, 1000)] * 2)
    assert advised_long_edge(stats, 384) == 512
    # the object in the last image is shrunk to 51.2 px a 100 px
    sizes = resized_objects(stats, 384, 512)
    assert sizes[0] == pytest.approx(80)
    assert sizes[99] == pytest.approx(51.2)


def test_the_iou_with_the_best_anchor_by_hand():
    one = np.ones(1)
    # on the finest level the anchor is a pixel away along both axes: 9 x 9 shared
    assert best_ious(10 * one, one, (10,), (1.0,)) == pytest.approx(81 / (200 - 81))
    assert best_ious(10 * one, one, (5, 10), (1.0,)) == pytest.approx(64 / (200 - 64))  # two pixels on the next level
    assert best_ious(10 * one, one, (20, 40), (1.0,)) == 0.25
    # a box 20 x 5 in an anchor 10 x 10: 50 / (100 + 100 - 50)
    assert best_ious(10 * one, one / 4, (10,), (1.0,)) == pytest.approx(1 / 3)
    assert best_ious(10 * one, one / 4, (10,), (1.0, 0.25)) == pytest.approx(19 * 4 / (200 - 19 * 4))
    assert best_ious(10 * one, one, (200,), (16.0,)) == pytest.approx(100 / 200**2)
    # the anchors of the coarser levels are too far away
    assert best_ious(2 * one, one, (1, 1, 1), (1.0,)) == pytest.approx(0.5 * 0.5 / (4 + 1 - 0.25))


def test_anchors_of_boxes_of_two_sizes():
    found = advised_anchors(np.array([20.0, 80.0] * 50), np.ones(100))
    assert found.sizes == (20, 40, 80, 160, 320)
    assert found.ratios == (1.0,)
    assert found.mean_iou == pytest.approx(19**2 / (2 * 20**2 - 19**2))
    assert found.positive_share == 1
    # tall boxes: height over width is 0.5, 1, 2 at the quantiles
    found = advised_anchors(np.full(90, 64.0), np.repeat([2.0, 1.0, 0.5], 30))
    assert found.ratios == (0.5, 1.0, 2.0)
    assert 64 in found.sizes


@pytest.mark.parametrize(("ratio", "wanted"), [(1 / 7, 0.14), (1 / 40, 0.025), (1 / 300, 0.0033), (19.0, 19.0)])
def test_thin_boxes_get_anchors_of_their_shape(ratio, wanted):
    assert advised_anchors(np.full(90, 64.0), np.full(90, 1 / ratio)).ratios == (wanted,)
    # widths 0.4, 1 and 2.5 times as great: three ratios, all above 0
    several = advised_anchors(np.full(90, 64.0), np.repeat([0.4 / ratio, 1 / ratio, 2.5 / ratio], 30)).ratios
    assert several[1] == wanted
    assert 0 < several[0] < several[1] < several[2]


def test_of_anchors_that_fit_alike_those_of_the_finer_grid_are_advised():
    # 64 px fit 8 * 8, 16 * 4 and 32 * 2 alike
    assert advised_anchors(np.full(10, 64.0), np.ones(10)).sizes[0] == 32


def test_of_anchors_with_nearly_the_same_mean_those_that_train_on_most_boxes_are_advised():
    # objects of COCO's kind of spread, and of 1:3 to 3:1; a smallest anchor of 10 px has no box with 0.7
    random = np.random.default_rng(0)
    sizes, shapes = np.exp(random.normal(3.4, 1, 4000)), np.exp(random.normal(0, 0.7, 4000))
    found = advised_anchors(sizes, shapes)
    ious = {
        base: best_ious(sizes, 1 / shapes, tuple(base * 2**level for level in range(5)), found.ratios)
        for base in BASE_SIZES
    }
    assert (ious[10] >= 0.7).sum() == 0
    highest = max(ious, key=lambda base: ious[base].mean())
    most = max(ious, key=lambda base: (ious[base] >= 0.7).mean())
    assert found.sizes[0] == most > highest
    assert ious[most].mean() > ious[highest].mean() - 0.03


def test_canvas_edges_are_advised_for_many_sizes_only():
    assert advised_canvas_edges(statistics(squares("a", 100)), 384, 512) == ()
    many = statistics(squares("a", 100), images=[(320, 320 + 32 * i) for i in range(16)])
    edges = advised_canvas_edges(many, 320, 800)
    # 16 heights of 320, widths of 320 to 800: of 32 lengths in order the 8th, 16th, 24th and last (by index 7.75, ...)
    assert edges == (320, 576, 800)
    canvases = np.array([320 * (320 + 32 * i) for i in range(16)])
    rounded = np.array([320 * (320 if i == 0 else 576 if i <= 8 else 800) for i in range(16)])
    assert added_padding(many, 320, 800, edges) == pytest.approx(rounded.sum() / canvases.sum() - 1)


def test_classes_alike_have_overlapping_sizes_and_shapes():
    boxes = squares("a", 50) + squares("b", 50) + squares("large", 200) + [("wide", 100, 25)] * 100
    assert classes_alike(statistics(boxes)) == [("a", "b")]
    assert classes_alike(statistics(squares("a", 50) + squares("b", 50, 4))) == []  # too few to tell


def test_look_alike_classes_whose_marks_shrink_are_warned_of_and_a_mark_given_ends_the_warning():
    # a tenth of 300 px is 30 px in the files and 3.2 px at 320 of 3,000
    boxes = squares("a", 300) + squares("b", 300)
    stats = statistics(boxes, images=[(3000, 4000)] * 100)
    advice = advise(stats, Wishes(weights="w.pth"))
    (sentence,) = advice.warnings
    assert advice["data.short_edges"] == (320,)
    assert "(a and b)" in sentence
    assert "30 px in the files and 3.2 px" in sentence
    given = advise(stats, Wishes(weights="w.pth", mark=30.0))
    assert given["data.short_edges"] == (800,)  # 8 px of 30
    assert given.warnings == ()
    apart = advise(statistics(squares("a", 300) + squares("b", 900), images=[(3000, 4000)] * 100), Wishes(weights="w"))
    assert apart.warnings == ()


def test_look_alike_classes_with_large_objects_are_named_in_the_reason_of_the_edge():
    def reason(**wishes):
        stats = statistics(squares("a", 300) + squares("b", 300), images=[(480, 640)] * 100)
        advice = advise(stats, Wishes(weights="w.pth", **wishes))
        assert advice.warnings == ()  # a tenth of 300 px is 16 px at 256 of 480
        return next(own.why for own in advice.values if own.key == "data.short_edges")

    assert reason().endswith("a and b have boxes of one size and shape: if small marks tell them apart, give --mark")
    assert "a and b" not in reason(mark=30.0)
    assert "a and b" not in reason(short_edge=480)  # nothing is lost


def test_tiny_objects_and_rare_classes_are_warned_of():
    boxes = squares("dot", 8, 6) + squares("house", 100, 94)
    advice = advise(statistics(boxes), Wishes(weights="w.pth"))
    tiny, rare = advice.warnings
    assert tiny.startswith("6% of the objects have less than 12 px at a short edge of 480 px (most of all dot)")
    assert rare.endswith("will hardly be learnt: dot")
    assert len(advise(statistics(squares("dot", 8, 5) + squares("house", 100, 95)), Wishes(weights="w")).warnings) == 1


def test_epochs_batch_rate_and_warmup_by_hand():
    # 100 images: (6000 + 50) / 100 = 60.5; 61 epochs of 16 would be 381 updates, so 8: 762.5
    advice = advise(statistics(squares("a", 100)), Wishes(weights="w.pth"))
    assert (advice["schedule.epochs"], advice["batch_size"], advice["bn_size"]) == (61, 8, 8)
    assert advice["schedule.warmup_steps"] == 76
    assert (advice["optimizer.kind"], advice["optimizer.base_lr"], advice["optimizer.scaling"]) == (
        "adamw",
        0.001,
        "sqrt",
    )
    assert advice["optimizer.ema_decay"] == round(1 - 12 / 763, 4)
    (rate,) = (own.why for own in advice.values if own.key == "optimizer.base_lr")
    assert rate.endswith("updates of 8 have 0.00071 (square root rule)")
    # 2,000 images from random weights: (15000 + 50) / 2000 = 7.5, at least 12: 1,500 updates of 16
    images = ((128, 128),) * 2000
    advice = advise(statistics(squares("a", 20, 2000), images=images))
    assert (advice["schedule.epochs"], advice["batch_size"], advice["schedule.warmup_steps"]) == (12, 16, 150)
    assert advice["optimizer.base_lr"] == 0.002
    # images without a box are not trained on
    advice = advise(statistics(squares("a", 20, 20), images=((128, 128),) * 12, num_empty=7))
    assert (advice["schedule.epochs"], advice["batch_size"], advice["bn_size"]) == (100, 5, 5)


def test_classes_in_few_images_may_be_repeated():
    # 100 boxes dealt to 100 images: a class of 9 is in 9% of them, one of 10 in 10%
    def advised(count):
        stats = statistics(squares("common", 100, 100 - count) + squares("rare", 100, count))
        return {own.key: own for own in advise(stats).values}.get("data.repeat_threshold")

    assert (advised(9).value, advised(9).is_set) == (0.1, False)
    assert "(rare)" in advised(9).why
    assert advised(10) is None


def test_wishes_come_first():
    wishes = Wishes(short_edge=200, batch_size=48, epochs=3, backbone="resnet50", weights="r.pth")
    advice = advise(statistics(squares("a", 100)), wishes)
    assert advice["data.short_edges"] == (200,)
    assert (advice["batch_size"], advice["bn_size"], advice["schedule.epochs"]) == (48, 24, 3)
    assert advice["optimizer.base_lr"] == 0.02  # with the paper's SGD, which is the default
    assert "optimizer.kind" not in {own.key for own in advice.values}
    assert advice["model.backbone.weights"] == "r.pth"
    assert "model.fpn.channels" not in {own.key for own in advice.values}  # the paper's, which is the default
    with pytest.raises(InputError, match="batch size 101 is more than the 100 images"):
        advise(statistics(squares("a", 100)), Wishes(batch_size=101))
    with pytest.raises(InputError, match=r"batch size 37 has no divisor from 8 to 32.*: choose 32 or 40"):
        advise(statistics(squares("a", 100)), Wishes(batch_size=37))


def test_crowded_images_have_more_proposals_and_detections():
    advice = advise(statistics(squares("a", 20, 2000), images=((480, 640),) * 10))  # 200 boxes an image
    assert advice["model.rpn.test_proposals"] == 1000
    assert advice["model.box_head.detections"] == 250


@pytest.mark.parametrize(("backbone", "weights"), [("mobilenetv2_100", ""), ("resnet50", "my weights: #1.pth")])
def test_the_recipe_says_what_was_advised_and_why(tmp_path, backbone, weights):
    images = [(320, 320 + 32 * i) for i in range(16)] * 4
    boxes = [("a\nb", 20, 60), ("c", 60, 20), ("c", 40, 40)] * 40 + [("rare", 40, 40)]
    stats = statistics(boxes, images=images, num_empty=3)
    advice = advise(stats, Wishes(backbone=backbone, weights=weights))
    text = recipe_text(tmp_path / "mine.yaml", advice, stats, Places(("t: #.json", "t"), ("v.json", "v")))
    recipe = parse_recipe(text, "mine.yaml")
    assert (recipe.data.train_annotations, recipe.data.val_images) == ("t: #.json", "v")
    for own in advice.values:
        value = recipe
        for name in own.key.split("."):
            value = getattr(value, name)
        assert (value == own.value) is own.is_set, own.key
    # what is only shown is a valid value too
    shown = [own for own in advice.values if not own.is_set]
    assert {own.key for own in shown} == {
        "data.canvas_edges",
        "data.horizontal_flip",
        "data.keep_empty_images",
        "data.repeat_threshold",
        "data.vertical_flip",
    }
    for own in shown:
        leaf = own.key.split(".")[-1]
        assert f"  # {leaf}: " in text
        parse_recipe(text.replace(f"  # {leaf}: ", f"  {leaf}: "), "mine.yaml")
    assert max(map(len, text.splitlines())) <= 120
    words = " ".join(text.replace("#", " ").split())
    assert all(" ".join(own.why.split()) in words for own in advice.values)


def test_a_recipe_for_very_thin_objects_can_be_read():
    thin = statistics([("crack", 4000, 1)] * 100, images=((4000, 4000),) * 100)
    advice = advise(thin, Wishes())
    assert advice["model.anchors.whole_pixels"] is False
    assert "model.anchors.whole_pixels" not in {
        own.key for own in advise(statistics(squares("a", 50)), Wishes()).values
    }


def test_a_new_recipe_overwrites_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stats = statistics(squares("a", 100))
    path = new_recipe_file("mine")
    recipe = write_recipe(path, advise(stats), stats, Places(("t.json", "t")))
    assert path.name == "mine.yaml"
    assert (recipe.data.val_annotations, recipe.data.val_images) == ("t.json", "t")
    assert "says nothing about other images" in path.read_text()
    with pytest.raises(InputError, match="exists"):
        new_recipe_file("mine.yaml")
    with pytest.raises(InputError, match="packaged recipe"):
        new_recipe_file("bccd")


def test_a_data_set_without_boxes_gets_no_advice():
    with pytest.raises(InputError, match="no box"):
        advise(statistics([("a", 1, 1)][:0]))


@needs_shared_data
def test_coco_mini_gets_a_recipe_that_loads(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = SHARED_DATA / "coco_mini"
    file = folder / "annotations" / "instances_train2017.json"
    stats = dataset_statistics(load_coco(file, folder / "train2017", keep_empty=True))
    by_image = json.loads(file.read_text())["images"]
    assert sorted(map(tuple, stats.image_sizes.tolist())) == sorted((own["height"], own["width"]) for own in by_image)
    recipe = write_recipe(tmp_path / "mine.yaml", advise(stats), stats, Places((str(file), "t")))
    assert recipe.data.short_edges[0] % 32 == 0
    assert 256 <= recipe.data.short_edges[0] <= np.median(stats.image_sizes.min(axis=1))
