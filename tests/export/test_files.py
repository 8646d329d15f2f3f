"""Exported files of every kind of detector, made by real processes: they find what the detector finds."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from export_kinds import KINDS, detector_of
from factories import tiny_batch
from megdet.exported.programs import open_program

SHAPES = ((1, 64), (2, 96), (3, 50), (8, 64))
"""Images and edge of the canvas; neither is what the graph was traced with."""


def export(folder: Path, *kinds: str) -> None:
    script = Path(__file__).parents[1] / "export_kinds.py"
    done = subprocess.run([sys.executable, script, folder, *kinds], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr


def check(path: Path, kind: str, shapes=SHAPES) -> None:
    model = detector_of(KINDS[kind])
    program, description = open_program(path)
    assert description.has_masks == model.has_masks
    for images, canvas in shapes:
        batch = tiny_batch(images, canvas=canvas, seed=images)
        with torch.no_grad():
            found = model.detect(model.normalized(batch.pixels, batch.sizes), batch.sizes)
        outputs = program(batch.pixels.numpy(), batch.sizes.numpy())
        boxes, scores, labels, *masks = map(torch.from_numpy, outputs)
        assert (found.labels >= 0).any()
        assert torch.equal(found.labels, labels)
        assert (found.boxes - boxes).abs().max() < 1e-2
        assert (found.scores - scores).abs().max() < 1e-4
        if model.has_masks:
            assert (found.masks - masks[0]).abs().max() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_onnxruntime_finds_what_the_detector_finds(tmp_path, kind):
    export(tmp_path, kind)
    check(tmp_path / f"{kind}.onnx", kind)


@pytest.mark.slow
def test_a_program_of_torch_finds_what_the_detector_finds(tmp_path):
    export(tmp_path, "mask_rcnn.pt2")
    check(tmp_path / "mask_rcnn.pt2", "mask_rcnn", ((1, 96), (2, 128), (3, 70)))
