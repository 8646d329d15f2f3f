"""The graph of an exported file, ready to be called: by onnxruntime without torch, or by torch."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megdet.errors import InputError
from megdet.exported.description import KEY, SUFFIXES, Description
from megdet.files import reason_of

Program = Callable[[NDArray[Any], NDArray[np.int64]], list[NDArray[Any]]]
"""Pixels (images, 3, height, width) and sizes (images, 2) to boxes, scores, labels and, with masks, their grids."""


def is_exported(path: str | Path | None) -> bool:
    """Whether a path is that of an exported file, by the end of its name."""
    return path is not None and Path(path).suffix.lower() in SUFFIXES


def open_program(path: Path) -> tuple[Program, Description]:
    """The graph of a file and what it says of itself. Raises InputError for a file that is none."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    return _of_torch(path) if path.suffix.lower() == ".pt2" else _of_onnx(path)


def _of_onnx(path: Path) -> tuple[Program, Description]:
    try:
        import onnxruntime
    except ImportError:
        raise InputError("onnxruntime is not installed: pip install 'megdet[export]'") from None
    try:
        session = onnxruntime.InferenceSession(str(path), session_options(), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has an error of its own for every fault of a file
        raise InputError(f"{path}: no graph that onnxruntime runs ({reason_of(error)}): export it again") from None
    description = Description.read(session.get_modelmeta().custom_metadata_map, str(path))

    def run(pixels: NDArray[Any], sizes: NDArray[np.int64]) -> list[NDArray[Any]]:
        found: list[NDArray[Any]] = session.run(None, {"pixels": pixels, "sizes": sizes})
        return found

    return run, description


def session_options() -> Any:
    """Of a session of onnxruntime: as many threads as torch would have, and no notes about its insides."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    asked = os.environ.get("OMP_NUM_THREADS", "")
    options.intra_op_num_threads = int(asked) if asked.isdecimal() else 0  # as torch takes it; 0 is all cores
    return options


def _of_torch(path: Path) -> tuple[Program, Description]:
    import torch

    import megdet.ops.graph_operators  # noqa: F401  # the program calls them by name

    extra = {KEY: ""}
    try:
        program = torch.export.load(path, extra_files=extra)
    except Exception as error:  # a damaged archive raises anything at all
        raise InputError(f"{path}: no program of torch.export ({reason_of(error)}): export it again") from None
    stored = {key: value for key, value in extra.items() if value}
    description = Description.read(stored, str(path))
    module = program.module()

    def run(pixels: NDArray[Any], sizes: NDArray[np.int64]) -> list[NDArray[Any]]:
        with torch.no_grad():
            return [found.numpy() for found in module(torch.from_numpy(pixels), torch.from_numpy(sizes))]

    return run, description
