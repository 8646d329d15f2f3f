"""How long threads that wait spin, which must be set before torch is loaded."""

import os
import subprocess
import sys

import pytest

from megdet import SPIN_COUNT

NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def settings_seen_by_a_child(**given: str) -> str:
    """What a process that a program with megdet starts finds in its environment."""
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    child = "import os; print(*(f'{n}={os.environ[n]}' for n in " + repr(NAMES) + " if n in os.environ))"
    code = f"import megdet, subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={**environment, **given}, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_threads_that_wait_give_way_soon_also_in_processes_that_are_started() -> None:
    assert settings_seen_by_a_child() == f"GOMP_SPINCOUNT={SPIN_COUNT}"


@pytest.mark.parametrize(("name", "value"), [(NAMES[0], "ACTIVE"), (NAMES[1], "7"), (NAMES[2], "0")])
def test_what_the_user_has_set_stays_as_it_is(name: str, value: str) -> None:
    assert settings_seen_by_a_child(**{name: value}) == f"{name}={value}"


def test_it_is_set_before_torch_is_loaded() -> None:
    """OpenMP reads it when it is loaded; it says so at a level of talk of its own."""
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    command = [sys.executable, "-c", "import megdet.runtime"]  # which loads torch
    done = subprocess.run(
        command, env={**environment, "OMP_DISPLAY_ENV": "VERBOSE"}, capture_output=True, text=True, check=False
    )
    assert f"GOMP_SPINCOUNT = '{SPIN_COUNT}'" in done.stderr
