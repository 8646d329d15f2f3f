"""How a run stands: everything its screen shows, from the records of metrics.jsonl and a few facts; without torch."""

import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megdet.run_folder.folder import encode_non_finite

RECENT = 20
"""Steps whose mean the screen shows."""
_OF_A_STEP = (
    *("step", "epoch", "learning_rate", "loss", "gradient_norm", "seconds", "data_seconds", "peak_memory_bytes"),
    *("noise", "agvm", "left_out"),
)
"""Keys of a step's record that are neither a term of the loss nor a count."""


@dataclass(frozen=True)
class Score:
    """The numbers of an evaluation that the screen shows; -1 where the ground truth has no such box."""

    step: int
    epoch: float
    ap: float
    ap50: float
    mask_ap: float | None = None


@dataclass
class Standing:
    """How a run stands; `add` takes the records of its metrics.jsonl, the oldest first.

    Args:
        name: of the run folder.
        place: on what it computes, as a few words.
        batch_size: images a step.
        num_images: of the training set.
        last_step: steps of the whole run.
        positive_out_of: the counts of positive samples, by name, and how many samples each is out of.
    """

    name: str
    place: str
    batch_size: int
    num_images: int
    last_step: int
    positive_out_of: Mapping[str, float]
    last: Mapping[str, Any] | None = None
    """the record of the newest step"""
    last_score: Score | None = None
    best_score: Score | None = None
    survived: Counter[str] = field(default_factory=Counter)
    """what went wrong and was mended, in words, and how often"""

    def __post_init__(self) -> None:
        self._recent: deque[Mapping[str, Any]] = deque(maxlen=RECENT)

    def add(self, record: Mapping[str, Any]) -> None:
        """Take a record of metrics.jsonl, with floats for numbers that are not finite."""
        if "loss" in record:
            self.last = record
            self._recent.append(record)
            if "left_out" in record:
                self.survived["updates left out"] += 1
        elif "evaluation" in record:
            self._score(record)
        elif "rolled_back" in record:
            self.survived["roll-backs"] += 1
            self._recent.clear()
        self.survived["images replaced"] += len(record.get("replaced", ()))
        self.survived["loading processes started anew"] += record.get("loading_restarts", 0)
        self.survived["steps made again in smaller pieces"] += record.get("repeated_for_memory", 0)

    def _score(self, record: Mapping[str, Any]) -> None:
        boxes, masks = record["evaluation"]["bbox"], record["evaluation"].get("segm")
        epoch = record["step"] * self.batch_size / max(self.num_images, 1)
        score = Score(record["step"], epoch, boxes["AP"], boxes["AP50"], None if masks is None else masks["AP"])
        self.last_score = score
        if self.best_score is None or score.ap > self.best_score.ap:
            self.best_score = score

    @property
    def step(self) -> int:
        """Steps that are done."""
        return 0 if self.last is None else int(self.last["step"])

    @property
    def is_done(self) -> bool:
        """Whether the last step is made and evaluated."""
        return self.step == self.last_step and self.last_score is not None and self.last_score.step == self.last_step

    @property
    def epochs(self) -> int:
        """Epochs of the whole run; the last may be a part of one."""
        return (self.last_step - 1) * self.batch_size // max(self.num_images, 1) + 1

    @property
    def epoch(self) -> tuple[int, int, int]:
        """The number of the epoch at work (from 1), the steps done in it, and the steps that it has."""
        number, begin = 1, 0
        while self.last_step > (end := self._epoch_end(number)) < self.step:
            number, begin = number + 1, end
        return number, self.step - begin, self._epoch_end(number) - begin

    def _epoch_end(self, number: int) -> int:
        return min(self.last_step, max(1, -(-number * self.num_images // self.batch_size)))

    def loss_terms(self) -> dict[str, float]:
        """The mean of the loss and of its terms over the last steps, those left out not counted."""
        return {name: sum(own) / len(own) for name in self._terms() if (own := self._applied(name))}

    def _applied(self, name: str) -> list[float]:
        """A number of the last steps whose update was applied."""
        return [record[name] for record in self._recent if name in record and "left_out" not in record]

    def _terms(self) -> list[str]:
        if self.last is None:
            return []
        names = (name for name in self.last if name not in _OF_A_STEP and name not in self.positive_out_of)
        return ["loss", *(name for name in names if isinstance(self.last[name], float))]

    def positives(self) -> dict[str, float]:
        """The part of the samples that was positive over the last steps, by what is sampled."""
        return {
            name.removesuffix("_positive").replace("_", " "): sum(own) / len(own) / samples
            for name, samples in self.positive_out_of.items()
            if (own := self._applied(name))
        }

    @property
    def seconds_a_step(self) -> float | None:
        """The mean over the last steps, evaluations not counted; None before the first."""
        return sum(record["seconds"] for record in self._recent) / len(self._recent) if self._recent else None

    @property
    def images_a_second(self) -> float | None:
        """The mean over the last steps; None before the first."""
        return self.batch_size / max(self.seconds_a_step, 1e-9) if self.seconds_a_step is not None else None

    @property
    def waiting(self) -> float:
        """The part of the time of the last steps that went by waiting for images."""
        whole = sum(record["seconds"] for record in self._recent)
        return float(sum(record["data_seconds"] for record in self._recent) / max(whole, 1e-9))

    @property
    def seconds_left(self) -> float | None:
        """Of the steps that are still to be made, evaluations not counted; None before the first step."""
        return None if self.seconds_a_step is None else (self.last_step - self.step) * self.seconds_a_step

    def as_dict(self) -> dict[str, Any]:
        """Everything the screen shows, for JSON; null where it is not known yet."""
        scores = {"last": self.last_score, "best": self.best_score}
        return {
            "run": self.name,
            "place": self.place,
            "step": self.step,
            "last_step": self.last_step,
            "epoch": None if self.last is None else self.last["epoch"],
            "epochs": self.epochs,
            "losses": encode_non_finite(self.loss_terms()),
            "learning_rate": None if self.last is None else self.last["learning_rate"],
            "images_a_second": self.images_a_second,
            "waiting_for_data": self.waiting,
            "peak_memory_bytes": None if self.last is None else self.last.get("peak_memory_bytes"),
            "positive": encode_non_finite(self.positives()),
            "seconds_left": self.seconds_left,
            "evaluations": {name: None if score is None else asdict(score) for name, score in scores.items()},
            "survived": {name: count for name, count in self.survived.items() if count},
            "is_done": self.is_done,
        }


def line_of(records: Sequence[Mapping[str, Any]], batch_size: int, last_step: int) -> str:
    """The last of these steps in one line, with the means of all of them; at least one."""
    last = records[-1]
    seconds = sum(record["seconds"] for record in records)
    pace = len(records) * batch_size / max(seconds, 1e-9)
    left = (last_step - last["step"]) * seconds / len(records)
    waiting = sum(record["data_seconds"] for record in records) / max(seconds, 1e-9)
    losses = [record["loss"] for record in records if "left_out" not in record]
    loss = sum(losses) / len(losses) if losses else math.nan
    return (
        f"epoch {last['epoch']:6.2f}  step {last['step']:6d}/{last_step}  loss {loss:.4f}  "
        f"lr {last['learning_rate']:.5f}  {pace:.1f} images/s  waiting for data {waiting:.0%}  "
        f"{left / 60:.1f} min left"
    )


def duration(seconds: float) -> str:
    """A length of time in two units at most: 45 s, 3 min 20 s, 5 h 07 min, 2 d 3 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"
