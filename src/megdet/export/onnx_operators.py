"""What the operators of an exported graph are in ONNX.

ONNX has all three, nearly: TopK and NonMaxSuppression break ties by the lower index, as ours do, and RoiAlign samples
as torchvision's. Around them stands what makes their outputs as large as those of `ops.graph_operators`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnxscript import opset18 as op

from megdet.ops import graph_operators as operators

_LOWEST = float(np.finfo(np.float32).min)


def _ints(*values: int) -> Any:
    return op.Constant(value_ints=values)


def _floats(*values: float) -> Any:
    return op.Constant(value_floats=values)


def _number(value: int) -> Any:
    return op.Constant(value_int=value)


def _top(scores: Any, count: int) -> tuple[Any, Any]:
    rows = op.Slice(op.Shape(scores), _ints(0), _ints(-1), _ints(0))
    missing = op.Expand(_floats(operators.NOTHING), op.Concat(rows, _ints(count), axis=0))
    best, places = op.TopK(op.Concat(scores, missing, axis=-1), _ints(count), axis=-1, largest=1, sorted=1)
    return best, op.Where(op.Greater(best, _floats(operators.NOTHING)), places, _number(0))


def _survivors(boxes: Any, scores: Any, iou_threshold: float, score_threshold: float, most: int) -> Any:
    limits = _ints(most), _floats(iou_threshold), _floats(max(score_threshold, _LOWEST))
    found = op.NonMaxSuppression(boxes, op.Unsqueeze(scores, _ints(1)), *limits)
    place = op.Gather(found, _ints(0, 2), axis=1)  # segment and candidate; the class between them is always 0
    nothing = op.Expand(_number(0), op.Shape(scores))
    ones = op.Expand(_number(1), op.Slice(op.Shape(place), _ints(0), _ints(1), _ints(0)))
    return op.Cast(op.ScatterND(nothing, place, ones), to=onnx.TensorProto.BOOL)


def _roi_align(
    levels: Sequence[Any],
    strides: Sequence[int],
    rois: Any,
    image_index: Any,
    level_index: Any,
    pool_size: int,
    sampling_ratio: int,
    aligned: bool,
) -> Any:
    def pooled(level: Any, stride: int, own_rois: Any, own_images: Any) -> Any:
        return op.RoiAlign(
            level,
            own_rois,
            own_images,
            coordinate_transformation_mode="half_pixel" if aligned else "output_half_pixel",
            output_height=pool_size,
            output_width=pool_size,
            sampling_ratio=sampling_ratio,
            spatial_scale=1.0 / stride,
        )

    if len(levels) == 1:
        joined = pooled(levels[0], strides[0], rois, image_index)
    else:
        parts, places = [], []
        for number, (level, stride) in enumerate(zip(levels, strides, strict=True)):
            place = op.Squeeze(op.NonZero(op.Equal(level_index, _number(number))), _ints(0))
            parts.append(pooled(level, stride, op.Gather(rois, place), op.Gather(image_index, place)))
            places.append(place)
        # level by level, and back into the order of the RoIs
        order = op.Concat(*places, axis=0)
        count = op.Squeeze(op.Shape(order), _ints(0))
        back = op.ScatterElements(order, order, op.Range(_number(0), count, _number(1)))
        joined = op.Gather(op.Concat(*parts, axis=0), back)
    # a map of bins becomes a row of them; 0 keeps the number of RoIs, and of channels
    return op.Transpose(op.Reshape(joined, _ints(0, 0, pool_size * pool_size)), perm=[0, 2, 1])


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.megdet.top.default: _top,
    torch.ops.megdet.survivors.default: _survivors,
    torch.ops.megdet.roi_align.default: _roi_align,
}
"""For `torch.onnx.export`."""
