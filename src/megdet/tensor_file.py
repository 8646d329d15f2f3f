"""Tensors in a safetensors file."""

from pathlib import Path

from safetensors.torch import load, load_file
from torch import Tensor


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. Raises OSError or SafetensorError."""
    try:
        str(path).encode()
    except UnicodeEncodeError:  # the library opens only paths that are UTF-8
        return load(path.read_bytes())
    return load_file(path)
