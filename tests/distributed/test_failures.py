"""A rank that fails stops the others: real processes, each of them looked at."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cli_runs import OVERRIDES, TinyData, make_data
from megdet.cli.main import main
from megdet.distributed import failures
from megdet.distributed.failures import stop_together
from megdet.run_folder.checkpoint_files import checkpoints
from megdet.run_folder.folder import RunFolder
from rank_runs import Sabotage, run_ranks, run_torchrun
from small_runs import ALONE

pytestmark = pytest.mark.distributed
LIMIT = 30.0
SMALL = ["--model.backbone.name", "test_resnet"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return make_data(tmp_path_factory.mktemp("data"))


def train(data: TinyData, tmp_path: Path, *options: object) -> list[object]:
    return ["train", "demo", "--run", tmp_path / "run", *data.options, *OVERRIDES, *SMALL, *options]


def test_a_rank_alone_shares_its_fate_with_nobody() -> None:
    with pytest.raises(ValueError, match="mine"), stop_together(ALONE):
        raise ValueError("mine")


@pytest.mark.parametrize("rank", [0, 2])
def test_an_input_error_of_one_rank_stops_all_with_its_name_and_reason(
    data: TinyData, tmp_path: Path, rank: int
) -> None:
    ends = run_ranks(train(data, tmp_path), 3, tmp_path, Sabotage("input_error", rank))
    for number, ended in enumerate(ends):
        assert ended.code == 2
        assert ended.seconds < LIMIT
        if number == rank:
            assert ended.line.endswith(": picture.jpg: truncated")
        else:
            assert f"rank {rank} stopped: picture.jpg: truncated" in ended.line
            assert "torch" not in ended.errors  # no noise of a store that has gone


def test_an_image_that_one_rank_alone_reads_stops_all_with_its_name(data: TinyData, tmp_path: Path) -> None:
    images = shutil.copytree(data.train_images, tmp_path / "images")
    victim = sorted(images.iterdir())[3]
    victim.write_bytes(victim.read_bytes()[:700])
    lines = []
    for ended in run_ranks(train(data, tmp_path, "--data.train_images", images), 2, tmp_path):
        assert ended.code == 2
        assert victim.name in ended.line
        lines.append(ended.line)
    assert len({line.split(": ", 1)[1] for line in lines}) == 1, "found before work starts, so all say the same"


def test_the_traceback_of_a_bug_stays_with_the_rank_that_has_it(data: TinyData, tmp_path: Path) -> None:
    first, second = run_ranks(train(data, tmp_path), 2, tmp_path, Sabotage("bug", 1))
    assert (first.code, second.code) == (2, 1)
    assert first.line == "megdet: rank 1 stopped: ValueError: an index is off by one"
    assert "in fail" in second.errors
    assert second.errors.rstrip().endswith("ValueError: an index is off by one")


@pytest.mark.parametrize(("rank", "size"), [(1, 4), (0, 2)])
def test_a_rank_that_is_killed_is_named_by_all_others(data: TinyData, tmp_path: Path, rank: int, size: int) -> None:
    ends = run_ranks(train(data, tmp_path), size, tmp_path, Sabotage("kill", rank))
    assert ends[rank].code == -9
    for ended in (ended for number, ended in enumerate(ends) if number != rank):
        assert ended.code == 2
        assert ended.seconds < LIMIT
        assert f"rank {rank}" in ended.line
        assert "died without a word (killed, or out of memory?)" in ended.line


@pytest.mark.parametrize(
    ("file", "is_lost"),
    [("distributed/exact_gradients.py", True), ("distributed/gradients.py", True), ("training/step.py", False)],
)
def test_a_message_of_gloo_that_does_not_name_it_is_known_by_where_it_was_raised(file: str, is_lost: bool) -> None:
    # seen where a rank was frozen for longer than the timeout
    code = "raise RuntimeError('Application timeout caused pair closure')"
    with pytest.raises(RuntimeError) as caught:
        exec(compile(code, failures.PACKAGE / file, "exec"))
    assert failures._is_lost_peer(caught.value) is is_lost


def test_a_rank_that_hangs_is_named_with_its_place_and_ended_too(data: TinyData, tmp_path: Path) -> None:
    for ended in run_ranks(train(data, tmp_path, "--timeout", "0.1"), 3, tmp_path, Sabotage("hang", 1)):
        assert ended.code == 2
        assert ended.seconds < LIMIT
        assert "rank 1 kept the others waiting longer than 0.1 minutes (--timeout)" in ended.line
        assert "rank 1 was in training/run.py:" in ended.line


@pytest.mark.slow
def test_a_rank_that_is_frozen_counts_as_dead(data: TinyData, tmp_path: Path) -> None:
    first, second, _ = run_ranks(train(data, tmp_path, "--timeout", "0.1"), 3, tmp_path, Sabotage("freeze", 2))
    for ended in (first, second):
        assert ended.code == 2
        assert ended.seconds < LIMIT
        assert "rank 2 died without a word" in ended.line


def test_an_image_that_one_rank_cannot_evaluate_stops_the_others_too(data: TinyData, tmp_path: Path) -> None:
    assert main([str(word) for word in train(data, tmp_path)]) == 0
    images = shutil.copytree(data.val_images, tmp_path / "val")
    victim = sorted(images.iterdir())[1]
    victim.write_bytes(victim.read_bytes()[:700])
    words = ["evaluate", tmp_path / "run", "--data", data.val, images, "--evaluation.batch_size", 1, "--workers", 0]
    lines = []
    for ended in run_ranks(words, 2, tmp_path / "ranks"):
        assert ended.code == 2
        assert victim.name in ended.line
        lines.append(ended.line)
    assert len({line.split(": ", 1)[1] for line in lines}) == 1, "found before work starts, so all say the same"


def test_torchrun_shows_the_reason_of_the_rank_that_failed(data: TinyData, tmp_path: Path) -> None:
    images = shutil.copytree(data.train_images, tmp_path / "images")
    victim = sorted(images.iterdir())[3]
    victim.write_bytes(victim.read_bytes()[:700])
    done = run_torchrun(train(data, tmp_path, "--data.train_images", images), 2, tmp_path)
    assert done.returncode == 1
    lines = lines_of_ours(done.stderr)
    assert lines
    assert all(victim.name in line for line in lines)
    assert "gloo" not in done.stderr


def lines_of_ours(errors: str) -> list[str]:
    return [line for line in errors.splitlines() if line.startswith(("megdet:", "megdet (rank"))]


@pytest.mark.parametrize(("rank", "size"), [(1, 2), pytest.param(0, 2, marks=pytest.mark.slow)])
def test_under_torchrun_one_line_of_ours_names_the_rank_that_was_killed(
    data: TinyData, tmp_path: Path, rank: int, size: int
) -> None:
    done = run_torchrun(train(data, tmp_path), size, tmp_path, Sabotage("kill", rank))
    assert done.returncode == 1
    (line,) = lines_of_ours(done.stderr)
    assert line.endswith(f": rank {rank} died without a word (killed, or out of memory?)")


def test_a_signal_to_one_rank_stops_all_after_the_same_step_which_is_saved(data: TinyData, tmp_path: Path) -> None:
    first, second = run_ranks(train(data, tmp_path, "--workers", 1), 2, tmp_path, Sabotage("told", 1))
    assert (first.code, second.code) == (143, 143)
    assert max(first.seconds, second.seconds) < 10
    assert first.line == (
        "megdet: stopped by SIGTERM: step 2 of 3 is saved, the same command goes on from there"
    )  # the epoch ends at step 3
    assert not lines_of_ours(second.errors)
    assert [path.name for path in checkpoints(RunFolder(tmp_path / "run"))] == ["step_00000002"]


@pytest.mark.slow
def test_a_notice_to_torchrun_stops_all_ranks_and_their_loading_processes_in_order(
    data: TinyData, tmp_path: Path
) -> None:
    words = [*train(data, tmp_path, "--workers", 1), "--schedule.epochs", "100", "--evaluation.every_epochs", "0"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1", "-m", "megdet", "--", *map(str, words)]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as process:
        assert process.stderr is not None
        errors = []
        for line in process.stderr:
            errors.append(line)
            if "step " in line and "/300" in line:
                process.send_signal(signal.SIGUSR1)
                break
        started = time.monotonic()
        errors += process.stderr.readlines()
        process.wait(60)
    assert time.monotonic() - started < 20, "torchrun itself takes some of them: " + "".join(errors)
    (line,) = lines_of_ours("".join(errors))
    assert re.search(r"stopped by SIGUSR1: step (\d+) of 300 is saved", line), line


def test_a_signal_outside_the_steps_ends_all_ranks_at_once(data: TinyData, tmp_path: Path) -> None:
    ends = run_ranks(train(data, tmp_path), 2, tmp_path, Sabotage("told_early", 1))
    assert [ended.code for ended in ends] == [143, 143]
    assert max(ended.seconds for ended in ends) < 10
    (line,) = lines_of_ours("".join(ended.errors for ended in ends))
    assert line.startswith("megdet (rank 1): stopped by SIGTERM; the same command goes on from the last checkpoint")
