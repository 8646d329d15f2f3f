"""Pictures of boxes and masks: one image, ground truth beside detections, and a sheet of many.

A class has the same colour in every picture. Small images are enlarged first, so that names stay readable.
"""

import colorsys
import math
import zlib
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from megdet.errors import printable

Colour = tuple[int, int, int]
_Rectangle = tuple[int, int, int, int]
_PAPER: Colour = (255, 255, 255)
_INK: Colour = (32, 33, 36)
_MASK_OPACITY = 0.4
_SMALLEST_SIDE = 448  # pixels of the longer side below which an image is enlarged


def class_colour(index: int) -> Colour:
    """An RGB colour for a class index, the same in every picture and as different as possible from lower indices."""
    return _palette()[index % len(_palette())]


def enlargement(width: int, height: int) -> int:
    """The whole factor by which `draw_detections` enlarges an image of this size in pixels; 1 unless it is small."""
    return max(1, math.ceil(_SMALLEST_SIDE / max(width, height)))


def draw_detections(
    image: UInt8[np.ndarray, "height width 3"],
    boxes: Float[np.ndarray, "boxes 4"],
    labels: Sequence[str],
    scores: Float[np.ndarray, "boxes"] | None = None,
    class_indices: Sequence[int] | None = None,
    masks: Sequence[Bool[np.ndarray, "height width"]] | None = None,
) -> Image.Image:
    """The image with its boxes, class names, scores and masks drawn on it.

    Args:
        image: RGB.
        boxes: x1, y1, x2, y2 in pixels of `image`; parts outside of it are cut off, and boxes that are
            not finite are left out.
        labels: the class name of each box, in any script; characters that the font lacks appear as empty frames.
        scores: 0..1, shown in percent; labels of higher scores are placed first.
        class_indices: the class index of each box, for its colour; without them the colour follows from the name.
        masks: the mask of each object, drawn as a transparent colour with an outline.

    Returns:
        An RGB picture of the image's size times `enlargement`.

    Raises:
        ValueError: there are not as many labels, scores, class indices or masks as boxes.
    """
    classes = [zlib.crc32(label.encode("utf-8", "replace")) % 997 for label in labels]
    classes = classes if class_indices is None else [int(index) for index in class_indices]
    given = [own for own in (boxes, labels, classes, scores, masks) if own is not None]
    counts = {len(own) for own in given}
    if len(counts) != 1:
        raise ValueError(f"as many labels, scores, class indices and masks as boxes are needed, not {sorted(counts)}")
    height, width = image.shape[:2]
    factor = enlargement(width, height)
    picture = Image.fromarray(np.ascontiguousarray(image))
    if factor > 1:
        picture = picture.resize((width * factor, height * factor), Image.Resampling.BICUBIC)

    side = math.sqrt(picture.width * picture.height)
    line = max(2, round(side / 220))
    font = _font(max(13, round(side / 42)))
    order = np.arange(len(boxes)) if scores is None else np.argsort(-scores, kind="stable")
    visible = [int(index) for index in order if np.isfinite(boxes[index]).all()]
    corners = {index: _corners(boxes[index] * factor, picture.size) for index in visible}
    if masks is not None:
        for index in reversed(visible):
            _draw_mask(picture, masks[index], factor, class_colour(classes[index]), line)
    canvas = ImageDraw.Draw(picture, "RGBA")
    for index in reversed(visible):  # the best are drawn last, on top
        _draw_frame(canvas, corners[index], class_colour(classes[index]), line)
    plates: list[_Rectangle] = []
    for index in visible:
        text = labels[index] if scores is None else f"{labels[index]} {100 * scores[index]:.0f}"
        _draw_plate(canvas, corners[index], text, class_colour(classes[index]), font, plates)
    return picture


