"""An ensemble of detectors, made from their detections only; no detector runs again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hotcoco import mask as coco_masks
from torch import Tensor

from megdet.data.image_info import ImageInfo
from megdet.data.result_rows import Detection, Id, Rle
from megdet.data.rle import runs_of_text, voted_mask
from megdet.errors import InputError, nearest, shown
from megdet.files import read_json
from megdet.inference.merging import Candidates, merge
from megdet.recipe import MergeKind

Result = dict[str, Any]

DEFAULT_IOU: dict[MergeKind, float] = {"wbf": 0.55}
"""The default IoU of the kinds of merge whose authors use another than 0.5."""


@dataclass(frozen=True)
class Member:
    """The detections of one detector, and their file."""

    file: Path
    rows: list[Detection]


def read_member(file: Path, *, has_masks: bool = True) -> Member:
    """Read a COCO result file; without its masks if `has_masks` is false.

    Raises InputError if the file is missing or not a result file, or if a detection has neither box nor mask, or a
    broken mask.
    """
    rows = read_json(file, list[Detection])
    for index, row in enumerate(rows):
        if row.bbox is None and row.segmentation is None:
            raise InputError(f"{file}: [{index}] of image {shown(row.image_id)}: a detection needs a bbox or a mask")
        if row.segmentation is not None:
            row.segmentation = _packed(row.segmentation, f"{file}: [{index}] of image {shown(row.image_id)}")
            if row.bbox is None:
                x, y, width, height = coco_masks.to_bbox(_as_dict(row.segmentation)).tolist()
                row.bbox = x, y, width, height
            if not has_masks:
                row.segmentation = None
    return Member(file, rows)


def check_members(members: Sequence[Member], info: ImageInfo | None) -> None:
    """Refuse members with different images or classes, and a mix of members with and without masks.

    The ids must be those of the annotations. Without annotations, all members must have detections in the same images.
    """
    images = [{row.image_id for row in member.rows} for member in members]
    for member, own in zip(members, images, strict=True):
        if not member.rows:
            raise InputError(f"{member.file}: there is no detection in it: leave this member out")
        if info is not None:
            _check_ids(member, info)
            continue
        others = next((other for other, theirs in zip(members, images, strict=True) if own - theirs), None)
        if others is not None:
            image_id = min(own - {row.image_id for row in others.rows}, key=_order)
            raise InputError(
                f"{member.file}: image {shown(image_id)} has detections, and none in {others.file}: are they of the "
                "same images? If so, name their annotations with --annotations"
            )
    with_masks = [sum(row.segmentation is not None for row in member.rows) for member in members]
    for member, count in zip(members, with_masks, strict=True):
        if any(with_masks) and count < len(member.rows):
            index = next(place for place, row in enumerate(member.rows) if row.segmentation is None)
            raise InputError(
                f"{member.file}: [{index}] of image {shown(member.rows[index].image_id)} has no mask, others have: "
                "take members that all have masks, or merge their boxes alone with --boxes"
            )
    sizes: dict[Id, tuple[int, int]] = {}
    for member in members:
        for row in member.rows:
            if row.segmentation is None:
                continue
            size = sizes.setdefault(row.image_id, row.segmentation.size)
            if size != row.segmentation.size:
                raise InputError(
                    f"{member.file}: image {shown(row.image_id)}: a mask of {row.segmentation.size[0]} x "
                    f"{row.segmentation.size[1]} pixels (height x width), others have {size[0]} x {size[1]}: are they "
                    "of the same images?"
                )


def member_weights(
    count: int,
    class_ids: Sequence[Id],
    weights: Sequence[float] | None,
    by_class: Mapping[str, Sequence[float]] | None = None,
    names: Mapping[Id, str] | None = None,
) -> Tensor:
    """The weight of each member for each class, (members, classes).

    Args:
        count: number of members.
        class_ids: the category ids.
        weights: one a member, by default 1.
        by_class: other weights for some classes, by name or id.
        names: the names of the category ids.

    Raises InputError for a wrong number of weights, negative weights, only zeros, or an unknown class.
    """
    table = torch.empty(count, len(class_ids), dtype=torch.float64)
    table[:] = _weights_of(count, weights if weights is not None else [1.0] * count, "--weights").unsqueeze(1)
    columns = {str(identity): place for place, identity in enumerate(class_ids)}
    columns |= {(names or {}).get(identity, str(identity)): place for place, identity in enumerate(class_ids)}
    for name, own in (by_class or {}).items():
        if name not in columns:
            raise InputError(f"--class-weights: no class {shown(name)}{nearest(name, columns)}")
        table[:, columns[name]] = _weights_of(count, own, f"--class-weights: {shown(name)}")
    return table


def merged_members(
    members: Sequence[Member],
    class_ids: Sequence[Id],
    weights: Tensor,
    kind: MergeKind,
    iou: float | None = None,
    vote_iou: float = 0.5,
    most: int = 100,
) -> list[Result]:
    """The detections of an ensemble in the COCO result format, by image, best first; arguments as in `merge`.

    Equal scores go to the earlier member. A mask has the pixels covered by the masks of at least half of the votes for
    its box, by weighted score; if boxes do not vote, it is the mask of the best member.
    """
    rows = [row for member in members for row in member.rows]
    image_ids = sorted({row.image_id for row in rows}, key=_order)
    numbers, classes = ({own: place for place, own in enumerate(ids)} for ids in (image_ids, class_ids))
    boxes = np.array([row.bbox for row in rows], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    candidates = Candidates(
        torch.tensor([numbers[row.image_id] for row in rows]),
        torch.tensor([classes[row.category_id] for row in rows]),
        torch.from_numpy(boxes),
        torch.tensor([row.score for row in rows], dtype=torch.float64),
        torch.tensor([number for number, member in enumerate(members) for _ in member.rows]),
        weights,
    )
    found = merge(candidates, kind, DEFAULT_IOU.get(kind, 0.5) if iou is None else iou, vote_iou, most)
    results: list[Result] = []
    for index, (x1, y1, x2, y2), score in zip(
        found.index.tolist(), found.boxes.tolist(), found.scores.tolist(), strict=True
    ):
        row = rows[index]
        bbox = [round(x1, 3), round(y1, 3), round(x2 - x1, 3), round(y2 - y1, 3)]
        results.append(
            {"image_id": row.image_id, "category_id": row.category_id, "bbox": bbox, "score": round(score, 6)}
        )
    if rows and rows[0].segmentation is not None:
        counts = found.row.bincount(minlength=len(results)).tolist()
        votes = zip(torch.split(found.voter, counts), torch.split(found.weight, counts), strict=True)
        for result, (voters, own_weights) in zip(results, votes, strict=True):
            masks = [_as_dict(rows[voter].segmentation) for voter in voters.tolist()]
            result["segmentation"] = masks[0] if len(masks) == 1 else voted_mask(masks, own_weights.tolist())
    return results


def _check_ids(member: Member, info: ImageInfo) -> None:
    for index, row in enumerate(member.rows):
        for key, own, known in (
            ("image_id", row.image_id, info.file_names),
            ("category_id", row.category_id, info.classes),
        ):
            if own not in known:
                raise InputError(
                    f"{member.file}: [{index}].{key}: {shown(own)} is not in {info.file}: is it of the same images?"
                )


def _weights_of(count: int, weights: Sequence[float], place: str) -> Tensor:
    if len(weights) != count:
        raise InputError(f"{place}: {len(weights)} weights for {count} members: give one to each")
    if min(weights) < 0 or not 0 < sum(weights) < float("inf"):
        raise InputError(f"{place}: {shown(list(weights))}: weights must not be negative, nor all of them 0")
    return torch.tensor(weights, dtype=torch.float64)


def _packed(mask: Rle, place: str) -> Rle:
    """A mask with its runs as compressed text. Raises InputError for invalid runs."""
    runs = np.array(mask.counts, np.int64) if isinstance(mask.counts, list) else runs_of_text(mask.counts)
    if runs is None or not len(runs) or runs.sum() != mask.size[0] * mask.size[1]:
        size = f"{mask.size[0]} x {mask.size[1]}"
        raise InputError(f"{place}: its mask has counts that are not runs of {size} pixels: write it again")
    if isinstance(mask.counts, str):
        return mask
    counts = coco_masks.frPyObjects({"size": list(mask.size), "counts": mask.counts}, *mask.size)["counts"]
    return Rle(mask.size, counts.decode())


def _as_dict(mask: Rle | None) -> dict[str, Any]:
    assert mask is not None, "all detections have masks, or none"
    return {"size": list(mask.size), "counts": mask.counts}


def _order(identity: Id) -> tuple[bool, Id]:
    return isinstance(identity, str), identity
