"""The examples run as they stand, and show what they say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def output_of(name: str, folder: Path, ranks: int = 1) -> str:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, str(EXAMPLES / name)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow  # docs/python.md has the commands, and CI runs them
@pytest.mark.distributed
@pytest.mark.parametrize("name", ["cross_device_batch_norm.py", "plan_as_sampler.py"])
def test_an_example_prints_the_same_on_one_process_and_on_two(name, tmp_path):
    alone, together = output_of(name, tmp_path), output_of(name, tmp_path, ranks=2)
    assert alone == together
    assert len(re.findall(r"loss \d\.\d{9}", alone)) >= 5


def test_agvm_works_around_an_optimizer_of_torch(tmp_path):
    lines = output_of("agvm_around_any_optimizer.py", tmp_path).splitlines()
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in lines]
    rates = [float(line.split("rate ")[1].split(",")[0]) for line in lines]
    assert rates == [0.02, 0.08, 0.08, 0.08, 0.008, 0.0008], "warmup from 0.02 to 0.02 x 64 / 16, then two decays"
    assert losses[-1] < losses[0]
    assert not lines[-1].endswith("x 1.000")


@pytest.mark.slow  # docs/python.md has the command, and CI runs it
def test_a_detector_is_trained_and_used_from_python(tmp_path):
    output = output_of("train_from_python.py", tmp_path)
    assert "after 2 epochs of 64 images" in output
    assert "<Detections in data/example_shapes/val/000000.jpg: " in output
    assert (tmp_path / "runs/from_python/pictures/found.png").stat().st_size > 1000
