import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "gradients_of_recipes.py"
RECIPES = (
    *("demo", "demo-cascade", "demo-deformable", "demo-mask", "demo-retinanet", "demo-rfcn"),
    *("bccd", "bccd-retinanet", "bccd-rfcn", "bccd-rfcn:model.backbone.output_stride=8"),
    *("verify-features", "verify-heads", "verify-light-head"),
)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_no_gradient_depends_on_what_fresh_memory_held(precision):
    """The C library fills what it hands out with another byte in each run; a sum that reads it before it is written
    shows in the bits."""
    found = [_gradients(precision, fill) for fill in ("128", "85")]
    assert len(found[0]) == len(RECIPES)
    assert found[0] == found[1]


def _gradients(precision: str, fill: str) -> list[str]:
    run = subprocess.run(
        [sys.executable, str(SCRIPT), precision, *RECIPES],
        env={**os.environ, "MALLOC_PERTURB_": fill, "PYTHONPATH": str(SCRIPT.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout.splitlines()
