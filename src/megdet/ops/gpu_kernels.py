"""Whether the kernels of this package can be built for a device: Triton is not everywhere, nor is a C compiler."""

import subprocess
import warnings
from functools import cache
from importlib.util import find_spec

import torch


@cache
def kernels_build(device: torch.device) -> bool:
    """Whether Triton's kernels run on a device; NMS of one box is tried once.

    Triton builds a small C library before its first launch. If it cannot, a warning says what is missing.
    """
    if find_spec("triton") is None:
        return False
    from megdet.ops.nms_kernel import thin_segments

    try:
        thin_segments(
            torch.zeros(1, 4, device=device),
            torch.zeros(1, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
            0.5,
        )
    except (OSError, subprocess.CalledProcessError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "C compiler" not in str(error):
            raise
        warnings.warn(
            f"NMS and matching take their slower forms, with the same results: Triton cannot build kernels ({error}); "
            "install a C compiler and Python's headers, such as gcc and python3-dev, or name the compiler in CC",
            RuntimeWarning,
            stacklevel=3,
        )
        return False
    return True
