from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from megdet.drawing import class_colour, contact_sheet, draw_detections, enlargement, side_by_side

NO_BOXES = np.zeros((0, 4), dtype=np.float32)


def grey(height=480, width=640):
    return np.full((height, width, 3), 128, dtype=np.uint8)


def boxes(*rows):
    return np.array(rows, dtype=np.float32)


def is_colour(picture, index):
    return (np.asarray(picture) == class_colour(index)).all(axis=2)


def test_a_frame_has_the_colour_of_its_class_at_the_edges_of_its_box():
    picture = draw_detections(grey(), boxes([100, 200, 300, 400]), ["cat"], class_indices=[4])
    rows, columns = np.nonzero(is_colour(picture, 4))
    assert (columns.min(), rows.max(), columns.max()) == (100, 399, 299), "x2 and y2 are the box's far edges"
    assert is_colour(picture, 4)[200:400, 100].all()
    assert not is_colour(picture, 4)[220:380, 120:280].any(), "the inside stays free"
    assert (np.asarray(picture)[250:350, 150:250] == 128).all()


def test_colours_of_eighty_classes_differ_and_do_not_change():
    colours = [class_colour(index) for index in range(80)]
    assert colours == [class_colour(index) for index in range(80)]
    assert min(np.abs(np.subtract(a, b)).max() for a, b in combinations(colours, 2)) >= 15
    assert class_colour(10_000) is not None


def test_the_colour_follows_from_the_name_where_there_is_no_index():
    first = draw_detections(grey(), boxes([10, 50, 90, 90], [100, 50, 190, 90]), ["cat", "dog"])
    second = draw_detections(grey(), boxes([100, 50, 190, 90], [10, 50, 90, 90]), ["dog", "cat"])
    assert np.asarray(first)[70, 10].tolist() == np.asarray(second)[70, 10].tolist()


