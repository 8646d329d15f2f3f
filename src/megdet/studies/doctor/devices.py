"""Devices, NCCL and the speed of each precision, measured; loads torch."""

from collections.abc import Iterator

import torch

from megdet.memory import memory_bytes
from megdet.runtime import accelerators, measure_speeds, num_gpus, processor_name
from megdet.studies.doctor.finding import Finding

_GIB = 2**30
_LITTLE_MEMORY = 8 * _GIB


def look_at_devices() -> Iterator[Finding]:
    """The GPUs, or why there are none; the processor and its memory; NCCL; the two precisions."""
    memory = memory_bytes()
    text = f"{processor_name()}, {'unknown' if memory is None else f'{memory / _GIB:.1f} GiB'} of memory"
    if memory is not None and memory < _LITTLE_MEMORY:
        step = "small batches only: --max-images-per-device 1, recompute block"
        yield Finding("machine", "look", text, step, {"memory_bytes": memory})
    else:
        yield Finding("machine", "good", text, numbers={"memory_bytes": memory})
    yield _gpus()
    if num_gpus() > 1:
        yield _nccl()
    yield _precision()


def _gpus() -> Finding:
    found = accelerators("cuda") if num_gpus() else []
    if found:
        text = ", ".join(f"{one['name']} ({one['memory_bytes'] / _GIB:.0f} GiB)" for one in found)
        return Finding("devices", "good", f"{text}; CUDA {torch.version.cuda}", numbers={"devices": found})
    if torch.version.cuda is None:
        return Finding("devices", "look", "no GPU: this torch is built without CUDA", "on a GPU: uv pip install torch")
    step = "if there is a GPU: check that nvidia-smi lists it, and that its driver fits this CUDA"
    return Finding("devices", "look", f"no GPU that CUDA {torch.version.cuda} sees; trainings are on the CPU", step)


def _nccl() -> Finding:
    if not torch.distributed.is_nccl_available():
        return Finding("NCCL", "bad", "torch is built without it", "install torch with CUDA for Linux, or --device cpu")
    version: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]  # torch's
    return Finding("NCCL", "good", ".".join(map(str, version)))


def _precision() -> Finding:
    device = torch.device("cuda", 0) if num_gpus() else torch.device("cpu")
    speeds = measure_speeds(device)
    numbers = {"float32": speeds.float32, "bfloat16": speeds.bfloat16}
    if speeds.bfloat16_is_slow:
        return Finding("precision", "look", str(speeds), "train with --precision float32 here", numbers)
    if speeds.bfloat16 > speeds.float32:
        return Finding("precision", "good", f"{speeds}: --precision bfloat16 is faster", numbers=numbers)
    return Finding("precision", "good", str(speeds), numbers=numbers)
