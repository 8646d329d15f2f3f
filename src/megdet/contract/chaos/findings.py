"""The findings of `chaos`: every disturbance, every finished run, and the verdict."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megdet.contract.chaos.comparison import LIMIT
from megdet.contract.chaos.disturbances import How
from megdet.contract.chaos.processes import Role
from megdet.contract.chaos.progress import Activity
from megdet.run_folder.folder import encode_non_finite


@dataclass
class Disturbed:
    """A signal that was sent, and its effect."""

    number: int
    run: int
    """number of the run, from 1"""
    devices: int
    signal: How
    role: Role
    pid: int
    activity: Activity
    """what the run was doing"""
    step: int
    """the last step in metrics.jsonl at that moment"""
    code: int | None = None
    """exit code of the command; None if it went on"""
    seconds: float = 0.0
    """seconds from the signal to the end of the command"""
    steps_again: int = 0
    """steps that the next start makes again"""

    @property
    def may_end(self) -> bool:
        """Whether the signal may end the run: loading processes and helpers obey SIGTERM only from their parent."""
        return self.signal in ("SIGKILL", "SIGSTOP") or (self.signal == "SIGTERM" and self.role in ("rank", "launcher"))

    def sentence(self) -> str:
        """The disturbance in one line."""
        came = "went on" if self.code is None else f"ended with {self.code} after {self.seconds:.1f} s"
        again = f", {self.steps_again} steps are made again" if self.steps_again else ""
        return (
            f"{self.signal} to a {self.role} ({self.activity}, step {self.step}, {self.devices} ranks): {came}{again}"
        )


@dataclass(frozen=True)
class Finished:
    """A finished run, compared with the undisturbed one."""

    run: int
    starts: int
    difference: float
    """the largest relative difference of a tensor of the last checkpoints"""
    faults: tuple[str, ...]


@dataclass
class Findings:
    """All findings; grows while the runs go on."""

    is_bitwise: bool
    """whether all runs have the same layout or are exact, so that no bit may differ"""
    seed: int
    undisturbed_seconds: float = 0.0
    disturbed: list[Disturbed] = field(default_factory=list)
    finished: list[Finished] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    """faults other than wrong results: a hang, an orphan, a traceback, a refused start"""
    folder: Path | None = None
    """the folder of the runs; kept if there is a fault"""

    @property
    def passes(self) -> bool:
        """Whether every run ended like the undisturbed one, without a fault on the way."""
        return bool(self.finished) and not self.faults and not any(run.faults for run in self.finished)

    @property
    def steps_again(self) -> int:
        """Total number of steps that were made again."""
        return sum(own.steps_again for own in self.disturbed)

    def counts(self) -> Sequence[tuple[str, int]]:
        """How many disturbances there were of each signal, role and activity."""
        kinds = Counter(word for own in self.disturbed for word in (own.signal, own.role, own.activity))
        return sorted(kinds.items())

    def sentence(self) -> str:
        """The verdict in one line."""
        if not self.passes:
            of_runs = [f"run {run.run}: {fault}" for run in self.finished for fault in run.faults]
            faults = [*self.faults, *of_runs] or ["no run came to its end"]
            more = f"; and {len(faults) - 1} more" if faults[1:] else ""
            return f"fail: {faults[0]}{more}; the runs are in {self.folder}"
        worst = max(run.difference for run in self.finished)
        same = "the SHA-256" if self.is_bitwise else f"the weights, to {worst:.2g} of {LIMIT:g} allowed,"
        slowest = max((own.seconds for own in self.disturbed), default=0.0)
        return (
            f"pass: {len(self.disturbed)} disturbances in {len(self.finished)} run(s), all with {same} of the "
            f"undisturbed run; {self.steps_again} steps were made again; the slowest end took {slowest:.1f} s"
        )

    def as_dict(self) -> dict[str, Any]:
        """For strict JSON."""
        found = {
            "pass": self.passes,
            "bitwise": self.is_bitwise,
            "limit": 0.0 if self.is_bitwise else LIMIT,
            "seed": self.seed,
            "undisturbed_seconds": round(self.undisturbed_seconds, 1),
            "steps_made_again": self.steps_again,
            "counts": dict(self.counts()),
            "disturbed": [asdict(own) for own in self.disturbed],
            "finished": [asdict(own) for own in self.finished],
            "faults": self.faults,
            "folder": None if self.passes else str(self.folder),
        }
        return dict(encode_non_finite(found))
