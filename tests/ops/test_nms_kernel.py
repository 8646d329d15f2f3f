"""The GPU's kernel beside the plain form: in Triton's interpreter everywhere, on a GPU where there is one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from factories import random_boxes
from megdet.ops.nms import segmented_nms

CASES = [(0, 1), (1, 1), (40, 1), (90, 7), (60, 60), (300, 3)]
"""Candidates and segments."""
INTEGERS = ("i64", "i64", "i32")


def case(count: int, segments: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Boxes of one neighbourhood, scores with many ties, segments of which some are negative."""
    generator = torch.Generator().manual_seed(count)
    boxes = random_boxes(count, canvas=30, generator=generator)
    scores = torch.randint(-9, 9, (count,), generator=generator).float()
    segment = torch.randint(-1, segments, (count,), generator=generator)
    return boxes.to(device), scores.to(device), segment.to(device)


def check_in_the_interpreter() -> None:
    from megdet.ops.nms_kernel import thin_segments

    fallen = 0
    for count, segments in CASES:
        for threshold in (0.3, 0.7):
            given = case(count, segments)
            expected = segmented_nms(*given, threshold)
            assert torch.equal(thin_segments(*given, threshold), expected), (count, segments, threshold)
            fallen += int((~expected).sum())
    for threshold, overlapping in ((0.3, 3), (0.5, 5), (0.6, 6), (0.7, 7)):  # ties, which rounding may tip either way
        for dtype in (torch.float32, torch.float64):
            boxes = torch.tensor([[0, 0, 10, 1], [0, 0, overlapping, 1]], dtype=dtype)
            given = boxes, torch.tensor([2.0, 1.0], dtype=dtype), torch.zeros(2, dtype=torch.int64)
            assert torch.equal(thin_segments(*given, threshold), segmented_nms(*given, threshold)), (threshold, dtype)
    assert fallen > 100
    print("equal")


def check_machine_code() -> None:
    """Triton's compiler needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megdet.ops import nms_kernel

    for number in ("fp32", "fp64"):
        types = dict(zip(("boxes", "segments", "ends", "alive", "threshold"), (number, *INTEGERS, "fp64"), strict=True))
        signature = {name: f"*{kind}" for name, kind in types.items()} | {"BLOCK": "constexpr"}
        source = ASTSource(nms_kernel._thin, signature, {"BLOCK": nms_kernel._BLOCK})
        for architecture in (80, 90):
            target = GPUTarget("cuda", architecture, 32)
            made = triton.compile(source, target=target, options={"num_stages": 1, "enable_fp_fusion": False})
            lines = made.asm["ptx"].splitlines()
            assert any(f"div.rn.f{number[2:]}" in line for line in lines)  # rounded as on a CPU
            assert not any(" fma.rn" in line or "\tfma.rn" in line or "div.full" in line for line in lines)
            assert made.asm["cubin"]
    print("equal")


def run_here(check: str, **environment: str) -> None:
    """Run a check in a process of its own: Triton reads its settings when it is imported."""
    found = subprocess.run(
        [sys.executable, __file__, check],
        env={**os.environ, **environment, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert found.stdout == "equal\n", found.stderr


def test_the_kernel_thins_as_the_plain_form_does():
    run_here("interpreter", TRITON_INTERPRET="1")


@pytest.mark.slow
def test_the_kernel_becomes_machine_code_that_rounds_as_a_cpu_does():
    run_here("machine code")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernel_thins_as_the_plain_form_does_on_a_gpu():
    for count, segments in [*CASES, (8000, 40)]:
        expected = segmented_nms(*case(count, segments), 0.5)
        assert torch.equal(segmented_nms(*case(count, segments, "cuda"), 0.5).cpu(), expected)


if __name__ == "__main__":
    check_in_the_interpreter() if sys.argv[1] == "interpreter" else check_machine_code()
