"""An exported file by hand: whatever it is shown, it finds the same, so that what is around the graph can be tested."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from factories import TINY
from megdet.exported.description import FORMAT, KEY, Description
from megdet.recipe import Recipe
from megdet.recipe_file import dump_recipe

NAMES, IDS = ("bolt", "nut", "gear"), (3, 5, 8)


def description(run: Recipe, **changed: Any) -> Description:
    """What a file of this recipe says of itself."""
    own: dict[str, Any] = {
        "format": FORMAT,
        "megdet": "0",
        "class_names": NAMES,
        "category_ids": IDS,
        "has_masks": False,
        "exact_paste": True,
        "recipe": dump_recipe(run),
        "step": 7,
        "weights": "0" * 64,
    }
    return Description(**{**own, **changed})


def write_fixed_file(
    path: Path,
    boxes: NDArray[np.float32],
    scores: NDArray[np.float32],
    labels: NDArray[np.int64],
    masks: NDArray[np.float32] | None = None,
    recipe: Recipe = TINY,
    metadata: str | None = None,
) -> Path:
    """A graph that finds these in every image; boxes are in pixels of the canvas, (detections, 4)."""
    dtype = TensorProto.FLOAT if recipe.data.resize == "torchvision" else TensorProto.UINT8
    found = {"boxes": boxes, "scores": scores, "labels": labels} | ({} if masks is None else {"masks": masks})
    nodes = [
        helper.make_node("Shape", ["sizes"], ["count"], start=0, end=1),
        # every input is used, so that a wrong one is seen
        helper.make_node("Cast", ["pixels"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMax", ["floats"], ["largest"], keepdims=0),
        helper.make_node("Mul", ["largest", "zero"], ["nothing"]),
    ]
    constants = [numpy_helper.from_array(np.float32(0), "zero")]
    outputs = []
    for name, values in found.items():
        constants.append(numpy_helper.from_array(values[None], f"{name}_of_one"))
        constants.append(numpy_helper.from_array(np.array(values.shape, np.int64), f"{name}_shape"))
        kind = helper.np_dtype_to_tensor_dtype(values.dtype)
        nodes += [
            helper.make_node("Concat", ["count", f"{name}_shape"], [f"{name}_whole"], axis=0),
            helper.make_node("Expand", [f"{name}_of_one", f"{name}_whole"], [f"{name}_plain"]),
            helper.make_node("Cast", ["nothing"], [f"{name}_nothing"], to=kind),
            helper.make_node("Add", [f"{name}_plain", f"{name}_nothing"], [name]),
        ]
        outputs.append(helper.make_tensor_value_info(name, kind, ["images", *values.shape]))
    inputs = [
        helper.make_tensor_value_info("pixels", dtype, ["images", 3, "height", "width"]),
        helper.make_tensor_value_info("sizes", TensorProto.INT64, ["images", 2]),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "fixed", inputs, outputs, constants), opset_imports=[helper.make_opsetid("", 18)]
    )
    model.ir_version = 10
    text = description(recipe, has_masks=masks is not None).text() if metadata is None else metadata
    model.metadata_props.add(key=KEY, value=text)
    onnx.save(model, str(path))
    return path


def small_recipe(**data: Any) -> Recipe:
    """Images of 64 pixels in batches of 2."""
    own = replace(TINY.data, **{"short_edges": (64,), "max_long_edge": 96, **data})
    return replace(TINY, data=own, evaluation=replace(TINY.evaluation, batch_size=2))
