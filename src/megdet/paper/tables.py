"""The numbers of the paper: Tables 2 to 4, the text's statements on Figures 1 and 4, and the recipe of a row.

Table 1 is in `studies/sampling/table1.py`. Numbers are as printed. What the paper leaves open is None, or a function
that says what it assumes.
"""

from dataclasses import dataclass
from typing import Literal

from megdet.recipe import Schedule
from megdet.run_length import decay_of

Policy = Literal["normal", "long"]
Rate = Literal["normal", "half"]

TRAINING_IMAGES, VALIDATION_IMAGES = 118_000, 5_000
"""Images to train on and to evaluate on, as Sec. 4 rounds them."""
_IMAGES_PER_DEVICE = 2
"""Sec. 3.3: "if each GPU can hold 2 images"."""


@dataclass(frozen=True)
class TrainingRow:
    """A row of Table 2 or 3: one training of ResNet-50 FPN on COCO."""

    table: Literal["table2", "table3"]
    batch_size: int
    bn_size: int
    """0 = frozen statistics"""
    num_gpus: int | None
    """number of GPUs as printed; None in Table 2, which has no such column"""
    mmap: float | None
    """mmAP on COCO val, percent; None = the training failed"""
    hours: float | None
    """None = the training failed"""
    policy: Policy = "normal"
    rate: Rate = "normal"
    """half: half of the rate by the linear scaling rule"""

    @property
    def failed(self) -> bool:
        """Whether the paper's training did not converge."""
        return self.mmap is None

    @property
    def devices(self) -> int:
        """GPUs as printed; in Table 2, which has no such column, 2 images a GPU as in its row of 16 (`16-base`)."""
        return self.num_gpus or self.batch_size // _IMAGES_PER_DEVICE

    @property
    def epochs(self) -> float:
        """Length of the policy in epochs."""
        return decay_of(Schedule(policy=self.policy)).epochs

    @property
    def name(self) -> str:
        """The name of the row in its table: `16`, `64 (half rate)`, `256 (long), BN 16, 128 GPUs`."""
        size = f"{self.batch_size}" + (" (half rate)" if self.rate == "half" else "")
        size += " (long)" if self.policy == "long" else ""
        return size if self.table == "table2" else f"{size}, BN {self.bn_size}, {self.num_gpus} GPUs"


@dataclass(frozen=True)
class CurveStatement:
    """A statement of the text on one curve of Figure 1 or 4; the paper prints no points of the curves."""

    figure: Literal["figure1", "figure4"]
    batch_size: int
    bn_size: int
    """BN size of the row of Table 3 that is drawn"""
    num_gpus: int
    policy: Policy
    statement: str
    """the statement, shortened"""


@dataclass(frozen=True)
class LeaderboardEntry:
    """A row of Table 4: an entry of the COCO 2017 detection challenge, on test-dev."""

    name: str
    """as printed"""
    mmap: float
    """percent"""
    mmar: float | None
    """percent; None = not in the paper"""


TABLE2 = (
    TrainingRow("table2", 16, 0, None, 36.2, 33.2),
    TrainingRow("table2", 32, 0, None, 36.4, 15.1),
    TrainingRow("table2", 64, 0, None, None, None),
    TrainingRow("table2", 64, 0, None, 36.0, 7.5, rate="half"),
    TrainingRow("table2", 128, 0, None, None, None, rate="half"),
)

TABLE3 = (
    TrainingRow("table3", 16, 0, 8, 36.2, 33.2),
    TrainingRow("table3", 2, 2, 2, 31.5, 131.2),
    TrainingRow("table3", 4, 4, 4, 34.9, 91.4),
    TrainingRow("table3", 8, 8, 8, 35.9, 71.5),
    TrainingRow("table3", 16, 2, 8, 31.0, 45.6),
    TrainingRow("table3", 16, 16, 8, 37.0, 39.5),
    TrainingRow("table3", 32, 32, 8, 37.3, 45.5),
    TrainingRow("table3", 64, 64, 8, 35.3, 40.9),
    TrainingRow("table3", 64, 32, 16, 37.1, 19.6),
    TrainingRow("table3", 64, 16, 32, 37.1, 11.2),
    TrainingRow("table3", 128, 32, 32, 37.1, 11.3),
    TrainingRow("table3", 128, 16, 64, 37.0, 6.5),
    TrainingRow("table3", 256, 32, 64, 37.1, 7.2),
    TrainingRow("table3", 256, 16, 128, 37.1, 4.1),
    TrainingRow("table3", 16, 16, 8, 37.7, 65.2, "long"),
    TrainingRow("table3", 32, 32, 8, 37.8, 60.3, "long"),
    TrainingRow("table3", 64, 32, 16, 37.6, 30.1, "long"),
    TrainingRow("table3", 128, 32, 32, 37.6, 15.8, "long"),
    TrainingRow("table3", 256, 32, 64, 37.7, 9.4, "long"),
    TrainingRow("table3", 256, 16, 128, 37.7, 5.4, "long"),
)

TABLE4 = (
    LeaderboardEntry("DANet", 45.7, 62.7),
    LeaderboardEntry("Trimps-Soushen+QINIU", 48.0, 65.4),
    LeaderboardEntry("bharat umd", 48.1, 64.8),
    LeaderboardEntry("FAIR Mask R-CNN", 50.3, 66.1),
    LeaderboardEntry("MSRA", 50.4, 69.0),
    LeaderboardEntry("UCenter", 51.0, 67.9),
    LeaderboardEntry("MegDet (Ensemble)", 52.5, 69.0),
)
SINGLE_MODEL = LeaderboardEntry("MegDet (single model, val)", 50.5, None)
"""The enhanced detector before the ensemble of four, on COCO val; it has 50.6 on test-dev (appendix)."""

FIGURES = (
    CurveStatement("figure1", 16, 0, 8, "normal", "33 hours, lower accuracy"),
    CurveStatement("figure1", 256, 16, 128, "normal", "more accurate, training nearly an order of magnitude faster"),
    CurveStatement("figure4", 16, 16, 8, "long", "the better one at early epochs"),
    CurveStatement("figure4", 256, 16, 128, "long", "worse at early epochs, catches up after the second decay"),
)
"""The statements of the text about the curves. Figure 4: "the BN sizes are the same in two detectors"."""


def timed_rows() -> list[TrainingRow]:
    """The rows of Tables 2 and 3 that have a time, in the paper's order."""
    return [row for row in TABLE2 + TABLE3 if row.hours is not None]


def recipe_of(row: TrainingRow) -> str:
    """The packaged recipe of a row; rows that differ in the number of GPUs alone share one."""
    name = f"megdet-r50-b{row.batch_size}-bn{row.bn_size}"
    name += "-half" if row.rate == "half" else ""
    name += "-long" if row.policy == "long" else ""
    return "megdet-r50" if name == "megdet-r50-b16-bn16" else name
