"""An ONNX file whose convolutions and linear layers compute with 8-bit integers, by onnxruntime's static quantisation.

Weights have a scale a channel, what flows between layers one a tensor, seen on images of the training set. The layers
that predict (scores, box deltas, masks) and everything between and after the layers, such as the arithmetic of boxes,
RoIAlign and NMS, stay in float32.
"""

import io
import logging
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from statistics import median
from typing import Any

import onnx
import onnxruntime
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QDQQuantizer,
    QuantType,
    create_calibrator,
)
from onnxruntime.quantization.quant_utils import load_model_with_shape_infer

from megdet.export.calibration import Inputs, Method
from megdet.export.files import INPUTS, write_content
from megdet.export.quantized import Cost, Quantized
from megdet.exported.programs import open_program, session_options

_LAYERS = ("Conv", "Gemm", "MatMul")
_BETWEEN = ("Relu", "MaxPool", "Add")
_METHODS: dict[Method, CalibrationMethod] = {
    "minmax": CalibrationMethod.MinMax,
    "percentile": CalibrationMethod.Percentile,
    "entropy": CalibrationMethod.Entropy,
}
_TIMED = 12
"""Images that the files are timed on."""


def write_int8(
    source: Path, file: Path, inputs: Sequence[Inputs], method: Method, predicting: Collection[str]
) -> Quantized:
    """Write an exported file in 8-bit integers beside the one in float32, and compare what they cost.

    Args:
        source: the file in float32.
        file: the one to write.
        inputs: images to calibrate and to time on, at least one.
        method: how ranges follow from what is seen on them.
        predicting: names of the layers that stay in float32, as `class_layers` of a detector has them.

    Raises:
        InputError: the file cannot be written.
    """
    with _quiet():
        model = load_model_with_shape_infer(source)
        layers, floats = _layers(model.graph, predicting)
        quantizer = QDQQuantizer(
            model,
            True,  # a scale a channel
            True,  # 7 of the 8 bits of weights: x86 processors without VNNI add products in pairs in 16 bits
            QuantType.QInt8,
            QuantType.QUInt8,
            _ranges(source, inputs, method),
            [*layers, *_between(model.graph, layers)],
            [],
            [*_LAYERS, *_BETWEEN],
            {},
        )
        quantizer.quantize_model()
        made = quantizer.model.model
    del made.graph.value_info[:]
    write_content(file, made.SerializeToString())
    timed = inputs[:_TIMED]
    before, after = _costs((source, file), timed)
    return Quantized(method, len(inputs), len(layers), len(floats), len(timed), before, after)


def _layers(graph: onnx.GraphProto, predicting: Collection[str]) -> tuple[list[str], list[str]]:
    """The nodes of layers: those that compute with integers, and those that stay."""
    constants = {tensor.name for tensor in graph.initializer}
    layers: list[str] = []
    floats: list[str] = []
    for node in graph.node:
        if node.op_type in _LAYERS and node.input[1] in constants:
            layer = node.input[1].removeprefix("detector.").rpartition(".")[0]
            (floats if layer in predicting else layers).append(node.name)
    return layers, floats


def _between(graph: onnx.GraphProto, layers: Collection[str]) -> list[str]:
    """The nodes that take nothing but what those layers and such nodes give: between two layers it stays in 8 bits."""
    given: set[str] = set()
    found = []
    for node in graph.node:
        is_between = node.op_type in _BETWEEN and given.issuperset(node.input)
        if is_between:
            found.append(node.name)
        if is_between or node.name in layers:
            given.update(node.output)
    return found


def _ranges(source: Path, inputs: Sequence[Inputs], method: Method) -> Any:
    """How large the numbers before and after each node become."""
    with tempfile.TemporaryDirectory() as folder:
        watched = str(Path(folder) / "watched.onnx")
        calibrator = create_calibrator(
            source,
            [*_LAYERS, *_BETWEEN],
            watched,
            calibrate_method=_METHODS[method],
            extra_options={"symmetric": False},  # most numbers come out of a ReLU
        )
        calibrator.infer_session = _frugal_session(watched)
        for given in inputs:  # one by one, because it stacks what a call brings, and images have sizes of their own
            calibrator.collect_data(_Reader(given))
        return calibrator.compute_data()


def _frugal_session(path: str) -> onnxruntime.InferenceSession:
    """One that gives memory back: by default it keeps some gigabytes for every size of photographs."""
    options = session_options()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # every number is there
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    """One image, as a calibrator asks for it."""

    def __init__(self, given: Inputs) -> None:
        self.left: list[Inputs] = [given]

    def get_next(self) -> dict[str, Any] | None:
        """The inputs of the graph, once."""
        return dict(zip(INPUTS, self.left.pop(), strict=True)) if self.left else None


def _costs(files: Sequence[Path], inputs: Sequence[Inputs]) -> list[Cost]:
    """Of each file, timed in turn on the same images."""
    programs = [open_program(file)[0] for file in files]
    seconds: list[list[float]] = [[] for _ in files]
    for given in (inputs[0], *inputs):  # the first is for warming up
        for program, own in zip(programs, seconds, strict=True):
            start = time.process_time()
            program(*given)
            own.append(time.process_time() - start)
    return [Cost(file.stat().st_size, median(own[1:])) for file, own in zip(files, seconds, strict=True)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the notes of onnxruntime's quantisation, which are about its own insides."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(level)
