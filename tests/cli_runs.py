"""Tiny data and options for tests of the command line."""

from dataclasses import dataclass
from pathlib import Path

from megdet.cli.main import main
from megdet.data.demo import draw_demo

OVERRIDES = [
    *("--batch_size", "8", "--bn_size", "4", "--schedule.epochs", "1", "--schedule.warmup_steps", "1"),
    *(
        "--model.fpn.channels",
        "16",
        "--model.box_head.channels",
        "32",
        "--data.short_edges",
        "[64]",
        "--data.max_long_edge",
        "64",
    ),
    *("--model.rpn.samples", "16", "--model.box_head.samples", "16", "--workers", "0"),
]
"""Three steps of a detector of a few channels on 64 px images."""


@dataclass(frozen=True)
class TinyData:
    """A drawn data set of 24 + 4 images."""

    folder: Path

    @property
    def train(self) -> Path:
        return self.folder / "annotations/train.json"

    @property
    def val(self) -> Path:
        return self.folder / "annotations/val.json"

    @property
    def train_images(self) -> Path:
        return self.folder / "train"

    @property
    def val_images(self) -> Path:
        return self.folder / "val"

    @property
    def options(self) -> list[str]:
        """The recipe keys that choose it."""
        return [
            *("--data.train_annotations", str(self.train), "--data.train_images", str(self.train_images)),
            *("--data.val_annotations", str(self.val), "--data.val_images", str(self.val_images)),
            *("--data.draw_demo", ""),
        ]


def train_exactly(data: TinyData, folder: Path, *words: str) -> Path:
    """A run of `demo` in float64 whose detector finds many boxes; returns its folder."""
    options = [
        *("--model.box_head.score_threshold", "0.0", "--precision", "float64"),
        *("--model.backbone.name", "test_resnet"),
    ]
    assert main(["train", "demo", "--run", str(folder), *data.options, *OVERRIDES, *options, *words]) == 0
    return folder


def make_data(folder: Path) -> TinyData:
    """Draw it."""
    draw_demo(folder, num_train=24, num_val=4, size=64, workers=1)
    return TinyData(folder)
