"""The interface of a tracker."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

PROJECT = "megdet"
"""The project of the runs, unless the tracker's own environment variable names another."""


@dataclass(frozen=True)
class Opening:
    """The arguments with which a tracker is opened."""

    folder: Path
    """the run folder"""
    recipe: Mapping[str, Any]
    """the complete recipe, by dotted key"""
    identity: str
    """the tracker's identity of the run from an earlier start, "" for a new run"""
    first_step: int
    """steps done when this start began"""

    @property
    def name(self) -> str:
        """The name of the run in the tracker."""
        return self.folder.absolute().name


@runtime_checkable
class Tracker(Protocol):
    """A tracked run that is open. Every method may raise anything: the library's errors are its own."""

    identity: str
    """the identity with which a later start opens the same run"""
    place: str
    """where to look at it, for people"""
    forgets_later_steps: bool
    """whether opening it has forgotten the steps after `first_step`, which are then sent again"""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take the numbers of a step, by name; the steps of one name rise."""

    def picture(self, name: str, file: Path) -> None:
        """Take a picture."""

    def attach(self, file: Path) -> None:
        """Take a page in HTML."""

    def close(self) -> None:
        """Send what is not sent yet."""
