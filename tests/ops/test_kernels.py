"""The GPU's kernels beside the plain forms: in Triton's interpreter everywhere, on a GPU where there is one."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from factories import random_boxes
from megdet.ops import matching
from megdet.ops.nms import segmented_nms

CASES = [(0, 1), (1, 1), (40, 1), (90, 7), (60, 60), (300, 3)]
"""Candidates and segments."""
INTEGERS = ("i64", "i64", "i32")


MATCHED = [(1, 0, 1), (1, 3, 7), (2, 5, 40), (3, 40, 1100), (2, 1, 0)]
"""Images, rows for boxes, candidates."""


def case(count: int, segments: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Boxes of one neighbourhood, scores with many ties, segments of which some are negative."""
    generator = torch.Generator().manual_seed(count)
    boxes = random_boxes(count, canvas=30, generator=generator)
    scores = torch.randint(-9, 9, (count,), generator=generator).float()
    segment = torch.randint(-1, segments, (count,), generator=generator)
    return boxes.to(device), scores.to(device), segment.to(device)


def matching_case(
    images: int, rows: int, count: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Candidates of whole pixels, so that many overlaps are equal; boxes, some of them empty rows; which are not."""
    generator = torch.Generator().manual_seed(count)
    candidates = random_boxes(count, canvas=30, generator=generator).round().to(dtype)
    boxes = random_boxes(images * rows, canvas=30, generator=generator).round().to(dtype).reshape(images, rows, 4)
    is_box = torch.rand(images, rows, generator=generator) > 0.3
    return candidates.unsqueeze(0).to(device), boxes.to(device), is_box.to(device)


def check_matching_in_the_interpreter() -> None:
    from megdet.ops.matching_kernel import overlaps

    found = 0
    for images, rows, count in MATCHED:
        for dtype in (torch.float32, torch.float64):
            shared, boxes, is_box = matching_case(images, rows, count, dtype)
            for candidates in (shared, shared + torch.arange(images, dtype=dtype).reshape(-1, 1, 1)):
                for keep_best in (False, True):
                    expected = matching._overlaps(candidates, boxes, is_box, keep_best=keep_best)
                    given = overlaps(candidates, boxes, is_box, keep_best=keep_best)
                    for one, other in zip(given, expected, strict=True):
                        assert torch.equal(one, other), (images, rows, count, dtype, keep_best)
                    found += int(expected[2].sum())
    assert found > 100
    far_away = torch.tensor([[[90.0, 90, 99, 99]]]), torch.tensor([[[0.0, 0, 9, 9]]]), torch.ones(1, 1).bool()
    assert not overlaps(*far_away, keep_best=True)[2].any()  # no overlap at all is not the largest


def check_nms_in_the_interpreter() -> None:
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


def check_machine_code() -> None:
    """Triton's compiler needs no GPU."""
    from megdet.ops import matching_kernel, nms_kernel

    for number, bits in (("fp32", "i32"), ("fp64", "i64")):
        nms = dict(zip(("boxes", "segments", "ends", "alive", "threshold"), (number, *INTEGERS, "fp64"), strict=True))
        compile_one(nms_kernel._thin, {name: f"*{kind}" for name, kind in nms.items()}, {"BLOCK": nms_kernel._BLOCK})
        given = {"candidates": f"*{number}", "of_image": "i32", "boxes": f"*{number}"}
        given |= {"count": "i32", "width": "i32"}
        made = {"is_box": "*i1", "largest": f"*{number}", "index": "*i64", "largest_of_box": f"*{bits}"}
        block = {"BLOCK": matching_kernel._BLOCK}
        for keep_best in (False, True):
            compile_one(matching_kernel._match, given | made, block | {"KEEP_BEST": keep_best})
        compile_one(matching_kernel._find_best, given | {"largest_of_box": f"*{bits}", "is_best": "*i1"}, block)


def compile_one(kernel: Any, types: dict[str, str], constants: dict[str, int]) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = types | dict.fromkeys(constants, "constexpr")
    number = next(kind for kind in types.values() if kind.startswith("*fp"))
    for architecture in (80, 90):
        target = GPUTarget("cuda", architecture, 32)
        made = triton.compile(
            ASTSource(kernel, signature, constants),
            target=target,
            options={"num_stages": 1, "enable_fp_fusion": False},
        )
        lines = made.asm["ptx"].splitlines()
        assert any(f"div.rn.f{number[3:]}" in line for line in lines)  # rounded as on a CPU
        assert not any(" fma.rn" in line or "\tfma.rn" in line or "div.full" in line for line in lines)
        assert made.asm["cubin"]


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


def test_the_kernels_do_what_the_plain_forms_do():
    run_here("interpreter", TRITON_INTERPRET="1")


@pytest.mark.slow
def test_the_kernels_become_machine_code_that_rounds_as_a_cpu_does():
    run_here("machine code")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernel_thins_as_the_plain_form_does_on_a_gpu():
    for count, segments in [*CASES, (8000, 40)]:
        expected = segmented_nms(*case(count, segments), 0.5)
        assert torch.equal(segmented_nms(*case(count, segments, "cuda"), 0.5).cpu(), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernels_match_as_the_plain_form_does_on_a_gpu():
    for images, rows, count in [*MATCHED, (4, 700, 60_000)]:
        for keep_best in (False, True):
            on_cpu = matching_case(images, rows, count)
            on_gpu = [given.cuda() for given in on_cpu]
            expected = matching.match_boxes(*on_cpu, 0.7, 0.3, keep_best=keep_best)
            found = matching.match_boxes(*on_gpu, 0.7, 0.3, keep_best=keep_best)
            for one, other in zip(vars(found).values(), vars(expected).values(), strict=True):
                assert torch.equal(one.cpu(), other)


if __name__ == "__main__":
    if sys.argv[1] == "interpreter":
        check_nms_in_the_interpreter()
        check_matching_in_the_interpreter()
    else:
        check_machine_code()
    print("equal")
