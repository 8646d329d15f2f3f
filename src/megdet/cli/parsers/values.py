"""Types of option values for argparse; the error of a wrong value quotes it."""

import argparse
import math
from datetime import timedelta


def whole_number(text: str) -> int:
    """An integer of at least 0."""
    try:
        number = int(text)
    except ValueError:
        number = -1
    if number < 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number")
    return number


def at_least_one(text: str) -> int:
    """An integer of at least 1."""
    number = whole_number(text)
    if number == 0:
        raise argparse.ArgumentTypeError("'0' is not at least 1")
    return number


def whole_numbers(text: str) -> tuple[int, ...]:
    """Integers of at least 0 between commas."""
    return tuple(whole_number(word) for word in text.split(","))


def number(text: str) -> float:
    """A finite number."""
    found = _float(text)
    if not math.isfinite(found):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number")
    return found


def numbers(text: str) -> tuple[float, ...]:
    """Finite numbers between commas."""
    return tuple(number(word) for word in text.split(","))


def fraction(text: str) -> float:
    """A number between 0 and 1."""
    found = number(text)
    if not 0 <= found <= 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not between 0 and 1")
    return found


def positive(text: str) -> float:
    """A finite number above 0."""
    found = _float(text)
    if not (math.isfinite(found) and found > 0):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number above 0")
    return found


def minutes(text: str) -> timedelta:
    """A time of more than 0 minutes."""
    try:
        found = timedelta(minutes=float(text))
    except (ValueError, OverflowError):
        found = timedelta(0)
    if not timedelta(milliseconds=1) <= found <= timedelta(days=365):  # gloo and NCCL count milliseconds
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of minutes above 0")
    return found


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