def side_by_side(
    image: UInt8[np.ndarray, "height width 3"],
    truth_boxes: Float[np.ndarray, "truths 4"],
    truth_labels: Sequence[str],
    boxes: Float[np.ndarray, "boxes 4"],
    labels: Sequence[str],
    scores: Float[np.ndarray, "boxes"] | None = None,
    truth_class_indices: Sequence[int] | None = None,
    class_indices: Sequence[int] | None = None,
    truth_masks: Sequence[Bool[np.ndarray, "height width"]] | None = None,
    masks: Sequence[Bool[np.ndarray, "height width"]] | None = None,
) -> Image.Image:
    """The same image twice under a heading: ground truth on the left, detections on the right.

    Arguments are those of `draw_detections`, for each side.
    """
    truth = draw_detections(image, truth_boxes, truth_labels, None, truth_class_indices, truth_masks)
    found = draw_detections(image, boxes, labels, scores, class_indices, masks)
    return contact_sheet([truth, found], 2, [f"ground truth ({len(truth_boxes)})", f"detections ({len(boxes)})"])


def contact_sheet(
    images: Sequence[Image.Image], columns: int, captions: Sequence[str] | None = None, cell: int = 1024
) -> Image.Image:
    """Many pictures on one white sheet, row by row, each in the middle of its cell with its caption above.

    Args:
        images: at least one, of any sizes; images larger than a cell are made smaller, none is enlarged.
        columns: pictures a row.
        captions: one an image, or none.
        cell: the longest side of a cell in pixels; cells are as small as the largest image allows.

    Raises:
        ValueError: there is no image, no column, or another number of captions than images.
    """
    if not images or columns < 1 or (captions is not None and len(captions) != len(images)):
        raise ValueError("a sheet needs images, columns, and a caption an image where there are captions")
    shown = [_fitting(image.convert("RGB"), cell) for image in images]
    width, height = max(image.width for image in shown), max(image.height for image in shown)
    columns = min(columns, len(shown))
    rows = math.ceil(len(shown) / columns)
    gap = max(6, width // 48)
    text_size = max(13, width // 34)
    font = _font(text_size)
    heading = 0 if captions is None else 2 * text_size
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + heading + gap) + gap), color=_PAPER)
    canvas = ImageDraw.Draw(sheet)
    for index, image in enumerate(shown):
        left = gap + index % columns * (width + gap)
        top = gap + index // columns * (height + heading + gap)
        if captions is not None:
            text = _fitted(captions[index], font, width)
            canvas.text((left + width / 2, top + heading / 2), text, fill=_INK, font=font, anchor="mm")
        sheet.paste(image, (left + (width - image.width) // 2, top + heading + (height - image.height) // 2))
    return sheet


@cache
def _palette() -> list[Colour]:
    """96 vivid colours, each the farthest from all before it, with red, green and blue weighted as the eye does."""
    tones = ((0.85, 1.0), (0.5, 1.0), (1.0, 0.75), (0.75, 0.85), (0.45, 0.8))  # saturation, value
    candidates = np.array([colorsys.hsv_to_rgb(hue / 36, *tone) for tone in tones for hue in range(36)])
    weighted = candidates * np.sqrt([0.3, 0.59, 0.11 * 2])
    chosen = [21]  # a clear blue
    distance = np.full(len(candidates), np.inf)
    while len(chosen) < 96:
        distance = np.minimum(distance, np.linalg.norm(weighted - weighted[chosen[-1]], axis=1))
        chosen.append(int(distance.argmax()))
    return [(int(red), int(green), int(blue)) for red, green, blue in (255 * candidates[chosen]).round()]


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib: the same picture on every machine."""
    package = find_spec("matplotlib")  # which takes a tenth of a second to load
    assert package is not None
    assert package.origin is not None
    data = Path(package.origin).parent / "mpl-data"
    if not data.is_dir():  # where a distribution of Linux packs it, its data lie elsewhere
        from matplotlib import get_data_path

        data = Path(get_data_path())
    return ImageFont.truetype(data / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def _fitting(image: Image.Image, longest: int) -> Image.Image:
    factor = longest / max(image.size)
    if factor >= 1:
        return image
    return image.resize(
        (max(1, round(image.width * factor)), max(1, round(image.height * factor))), Image.Resampling.LANCZOS
    )


def _corners(box: Float[np.ndarray, "4"], size: tuple[int, int]) -> _Rectangle:
    """The box's first and last pixels, inside of the picture, at least one pixel each way."""
    edges = np.clip(box, 0, [*size, *size])
    left, right = sorted((round(float(edges[0])), round(float(edges[2]))))
    top, bottom = sorted((round(float(edges[1])), round(float(edges[3]))))
    left, top = min(left, size[0] - 1), min(top, size[1] - 1)
    return left, top, max(left, right - 1), max(top, bottom - 1)


def _draw_mask(
    picture: Image.Image, mask: Bool[np.ndarray, "height width"], factor: int, colour: Colour, line: int
) -> None:
    """Paint the pixels of an object: transparent inside, opaque along its outline, which is half a line wide."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return
    top, left = int(rows[0]), int(columns[0])
    own = np.pad(mask[top : rows[-1] + 1, left : columns[-1] + 1], 1)  # so that it has an outline everywhere
    area = Image.fromarray(own.astype(np.uint8) * 255)
    area = area.resize((area.width * factor, area.height * factor), Image.Resampling.NEAREST)
    inside = area.filter(ImageFilter.MinFilter(2 * max(1, line // 2) + 1))
    strength = np.where(np.asarray(inside) > 0, round(255 * _MASK_OPACITY), np.asarray(area)).astype(np.uint8)
    picture.paste(colour, ((left - 1) * factor, (top - 1) * factor), Image.fromarray(strength))


def _draw_frame(canvas: ImageDraw.ImageDraw, corners: _Rectangle, colour: Colour, line: int) -> None:
    """Draw a line of the class's colour just inside the box, between two thin dark lines for contrast."""
    left, top, right, bottom = corners
    halo = max(1, line // 3)
    line = min(line, max(1, min(right - left, bottom - top) // 4))
    canvas.rectangle((left - halo, top - halo, right + halo, bottom + halo), outline=(0, 0, 0, 110), width=halo)
    if min(right - left, bottom - top) > 2 * (line + halo):
        inside = (left + line, top + line, right - line, bottom - line)
        canvas.rectangle(inside, outline=(0, 0, 0, 110), width=halo)
    canvas.rectangle(corners, outline=colour, width=line)


def _draw_plate(
    canvas: ImageDraw.ImageDraw,
    corners: _Rectangle,
    text: str,
    colour: Colour,
    font: ImageFont.FreeTypeFont,
    plates: list[_Rectangle],
) -> None:
    """Draw the text on a plate at the corner where it hides least of earlier `plates` and its box; add it to them."""
    picture_width, picture_height = canvas.im.size
    padding = max(2, int(font.size) // 4)
    text = _fitted(text, font, picture_width - 2 * padding)
    if not text:
        return
    ascent, descent = font.getmetrics()
    width, height = math.ceil(font.getlength(text)) + 2 * padding, ascent + descent + padding // 2
    left, top, right, bottom = corners
    places = [
        (left, top - height),
        (left, top),
        (right + 1 - width, top - height),
        (left, bottom + 1),
        (left, bottom + 1 - height),
        (right + 1 - width, bottom + 1),
    ]
    candidates = []
    for preference, (x, y) in enumerate(places):
        x = min(max(x, 0), max(0, picture_width - width))
        inside = min(max(y, 0), max(0, picture_height - height))
        plate = (x, inside, x + width, inside + height)
        others = sum(_overlap(plate, other) for other in plates)
        hides = 3 * _overlap(plate, corners) > (right + 1 - left) * (bottom + 1 - top)
        moved = inside != y  # a plate pushed off its edge would lie across the box
        candidates.append((others, hides, moved, preference, plate))
    plate = min(candidates)[-1]
    plates.append(plate)
    canvas.rectangle((plate[0], plate[1], plate[2] - 1, plate[3] - 1), fill=(*colour, 230))
    luminance = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    ink = (0, 0, 0) if luminance > 140 else (255, 255, 255)
    canvas.text((plate[0] + padding, plate[1] + padding // 4), text, fill=ink, font=font)


def _overlap(a: _Rectangle, b: _Rectangle) -> int:
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def _fitted(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text as one printable line, shortened with an ellipsis to this width in pixels."""
    line = printable(" ".join(text.split()))
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "…") > width:
        line = line[: min(len(line) - 1, 200)]
    return line + "…" if line else ""
