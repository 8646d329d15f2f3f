"""Reads untrusted weight files and checks their tensors.

No code in a file is run: safetensors holds only tensors, `torch.load` gets `weights_only`, and a pickle of arrays is
read by `array_pickle`.
"""

import argparse
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from megdet.errors import InputError, shown
from megdet.files import is_file, read_bytes
from megdet.model.array_pickle import ArrayPickleError, read_array_pickle
from megdet.tensor_file import load_tensors

_LARGEST_PICKLE = 4 << 30


def read_tensors(file: Path, key: str) -> dict[str, Tensor]:
    """The tensors of a .pth, .safetensors or .pkl file by name; messages begin with the option or key `key`.

    Raises InputError if the file is not a dictionary of plain tensors: dense, not quantized, stored in full, finite.
    """
    if not is_file(file):
        raise InputError(f"{key} {file}: no such file")
    content: Any
    try:
        if file.suffix == ".safetensors":
            content = load_tensors(file)
        elif file.suffix == ".pkl":
            content = _tensors_of_pickle(file)
        else:
            with file.open("rb") as opened:  # torch opens only paths that are UTF-8
                _refuse_compressed(opened)
                # torchvision's reference scripts put their options beside the weights; the class runs no code
                with torch.serialization.safe_globals([argparse.Namespace]):
                    content = torch.load(opened, "cpu", weights_only=True)
    except InputError:
        raise
    except ArrayPickleError as error:
        raise InputError(f"{key} {file}: it cannot be used: {error}") from None
    except Exception:  # torch's own message advises to load the file unsafely
        raise InputError(f"{key} {file}: neither a safetensors file nor tensors saved by torch.save") from None
    for inner in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(inner), dict):
            content = content[inner]
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise InputError(f"{key} {file}: it does not hold a plain dictionary of tensors")
    for name, tensor in content.items():
        fault = "its name is not a string" if not isinstance(name, str) else _fault(tensor)
        if fault:
            raise InputError(f"{key} {file}: tensor {shown(name)} cannot be used: {fault}")
    return content


def _tensors_of_pickle(file: Path) -> dict[Any, Any]:
    """The arrays of a detectron2 file as tensors; they may be under the key `model`."""
    content = read_array_pickle(read_bytes(file, _LARGEST_PICKLE))
    content = content["model"] if isinstance(content.get("model"), dict) else content
    return {
        name: torch.from_numpy(np.array(value, value.dtype.newbyteorder("="), order="C"))
        if isinstance(value, np.ndarray)
        else value
        for name, value in content.items()
    }


def _refuse_compressed(opened: BinaryIO) -> None:
    """Raise ValueError for a compressed archive, which may unpack to a thousand times its size; torch writes none."""
    if zipfile.is_zipfile(opened):
        with zipfile.ZipFile(opened) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("compressed")
    opened.seek(0)


def fitted(tensors: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file, already renamed, in the order of the model's `wanted`.

    Raises InputError with the first tensor that is left over, missing or of another shape or dtype.
    """
    left_over = next((name for name in tensors if name not in wanted), None)
    if left_over is not None:
        raise InputError(f"the detector has no place for the file's {left_over}: the file is of another model")
    for name, tensor in wanted.items():
        if name not in tensors:
            raise InputError(f"the file has no tensor for {name}: it is of another model")
        fault = misfit(name, tensors[name], tensor)
        if fault:
            raise InputError(f"{fault}: the file is of another model")
    return {name: tensors[name] for name in wanted}


def misfit(name: str, tensor: Tensor, wanted: Tensor) -> str:
    """How a file's tensor differs in shape or dtype from the model's tensor `wanted`; empty if it does not."""
    if tensor.shape != wanted.shape:
        return f"the tensor for {name} has shape {tuple(tensor.shape)}, not {tuple(wanted.shape)}"
    if tensor.dtype.is_floating_point != wanted.dtype.is_floating_point:
        return f"the tensor for {name} holds {tensor.dtype}, not {wanted.dtype}"
    return ""


def _fault(tensor: Tensor) -> str:
    """Why a tensor of a file is not a plain one; empty if it is."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested or tensor.device.type != "cpu":
        return f"it is not a dense tensor of plain numbers ({tensor.layout}, {tensor.dtype}, {tensor.device})"
    if tensor.dtype.is_complex:
        return f"its numbers are {tensor.dtype}"
    # with strides of 0 a few bytes can pose as gigabytes
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"its shape {tuple(tensor.shape)} is larger than its stored data"
    if tensor.dtype.is_floating_point and not torch.isfinite(tensor).all():
        return "it has numbers that are not finite"
    return ""
