"""The two drawings of the glossary as SVG, from the layout and the plan that train."""

from html import escape

import numpy as np

from megdet.data.plan import TrainingPlan
from megdet.distributed.layout import Layout, recipe_layout
from megdet.recipe import Recipe

_COLOURS = ("#3b6fb6", "#c2571a", "#3c8d4f", "#8a4f9e")
_INK, _FAINT, _PAPER, _LINE = "#202124", "#5f6368", "#ffffff", "#b8bcc2"
_CELL, _GAP = 26, 4
_WIDTH = 800
_RECIPE = Recipe(batch_size=32, bn_size=8, plan_window=3)


def groups_and_lanes() -> str:
    """One mini-batch of four groups, and who carries which of its images on 1, 3 and 8 devices."""
    groups = _image_numbers(_RECIPE)
    parts = [
        _text(24, 34, "One mini-batch: 32 images in 4 groups of 8 (batch_size 32, bn_size 8)", bold=True),
        _text(24, 54, "The numbers are images; the plan drew them, and it does not know how many devices there are."),
    ]
    for number, images in enumerate(groups):
        x = 24 + number * (8 * (_CELL - 4) + 16)
        parts += [_image(x + i * (_CELL - 4), 66, image, number, _CELL - 6) for i, image in enumerate(images)]
    y = 120
    for devices in (1, 3, 8):
        drawn, y = _on_devices(groups, recipe_layout(_RECIPE, devices), y)
        parts += drawn
    return _svg(y, parts, "Groups, lanes and shares of one mini-batch on 1, 3 and 8 devices")


def cross_device_batch_norm() -> str:
    """Algorithm 1 of the paper on the layout of 4 devices: two lanes of two."""
    recipe = Recipe(batch_size=16, bn_size=8, plan_window=3)
    layout = recipe_layout(recipe, 4)
    groups = _image_numbers(recipe)
    width, height, top = 172, 214, 96
    parts = [
        _text(
            24, 34, "Cross-device batch norm: 4 devices, 2 lanes of 2, each lane with one group of 8 images", bold=True
        ),
        _text(24, 54, "What crosses devices is two numbers a channel and their count. Images stay where they are."),
    ]
    bars: list[str] = []  # drawn last, over the frames of the devices
    for rank in range(layout.world_size):
        number = layout.groups_of(rank)[0]
        share = groups[number][layout.share_of(rank)]
        place = rank % layout.lane_width
        x = 24 + rank * (width + 16) + layout.lane_of(rank) * 8
        parts += [_box(x, top, width, height), _text(x + 12, top + 22, f"device {rank}", bold=True)]
        parts += [_image(x + 12 + i * (_CELL + 2), top + 32, image, number) for i, image in enumerate(share)]
        for line, text in enumerate(("sum of its pixels", "sum of (pixel - mean)²", "(pixel - mean) / √(var + ε)")):
            parts.append(_text(x + 12, top + 86 + line * 52, text, small=True))
        if place == 0:
            colour, lane = _COLOURS[number], layout.lane_of(rank)
            span = layout.lane_width * (width + 16) - 16
            parts.append(_text(x, top - 12, f"lane {lane}", colour=colour, bold=True))
            bars += [
                _bar(x + 12, top + 98, span - 24, "all-reduce: the mean of the group", colour),
                _bar(x + 12, top + 150, span - 24, "all-reduce: its variance", colour),
            ]
    bottom = top + height + 18
    parts += [
        *bars,
        _bar(
            24,
            bottom,
            4 * (width + 16),
            "once a step, over all lanes: running ← 0.9 running + 0.1 mean over the groups",
            _FAINT,
        ),
        _text(24, bottom + 48, "Nothing of a group goes to another lane. A lane of one device sends nothing at all."),
    ]
    return _svg(bottom + 68, parts, "Cross-device batch norm over two lanes of two devices")


def _image_numbers(recipe: Recipe) -> list[list[int]]:
    """The images of the first step of a plan over 99 images, group by group."""
    plan = TrainingPlan(np.full((99, 2), 480), recipe)
    return [[image.index for image in group.images] for group in plan.groups(0)]


def _on_devices(groups: list[list[int]], layout: Layout, top: int) -> tuple[list[str], int]:
    """The devices of a layout with the images of each round, and where the drawing goes on."""
    count, wide = layout.world_size, layout.lane_width
    noun = "device" if count == 1 else "devices"
    lanes = f"{layout.num_lanes} lane{'s' * (layout.num_lanes > 1)} of {wide}"
    rounds = f"{layout.rounds} micro-batch{'es' * (layout.rounds > 1)} a step"
    parts = [_text(24, top + 20, f"On {count} {noun}: {lanes}, {rounds}", bold=True)]
    cell = _CELL + _GAP
    columns = min(layout.largest_share, (_WIDTH - 48) // count // cell - (count > 1))
    width = max(columns * cell + 12, 80)
    room, rows = width + 8, -(-layout.largest_share // columns)
    height = 38 + layout.rounds * cell * rows
    for rank in range(count):
        x = 24 + rank * room
        parts += [_box(x, top + 34, width, height), _text(x + 8, top + 52, f"device {rank}", small=True)]
        y = top + 60
        for number in layout.groups_of(rank):
            share = groups[number][layout.share_of(rank)]
            for i, image in enumerate(share):
                row, column = divmod(i, columns)
                parts.append(_image(x + 8 + column * cell, y + row * cell, image, number))
            y += cell * rows
    if wide > 1:
        for lane in range(layout.num_lanes):
            left, right = 24 + lane * wide * room, 24 + ((lane + 1) * wide - 1) * room + width
            parts.append(_line(left, top + 42 + height, right, f"lane {lane}"))
        height += 24
    return parts, top + height + 62


def _image(x: int, y: int, number: int, group: int, size: int = _CELL) -> str:
    square = f'<rect x="{x}" y="{y}" width="{size}" height="{size}" rx="4" fill="{_COLOURS[group]}"/>'
    return square + _white(x + size / 2, y + size / 2 + 4, 11, str(number))


def _box(x: int, y: int, width: int, height: int) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="none" stroke="{_LINE}"/>'


def _bar(x: int, y: int, width: int, text: str, colour: str) -> str:
    """A bar across the devices that exchange something."""
    bar = f'<rect x="{x}" y="{y}" width="{width}" height="26" rx="13" fill="{colour}"/>'
    return bar + _white(x + width / 2, y + 18, 13, text)


def _white(x: float, y: float, size: int, text: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="#fff" text-anchor="middle">{escape(text)}</text>'


def _line(left: int, y: int, right: int, text: str) -> str:
    path = f'<path d="M{left} {y - 6}v6H{right}v-6" fill="none" stroke="{_FAINT}"/>'
    return path + _text((left + right) // 2, y + 16, text, small=True, anchor="middle")


def _text(
    x: int, y: int, text: str, *, bold: bool = False, small: bool = False, colour: str = "", anchor: str = "start"
) -> str:
    weight = ' font-weight="600"' if bold else ""
    size, fill = (12 if small else 14), colour or (_INK if bold else _FAINT)
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" fill="{fill}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'
    )


def _svg(height: int, parts: list[str], title: str) -> str:
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
            'font-family="system-ui, sans-serif" role="img">',
            f"<title>{escape(title)}</title>",
            f'<rect width="{_WIDTH}" height="{height}" rx="12" fill="{_PAPER}"/>',
            *parts,
            "</svg>\n",
        ]
    )


PICTURES = {"groups_and_lanes.svg": groups_and_lanes, "cross_device_batch_norm.svg": cross_device_batch_norm}
"""By the name of the file in docs/pictures, what draws it."""
