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
    assert fallen > 100
    print("equal")


def test_the_kernel_thins_as_the_plain_form_does():
    found = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert found.stdout == "equal\n", found.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernel_thins_as_the_plain_form_does_on_a_gpu():
    for count, segments in [*CASES, (8000, 40)]:
        expected = segmented_nms(*case(count, segments), 0.5)
        assert torch.equal(segmented_nms(*case(count, segments, "cuda"), 0.5).cpu(), expected)


if __name__ == "__main__":
    check_in_the_interpreter()
