"""A detector's graph as a file: ONNX, or a program of `torch.export`."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megdet.errors import InputError
from megdet.exported.description import FORMAT, KEY, Description
from megdet.files import cannot_write, replace_file
from megdet.inference.fold import fold_batch_norms
from megdet.inference.trained import TrainedDetector
from megdet.model.choice import make_detector
from megdet.model.graph import DetectionGraph, detection_graph
from megdet.recipe_file import dump_recipe

OPSET = 18
"""Of ONNX; onnxruntime has had it since 1.14."""
INPUTS, OUTPUTS = ("pixels", "sizes"), ("boxes", "scores", "labels", "masks")
_EXAMPLE = (2, 3, 320, 352)
"""What is traced; every map of it has more than one cell, so that no size of 1 becomes a part of the graph."""


def described(trained: TrainedDetector, weights: str, version: str) -> Description:
    """What the file of a detector says of itself; `weights` is the SHA-256 of those it was loaded from."""
    return Description(
        format=FORMAT,
        megdet=version,
        class_names=trained.class_names,
        category_ids=trained.category_ids,
        has_masks=trained.model.has_masks,
        exact_paste=trained.model.exact_paste,
        recipe=dump_recipe(trained.recipe),
        step=trained.step,
        weights=weights,
    )


def write_graph(trained: TrainedDetector, description: Description, kind: str, path: Path) -> None:
    """Write a detector's graph, `onnx` or `torch-export`, whole or not at all. Raises InputError."""
    program = traced(trained)
    write_content(path, onnx_bytes(program, description) if kind == "onnx" else _torch_bytes(program, description))


def write_content(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all. Raises InputError."""
    try:
        replace_file(path, content)
    except OSError as error:
        raise cannot_write(path, error) from error


def graph_of(trained: TrainedDetector) -> DetectionGraph:
    """The graph of a copy of a detector in float32 on the CPU, its batch norms folded."""
    model = make_detector(trained.recipe, len(trained.class_names))
    model.load_state_dict({name: tensor.float().cpu() for name, tensor in trained.model.state_dict().items()})
    model.eval()
    fold_batch_norms(model)
    return detection_graph(model)


def traced(trained: TrainedDetector) -> Any:
    """The graph as a program of `torch.export`; number, height and width of the images are free.

    Raises InputError for a backbone whose graph would be for images of one size.
    """
    dtype = torch.float32 if trained.recipe.data.resize == "torchvision" else torch.uint8
    example = torch.zeros(_EXAMPLE, dtype=dtype), torch.tensor([_EXAMPLE[2:], (300, 320)])
    images, free = torch.export.Dim("images", min=1), torch.export.Dim.AUTO
    shapes = ({0: images, 2: free, 3: free}, {0: images})
    graph = graph_of(trained)
    name = trained.recipe.model.backbone.name
    try:
        with _quiet(), torch.no_grad():
            program = torch.export.export(graph, example, dynamic_shapes=shapes, strict=False)
    except torch._dynamo.exc.UserError as error:
        raise InputError(f"model.backbone.name {name}: torch.export makes no graph of it ({error})") from None
    shape = next(node.meta["val"].shape for node in program.graph.nodes if node.name == INPUTS[0])
    if any(isinstance(shape[axis], int) for axis in (0, 2, 3)):
        raise InputError(f"model.backbone.name {name}: its graph would be for one size of image alone: choose another")
    return program


def onnx_bytes(program: Any, description: Description) -> bytes:
    """The program as an ONNX file, which carries the description."""
    from megdet.export.onnx_operators import TRANSLATIONS  # here, because only this kind needs the packages of ONNX

    names = OUTPUTS if description.has_masks else OUTPUTS[:3]
    with _quiet():
        made = torch.onnx.export(
            program,
            opset_version=OPSET,
            input_names=list(INPUTS),
            output_names=list(names),
            custom_translation_table=TRANSLATIONS,
            verbose=False,
        )
    assert made is not None
    proto = made.model_proto
    axes = {"pixels": {0: "images", 2: "height", 3: "width"}, **{name: {0: "images"} for name in ("sizes", *names)}}
    for value in (*proto.graph.input, *proto.graph.output):
        for axis, name in axes[value.name].items():
            value.type.tensor_type.shape.dim[axis].dim_param = name
    del proto.graph.value_info[:]  # it has the names that torch gave these axes
    proto.metadata_props.add(key=KEY, value=description.text())
    return bytes(proto.SerializeToString())


def _torch_bytes(program: Any, description: Description) -> bytes:
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={KEY: description.text()})
    return file.getvalue()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the notes of torch's exporters, which are about their own insides."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
