"""Where Triton finds no C compiler, plain forms replace its kernels; Triton itself says so here, without a GPU."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from megdet.ops import gpu_kernels, nms_kernel

CPU = torch.device("cpu")
MISSING = {
    "": "Failed to find C compiler.",
    "/nowhere/cc": "No such file or directory: '/nowhere/cc'",
    sys.executable: "returned non-zero exit status",  # a compiler that fails, as where Python's headers are missing
}
"""What CC says, and Triton's reason; the path leads nowhere."""


def check_without_a_compiler() -> None:
    """Let Triton begin as on a GPU: it builds its library before it asks for the device."""
    from triton.backends import backends
    from triton.runtime.build import _find_compiler

    backends["nvidia"].driver.is_active = staticmethod(lambda: True)
    for compiler, reason in MISSING.items():
        os.environ.update({"CC": compiler} if compiler else {})
        _find_compiler.cache_clear()
        gpu_kernels.kernels_build.cache_clear()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            assert [gpu_kernels.kernels_build(CPU) for _ in range(3)] == [False] * 3
        (warning,) = told
        assert reason in str(warning.message), warning.message
        assert "install a C compiler and Python's headers" in str(warning.message)
    print("told")


def test_it_is_said_once_what_to_install(tmp_path: Path) -> None:
    places = {"PATH": str(tmp_path), "TRITON_LIBCUDA_PATH": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    environment = {name: value for name, value in os.environ.items() if name != "CC"}
    done = subprocess.run(
        [sys.executable, __file__],
        env={**environment, **places, "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout == "told\n", done.stderr


def test_any_other_failure_of_the_kernel_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(nms_kernel, "thin_segments", fail)
    gpu_kernels.kernels_build.cache_clear()
    with pytest.raises(RuntimeError, match="illegal memory access"):
        gpu_kernels.kernels_build(CPU)


if __name__ == "__main__":
    check_without_a_compiler()
