"""One finding about a machine."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

State = Literal["good", "look", "bad"]


@dataclass(frozen=True)
class Finding:
    """A finding about one subject; `look` costs speed or room, with `bad` a training cannot start or go on."""

    subject: str
    state: State
    text: str
    next_step: str = ""
    """what to do, in one line; empty if nothing"""
    numbers: dict[str, Any] = field(default_factory=dict)
    """the measured numbers, for programs"""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)
