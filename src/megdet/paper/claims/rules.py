"""What counts as failed, as equal and as better: the rules of all claims, over seeds.

    failed      a loss or a gradient was not finite, or the mean loss of the last 10 steps is not below that of the
                first 3
    fail more   Fisher's exact test, one side: so many more failures are not chance
    better      Welch's interval of the difference of two means leaves out 0
    equal       the 90% interval of the difference lies within the margin (two one-sided tests at 5%)
    keeps       the 90% interval of the mean ratio of two variances lies within the margin; a training counts with the
                mean over its checkpoints, of logarithms

Several comparisons of one claim share its 5%: by Holm's method for failures, in equal parts for intervals, those of
`equal` and `keeps` too: for 5 statements they are the 98% intervals. A training that failed has an mmAP of 0.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from megdet.paper.outcome import Outcome
from megdet.studies.comparison.student import welch_interval

LEVEL = 0.05
"""How often a claim may be called shown by chance alone."""

Word = Literal["shown", "not shown", "equal", "better", "worse", "undecided", "not run"]


@dataclass(frozen=True)
class Verdict:
    """What the runs say of one statement."""

    statement: str
    word: Word
    evidence: str
    """the numbers behind the word"""

    def sentence(self) -> str:
        """For a note below the table."""
        return f"{self.statement}: {self.word} ({self.evidence})."


def has_failed(outcome: Outcome) -> bool:
    """Whether a training failed, by the rule above."""
    if outcome.status == "failed" or outcome.first_loss is None or outcome.last_loss is None:
        return True
    return not outcome.last_loss < outcome.first_loss


def score_of(outcome: Outcome) -> float:
    """The mmAP in percent, 0 for a training that failed."""
    return 0.0 if has_failed(outcome) or outcome.mmap is None else outcome.mmap


def fisher(failed: int, of: int, other_failed: int, other_of: int) -> float:
    """The chance of at least `failed` failures among `of` trainings, if both sides fail as often as each other."""
    total, bad = of + other_of, failed + other_failed
    ways = [math.comb(of, k) * math.comb(other_of, bad - k) for k in range(failed, min(of, bad) + 1)]
    return sum(ways) / math.comb(total, bad)


def holm(chances: Sequence[float], level: float = LEVEL) -> list[bool]:
    """Which of several tests hold together at this level, by Holm's method."""
    order = sorted(range(len(chances)), key=chances.__getitem__)
    holds = [False] * len(chances)
    for place, index in enumerate(order):
        if chances[index] > level / (len(chances) - place):
            break
        holds[index] = True
    return holds


def fraction_interval(failed: int, of: int, level: float = 1 - LEVEL) -> tuple[float, float]:
    """The exact interval of a fraction (Clopper and Pearson), 0 to 1."""
    tail = (1 - level) / 2
    low = 0.0 if failed == 0 else _solve(lambda p: 1 - _at_most(failed - 1, of, p) - tail)
    high = 1.0 if failed == of else _solve(lambda p: tail - _at_most(failed, of, p))
    return low, high


def _at_most(count: int, of: int, p: float) -> float:
    """The chance of at most `count` of `of`."""
    return sum(math.comb(of, k) * p**k * (1 - p) ** (of - k) for k in range(count + 1))


def _solve(rising: Callable[[float], float]) -> float:
    """Where a rising function of 0 to 1 is 0."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True)
class FailMore:
    """The statement that the trainings of one row fail and those of another do not."""

    statement: str
    row: str
    than: str


def judge_failures(statements: Sequence[FailMore], results: Mapping[str, Sequence[Outcome]]) -> list[Verdict]:
    """Fisher's test of every statement; Holm's method over those whose rows have run."""
    counted = []
    for own in statements:
        sides = results.get(own.row, ()), results.get(own.than, ())
        counted.append([(sum(map(has_failed, side)), len(side)) for side in sides])
    ready = [index for index, sides in enumerate(counted) if all(of for _, of in sides)]
    chances = [fisher(*counted[index][0], *counted[index][1]) for index in ready]
    holds = dict(zip(ready, zip(holm(chances), chances, strict=True), strict=True))
    verdicts = []
    for index, (own, counts) in enumerate(zip(statements, counted, strict=True)):
        if index not in holds:
            verdicts.append(Verdict(own.statement, "not run", f"{own.row} and {own.than} have no trainings yet"))
            continue
        holding, chance = holds[index]
        (failed, of), (other, others) = counts
        evidence = f"{own.row} failed {failed} of {of}, {own.than} {other} of {others}; by chance {chance:.3f}"
        verdicts.append(Verdict(own.statement, "shown" if holding else "not shown", evidence))
    return verdicts


@dataclass(frozen=True)
class Scores:
    """The statement that one row scores more than another, or as much."""

    statement: str
    row: str
    than: str
    margin: float | None = None
    """points of mmAP within which both are called equal; None = only better and worse are asked for"""


@dataclass(frozen=True)
class Keeps:
    """The statement that Eq. 4 holds for the trainings of a row, measured along the way (`variance.py`)."""

    statement: str
    row: str
    factor: int
    """k"""
    margin: float
    """0.25: between 1 / 1.25 and 1.25"""


def judge_scores(statements: Sequence[Scores], results: Mapping[str, Sequence[Outcome]]) -> list[Verdict]:
    """Welch's interval of every difference; the statements share the level."""
    return [_judge_score(own, results, len(statements)) for own in statements]


def equality_level(num_statements: int) -> float:
    """The level of the interval that lies within the margin by chance in a part of `LEVEL`, for so many statements."""
    return 1 - 2 * LEVEL / num_statements


def _judge_score(own: Scores, results: Mapping[str, Sequence[Outcome]], num_statements: int) -> Verdict:
    level = 1 - LEVEL / num_statements
    ours, theirs = ([score_of(outcome) for outcome in results.get(name, ())] for name in (own.row, own.than))
    interval = welch_interval(theirs, ours, level)
    if interval is None:
        return Verdict(own.statement, "not run", f"{own.row} and {own.than} need two seeds or more each")
    difference = fmean(ours) - fmean(theirs)
    evidence = (
        f"{own.row} has {difference:+.1f} points against {own.than}, {100 * level:.3g}% interval "
        f"{interval[0]:+.1f} to {interval[1]:+.1f}, {len(ours)} and {len(theirs)} seeds"
    )
    if own.margin is not None:
        narrow = welch_interval(theirs, ours, equality_level(num_statements))
        assert narrow is not None, "the wider one is not"
        evidence += (
            f"; {100 * equality_level(num_statements):.3g}% {narrow[0]:+.1f} to {narrow[1]:+.1f}, margin {own.margin:g}"
        )
        if -own.margin < narrow[0] and narrow[1] < own.margin:
            return Verdict(own.statement, "equal", evidence)
    if interval[0] > 0 or interval[1] < 0:
        return Verdict(own.statement, "better" if interval[0] > 0 else "worse", evidence)
    return Verdict(own.statement, "undecided", evidence)
