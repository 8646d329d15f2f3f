"""Files of weights that were trained elsewhere, by anybody: what is in them is looked at before it is used.

Nothing in a file is run: safetensors holds tensors alone, and `torch.load` gets `weights_only`.
"""

import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megdet.errors import InputError, shown
from megdet.files import is_file
from megdet.tensor_file import load_tensors


def read_tensors(file: Path, key: str) -> dict[str, Tensor]:
    """The tensors of a .pth or .safetensors file by name; `key` says in messages what asked for it.

    Raises InputError where the file is no dictionary of plain tensors: dense ones with memory of their own, which no
    quantization packs, of finite numbers.
    """
    if not is_file(file):
        raise InputError(f"{key} {file}: no such file")
    content: Any
    try:
        if file.suffix == ".safetensors":
            content = load_tensors(file)
        else:
            with file.open("rb") as opened:  # torch opens no path that is not UTF-8
                _refuse_compressed(opened)
                content = torch.load(opened, "cpu", weights_only=True)
    except Exception:  # whatever torch says of it, such as how to load it unsafely, helps nobody here
        raise InputError(f"{key} {file}: neither a safetensors file nor tensors saved by torch.save") from None
    for inner in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(inner), dict):
            content = content[inner]
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise InputError(f"{key} {file}: it holds no plain dictionary of tensors")
    for name, tensor in content.items():
        fault = "its name is no text" if not isinstance(name, str) else _fault(tensor)
        if fault:
            raise InputError(f"{key} {file}: tensor {shown(name)} cannot be used: {fault}")
    return content


def _refuse_compressed(opened: BinaryIO) -> None:
    """Raise ValueError for an archive whose content may be a thousand times as large; torch never writes one."""
    if zipfile.is_zipfile(opened):
        with zipfile.ZipFile(opened) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("compressed")
    opened.seek(0)


def misfit(name: str, tensor: Tensor, wanted: Tensor) -> str:
    """How a file's tensor differs in shape or kind from the one of the model that it is for, or nothing."""
    if tensor.shape != wanted.shape:
        return f"the tensor for {name} has shape {tuple(tensor.shape)}, not {tuple(wanted.shape)}"
    if tensor.dtype.is_floating_point != wanted.dtype.is_floating_point:
        return f"the tensor for {name} holds {tensor.dtype}, not {wanted.dtype}"
    return ""


def _fault(tensor: Tensor) -> str:
    """Why a tensor of a file is no plain one, or nothing."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested or tensor.device.type != "cpu":
        return f"it is no dense tensor of plain numbers ({tensor.layout}, {tensor.dtype}, {tensor.device})"
    if tensor.dtype.is_complex:
        return f"its numbers are {tensor.dtype}"
    # a few bytes can pose as gigabytes, by strides of 0
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"its shape {tuple(tensor.shape)} is larger than what is stored of it"
    if tensor.dtype.is_floating_point and not torch.isfinite(tensor).all():
        return "it has numbers that are not finite"
    return ""