@pytest.mark.parametrize(("size", "factor"), [(128, 4), (64, 7), (447, 2), (448, 1), (2000, 1), (1, 448)])
def test_small_images_are_enlarged_by_a_whole_number(size, factor):
    assert enlargement(size, max(1, size // 2)) == factor
    picture = draw_detections(grey(max(1, size // 2), size), NO_BOXES, [])
    assert picture.size == (size * factor, max(1, size // 2) * factor)


def test_boxes_are_enlarged_with_their_image():
    picture = draw_detections(grey(128, 128), boxes([32, 64, 96, 120]), [""], class_indices=[0])
    rows, columns = np.nonzero(is_colour(picture, 0))
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (128, 256, 383, 479)


def test_an_image_without_boxes_stays_as_it_is():
    assert np.array_equal(np.asarray(draw_detections(grey(), NO_BOXES, [])), grey())


def test_the_image_given_is_not_changed():
    image = grey()
    draw_detections(image, boxes([100, 200, 300, 400]), ["cat"])
    assert (image == 128).all()


def test_the_best_score_is_drawn_on_top():
    same = boxes([100, 200, 300, 400], [100, 200, 300, 400])
    scores = np.array([0.9, 0.2], dtype=np.float32)
    picture = draw_detections(grey(), same, ["", ""], scores, [1, 2])
    assert is_colour(picture, 1)[250:390, 100].all()


@pytest.mark.parametrize(
    "row",
    [
        (-1e9, -50, 1e9, 9000),
        (10, 10, 10, 10),
        (300, 300, 100, 100),
        (639.9, 479.9, 640, 480),
        (700, 500, 900, 900),
        (np.nan, 0, 10, 10),
        (0, 0, np.inf, 10),
        (5, 5, 6.4, 400),
    ],
)
def test_boxes_of_any_kind_do_not_stop_the_drawing(row):
    picture = draw_detections(grey(), boxes(row), ["cat"], np.array([0.5]), [3])
    assert picture.size == (640, 480)
    assert is_colour(picture, 3).any() == bool(np.isfinite(row).all())


@pytest.mark.parametrize(
    "name", ["猫", "кошка", "قط", "बिल्ली", "🐈‍⬛", "two\nlines\t\r", "\udc80", "\0", "", "x" * 5000, "á̂", "[bold]"]
)
def test_names_of_any_script_do_not_stop_the_drawing(name):
    picture = draw_detections(grey(), boxes([100, 200, 300, 400]), [name], np.array([0.5]))
    assert not np.array_equal(np.asarray(picture), grey())
    assert contact_sheet([picture], 1, [name]).width > 640


def test_a_tiny_box_is_not_hidden_by_its_own_name():
    picture = draw_detections(grey(), boxes([300, 200, 310, 210]), ["screw"], class_indices=[5])
    inside = np.asarray(picture)[203:207, 303:307]
    assert (inside == 128).any(), "part of the object can be seen"


def test_a_one_pixel_image_is_drawn():
    assert draw_detections(grey(1, 1), boxes([0, 0, 1, 1]), ["cat"], np.array([1.0])).size == (448, 448)


def test_other_numbers_of_labels_than_boxes_are_a_bug():
    with pytest.raises(ValueError, match="as many labels"):
        draw_detections(grey(), boxes([1, 2, 3, 4]), [])
    with pytest.raises(ValueError, match="as many labels"):
        draw_detections(grey(), boxes([1, 2, 3, 4]), ["cat"], class_indices=[])
    with pytest.raises(ValueError, match="as many labels"):
        draw_detections(grey(), boxes([1, 2, 3, 4]), ["cat"], masks=[])


def a_disc(height=480, width=640, radius=50):
    y, x = np.ogrid[:height, :width]
    return (y - 300) ** 2 + (x - 200) ** 2 < radius**2


def test_a_mask_has_the_colour_of_its_class_thin_inside_and_full_along_its_outline():
    disc = a_disc()
    before = draw_detections(grey(), boxes([100, 200, 300, 400]), [""], class_indices=[4])
    picture = np.asarray(
        draw_detections(grey(), boxes([100, 200, 300, 400]), [""], class_indices=[4], masks=[disc])
    ).astype(int)
    changed = (picture != np.asarray(before)).any(axis=2)
    assert np.array_equal(changed, disc), "the pixels of the mask, all of them, and no others"
    colour = np.array(class_colour(4))
    assert np.abs(picture[300, 200] - (0.6 * 128 + 0.4 * colour)).max() <= 1
    is_outline = (picture == colour).all(axis=2) & disc
    assert is_outline[300, 151]
    assert is_outline[349, 200]
    assert 200 < is_outline.sum() < disc.sum() / 4


def test_a_mask_is_enlarged_with_its_image():
    mask = np.zeros((128, 128), dtype=bool)
    mask[40:60, 70:90] = True
    before = draw_detections(grey(128, 128), boxes([0, 0, 128, 128]), [""], class_indices=[0])
    picture = draw_detections(grey(128, 128), boxes([0, 0, 128, 128]), [""], class_indices=[0], masks=[mask])
    rows, columns = np.nonzero((np.asarray(picture) != np.asarray(before)).any(axis=2))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (160, 239, 280, 359)


@pytest.mark.parametrize("area", [(slice(0, 0), slice(0, 0)), (slice(0, 480), slice(0, 640)), (slice(479, 480), 639)])
def test_masks_at_the_edge_or_without_a_pixel_do_not_stop_the_drawing(area):
    mask = np.zeros((480, 640), dtype=bool)
    mask[area] = True
    picture = draw_detections(grey(), boxes([10, 10, 50, 50]), ["cat"], masks=[mask])
    assert picture.size == (640, 480)


def test_ground_truth_stands_left_and_detections_right():
    both = side_by_side(
        grey(), boxes([100, 200, 300, 400]), ["a"], NO_BOXES, [], truth_class_indices=[4], class_indices=[]
    )
    columns = np.nonzero(is_colour(both, 4))[1]
    assert both.width > 2 * 640
    assert columns.max() < both.width / 2


def test_a_sheet_places_every_image_whole_and_in_order():
    colours = [class_colour(index) for index in range(5)]
    images = [Image.new("RGB", (40 + 10 * i, 60), colour) for i, colour in enumerate(colours)]
    sheet = np.asarray(contact_sheet(images, columns=3, captions=list("abcde")))
    centres = []
    for image, colour in zip(images, colours, strict=True):
        rows, columns = np.nonzero((sheet == colour).all(axis=2))
        assert len(rows) == image.width * image.height
        centres.append((rows.mean(), columns.mean()))
    assert centres[0][0] == centres[1][0] == centres[2][0] < centres[3][0] == centres[4][0]
    assert centres[0][1] < centres[1][1] < centres[2][1]


def test_a_sheet_makes_large_images_smaller_and_enlarges_none():
    sheet = contact_sheet([Image.new("RGB", (4000, 1000)), Image.new("L", (10, 10))], columns=9, cell=400)
    assert 2 * 400 < sheet.width < 900
    assert 100 < sheet.height < 150
    with pytest.raises(ValueError, match="needs images"):
        contact_sheet([], columns=2)
