import argparse
from collections.abc import Callable
from types import ModuleType

import pytest

Script = Callable[[str], ModuleType]


def test_weights_and_arithmetic_of_the_baseline_are_the_published_ones(script: Script) -> None:
    backbones = script("backbones")
    found = backbones.counted(backbones.recipe_of("resnet50", 2, "fp32"), 224)
    assert found["backbone_parameters"] == pytest.approx(25.557 - 2.049, abs=0.01)  # without the classifier
    assert found["backbone_gflops"] == pytest.approx(2 * 4.09, rel=0.02)  # of a multiply-add two
    assert found["parameters"] > found["backbone_parameters"] + 15
    assert found["gflops"] > found["backbone_gflops"]


def test_the_table_takes_the_place_of_the_one_between_the_marks(script: Script) -> None:
    backbones = script("backbones")
    row = {"name": "resnet50", "backbone_parameters": 23.51, "parameters": 41.7, "device": "a CPU"}
    row |= {"backbone_gflops": 104.2, "gflops": 250.4, "mib": 5123.4, "seconds": 4.321}
    text = backbones.table([row], argparse.Namespace(size=800, batch=2, precision="fp32"))
    assert text.splitlines()[-1] == "| `resnet50` | 23.5, 41.7 | 104, 250 | 5,123 | 4.32 s |"
    page = f"before\n{backbones.START}\nold\n{backbones.END}\nafter\n"
    assert backbones.with_table(page, text) == f"before\n{backbones.START}\n{text}\n{backbones.END}\nafter\n"
    with pytest.raises(SystemExit, match="no marks"):
        backbones.with_table("a page", text)
