"""What one rank knows, all act upon after the same step."""

import signal

import pytest
import torch

from megdet.distributed.termination import STOP_SIGNALS, TerminationListener
from megdet.distributed.world import World
from megdet.training import agreement
from megdet.training.agreement import Agreement
from megdet.training.step import NUM_NOTES, StepResult
from megdet.training.watch import Verdict
from small_runs import ALONE, CPU


def result(notes: torch.Tensor | None = None) -> StepResult:
    notes = torch.zeros(NUM_NOTES) if notes is None else notes
    verdict = Verdict(torch.tensor(False), torch.tensor(torch.inf))
    return StepResult(0, 0.1, {}, torch.zeros(()), verdict, notes)


def test_a_checkpoint_is_due_by_the_clock_of_rank_0_from_the_last_one_on(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(agreement.time, "monotonic", lambda: now)
    first = Agreement(ALONE, TerminationListener(), save_seconds=60.0)
    second, never = Agreement(World(1, 2, CPU), TerminationListener(), 60.0), Agreement(ALONE, TerminationListener())
    now = 159.0
    first.read(result())
    assert not first.is_save_due
    now = 160.0
    first.read(result())
    never.read(result())
    assert first.is_save_due
    assert not never.is_save_due
    assert not any(second.own())
    first.saved()
    first.read(result())
    assert not first.is_save_due


@pytest.mark.skipif(len(STOP_SIGNALS) < 3, reason="there are no such signals here")
def test_the_sum_over_the_ranks_decides_and_the_notice_of_a_scheduler_comes_first() -> None:
    own = Agreement(World(1, 2, CPU), TerminationListener())
    own.read(result(torch.zeros(6)))
    assert own.signal is None
    own.read(result(torch.tensor([1.0, 2.0, 0.0, 1.0, 0.0, 0.0])))
    assert own.signal == signal.SIGUSR1
    assert own.is_save_due
    assert own.listener.is_agreed
    assert not own.is_end_due
    assert not own.are_faults_known
    assert own.error("saved").code == 75
    own.read(result(torch.tensor([0.0, 0.0, 1.0, 0.0, 2.0, 1.0])))
    assert own.error("step 3 is saved").code == 130
    assert own.is_end_due
    assert own.are_faults_known
    assert str(own.error("step 3 is saved")) == "stopped by Ctrl-C: step 3 is saved"
