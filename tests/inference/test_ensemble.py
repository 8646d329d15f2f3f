"""Ensembles of stored detections, with their masks, and what they refuse."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megdet.data.image_info import ImageInfo
from megdet.data.rle import decode_mask, encode_mask, voted_mask
from megdet.errors import InputError
from megdet.inference.ensemble import Member, check_members, member_weights, merged_members, read_member

SIZE = (20, 30)


def row(image_id: Any, category_id: Any, bbox: list[float] | None, score: float, mask: Any = None) -> dict[str, Any]:
    found = {"image_id": image_id, "category_id": category_id, "score": score}
    return found | ({} if bbox is None else {"bbox": bbox}) | ({} if mask is None else {"segmentation": mask})


def square(x: int, y: int, width: int, height: int, size: tuple[int, int] = SIZE) -> dict[str, Any]:
    return encode_mask(np.ones((height, width), np.bool_), x, y, size)


def member(folder: Path, name: str, *rows: dict[str, Any], **options: bool) -> Member:
    file = folder / f"{name}.json"
    file.write_text(json.dumps(rows))
    return read_member(file, **options)


def info_of(*image_ids: int, classes: tuple[int, ...] = (1, 3)) -> ImageInfo:
    names, sizes = dict.fromkeys(image_ids, "a.png"), dict.fromkeys(image_ids, (20.0, 30.0))
    return ImageInfo(Path("instances.json"), names, sizes, {own: f"class {own}" for own in classes}, False)


def ones(members: int, classes: int) -> torch.Tensor:
    return torch.ones(members, classes, dtype=torch.float64)


def test_masks_vote_with_their_boxes_by_hand(tmp_path):
    a = member(
        tmp_path,
        "a",
        row(5, 3, [0, 0, 10, 10], 0.9, square(0, 0, 10, 10)),
        row(2, 1, [1, 1, 5, 5], 0.2, square(1, 1, 5, 5)),
    )
    b = member(
        tmp_path,
        "b",
        row(5, 3, [2, 0, 10, 10], 0.6, square(2, 0, 10, 10)),
        row(2, 1, [20, 10, 5, 5], 0.3, square(20, 10, 5, 5)),
    )
    c = member(
        tmp_path,
        "c",
        row(5, 3, [2, 0, 10, 10], 0.3, square(2, 0, 10, 10)),
        row(2, 3, [0, 0, 9, 9], 0.1, square(0, 0, 9, 9)),
    )
    check_members([a, b, c], info_of(2, 5))
    found = merged_members([a, b, c], [1, 3], ones(3, 2), "vote")
    assert [(r["image_id"], r["category_id"], r["score"]) for r in found] == [
        (2, 1, 0.3),
        (2, 1, 0.2),
        (2, 3, 0.1),
        (5, 3, 0.9),
    ]
    assert found[3]["bbox"] == [1, 0, 10, 10]  # 2 * (0.6 + 0.3) / 1.8
    # the first has half of the weight: what it has belongs to the object, and what the others have too
    assert np.array_equal(decode_mask(found[3]["segmentation"]).any(0).nonzero()[0], np.arange(12))
    assert found[0]["segmentation"] == square(20, 10, 5, 5)
    lighter = member_weights(3, [1, 3], [0.9, 1.0, 1.0])
    found = merged_members([a, b, c], [1, 3], lighter, "vote")
    assert np.array_equal(decode_mask(found[3]["segmentation"]).any(0).nonzero()[0], np.arange(2, 12))
    best = merged_members([a, b, c], [1, 3], ones(3, 2), "nms")
    assert best[3]["bbox"] == [0, 0, 10, 10]
    assert best[3]["segmentation"] == square(0, 0, 10, 10)


def test_a_vote_of_masks_is_that_of_their_pixels():
    generator = np.random.default_rng(0)
    for count in (1, 2, 3, 5, 8):
        masks = generator.random((count, 13, 17)) < generator.random()
        masks[0, 0, 0] = masks[-1, -1, -1] = True
        weights = generator.integers(1, 5, count).astype(float).tolist()
        runs = [encode_mask(mask, 0, 0, (13, 17)) for mask in masks]
        expected = np.tensordot(weights, masks.astype(int), 1) * 2 >= sum(weights)
        assert np.array_equal(decode_mask(voted_mask(runs, weights)), expected)
    nothing = encode_mask(np.zeros((13, 17), np.bool_), 0, 0, (13, 17))
    assert voted_mask([nothing, nothing], [1.0, 1.0]) == nothing
    whole = encode_mask(np.ones((13, 17), np.bool_), 0, 0, (13, 17))
    assert voted_mask([whole, nothing], [1.0, 1.0]) == whole


def test_a_box_that_a_file_does_not_have_is_around_its_mask(tmp_path):
    found = member(tmp_path, "a", row(1, 1, None, 0.5, square(3, 4, 5, 6)))
    assert merged_members([found], [1], ones(1, 1), "vote")[0]["bbox"] == [3, 4, 5, 6]
    counts = [3 * 20 + 4, 6, 20 * 30 - 70]
    unpacked = member(tmp_path, "b", row(1, 1, None, 0.5, {"size": [20, 30], "counts": counts}))
    assert merged_members([unpacked], [1], ones(1, 1), "vote")[0]["segmentation"] == square(3, 4, 1, 6)
    boxes = member(tmp_path, "c", row(1, 1, None, 0.5, square(3, 4, 5, 6)), has_masks=False)
    assert "segmentation" not in merged_members([boxes], [1], ones(1, 1), "vote")[0]


def refusal(*arguments: Any) -> str:
    with pytest.raises(InputError) as refused:
        check_members(*arguments)
    return str(refused.value)


def test_members_of_other_images_and_classes_are_refused_with_file_and_id(tmp_path):
    a = member(tmp_path, "a", row(1, 1, [0, 0, 5, 5], 0.5), row(2, 1, [0, 0, 5, 5], 0.5))
    b = member(tmp_path, "b", row(1, 1, [0, 0, 5, 5], 0.5))
    c = member(tmp_path, "c", row(1, 1, [0, 0, 5, 5], 0.5), row(9, 3, [0, 0, 5, 5], 0.5))
    assert refusal([a, b], None) == (
        f"{a.file}: image 2 has detections, and none in {b.file}: are they of the same images? If so, name their "
        "annotations with --annotations"
    )
    check_members([a, b], info_of(1, 2))
    assert refusal([a, c], info_of(1, 2)).startswith(f"{c.file}: [1].image_id: 9 is not in instances.json")
    assert refusal([a, c], info_of(1, 2, 9, classes=(1,))).startswith(f"{c.file}: [1].category_id: 3 is not in")
    empty = member(tmp_path, "empty")
    assert refusal([a, empty], info_of(1, 2)).startswith(f"{empty.file}: there is no detection in it")


def test_masks_that_some_lack_or_of_other_sizes_or_broken_are_refused(tmp_path):
    a = member(tmp_path, "a", row(1, 1, [0, 0, 5, 5], 0.5, square(0, 0, 5, 5)))
    b = member(tmp_path, "b", row(1, 1, [0, 0, 5, 5], 0.5))
    c = member(tmp_path, "c", row(1, 1, [0, 0, 5, 5], 0.5, square(0, 0, 5, 5, (30, 20))))
    assert refusal([a, b], None).startswith(f"{b.file}: [0] of image 1 has no mask, others have: take members")
    assert refusal([a, c], None).startswith(
        f"{c.file}: image 1: a mask of 30 x 20 pixels (height x width), others have"
    )
    for counts in ("~", "", [3, 4], "0"):
        with pytest.raises(
            InputError, match=r"d\.json: \[0\] of image 1: its mask has counts that are not runs of 20 x 30"
        ):
            member(tmp_path, "d", row(1, 1, [0, 0, 5, 5], 0.5, {"size": [20, 30], "counts": counts}))
    with pytest.raises(InputError, match=r"e\.json: \[0\] of image 1: a detection needs a bbox or a mask"):
        member(tmp_path, "e", row(1, 1, None, 0.5))


def test_weights_are_one_a_member_and_some_classes_have_their_own():
    weights = member_weights(2, [4, 9], [1.0, 3.0], {"dog": [5.0, 0.0], "4": [2.0, 2.0]}, {4: "cat", 9: "dog"})
    assert weights.tolist() == [[2, 5], [2, 0]]
    assert member_weights(2, [4, 9], None).tolist() == [[1, 1], [1, 1]]
    for own, by_class, fault in (
        ([1.0], None, "--weights: 1 weights for 2 members"),
        ([1.0, -1.0], None, "must not be negative"),
        ([0.0, 0.0], None, "nor all of them 0"),
        (None, {"dot": [1.0, 1.0]}, r"no class 'dot'; did you mean 'dog'\?"),
        (None, {"dog": [1.0]}, "--class-weights: 'dog': 1 weights for 2 members"),
    ):
        with pytest.raises(InputError, match=fault):
            member_weights(2, [4, 9], own, by_class, {4: "cat", 9: "dog"})
