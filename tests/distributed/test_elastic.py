"""Two hosts, each with a torchrun and a rank: one is lost, the other goes on alone, and the run is as it was to be."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cli_runs import OVERRIDES, TinyData, make_data
from megdet.cli.main import main
from megdet.contract.chaos.comparison import compare
from megdet.run_folder.folder import RunFolder
from megdet.run_folder.metrics import read_metrics
from megdet.run_folder.sessions import read_environment
from two_hosts import Agent, Host, NoNamespacesError, start_torchrun, two_hosts, wait_for

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
ENDS_WITHIN = 300.0
"""Seconds from the loss of a host to the end of the other's ranks, with the --timeout of these runs of 30."""
STEPS = 60


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    try:
        with two_hosts() as made:
            yield made
    except NoNamespacesError as error:
        pytest.skip(f"no network namespaces could be made here: {error}")


def words(data: TinyData, run: Path) -> list[object]:
    small = ["--model.backbone.name", "test_resnet", "--precision", "float64", "--timeout", "0.5"]
    often = ["--schedule.epochs", STEPS // 3, "--checkpoint_steps", "2", "--evaluation.every_epochs", "0"]
    return ["train", "demo", "--run", run, *data.options, *OVERRIDES, *small, *often]


@pytest.fixture(scope="module")
def undisturbed(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert main([str(word) for word in words(data, folder)]) == 0
    return RunFolder(folder)


def last_step(folder: RunFolder) -> int:
    if not folder.metrics.exists():
        return 0
    return max((line["step"] for line in read_metrics(folder.metrics) if "loss" in line), default=0)


@pytest.mark.parametrize("how", ["cut off", "killed"])
def test_a_run_on_two_hosts_goes_on_with_the_one_that_is_left(
    data: TinyData, hosts: Any, undisturbed: RunFolder, tmp_path: Path, how: str
) -> None:
    folders = [RunFolder(tmp_path / name / "run") for name in ("left", "right")]
    agents = [
        start_torchrun(host, hosts[0], words(data, folder.path), tmp_path / f"{number}.log")
        for number, (host, folder) in enumerate(zip(hosts, folders, strict=True))
    ]
    try:
        goes_on(agents, folders, undisturbed, how)
    finally:
        for agent in agents:
            agent.kill_host()


def goes_on(agents: list[Agent], folders: list[RunFolder], undisturbed: RunFolder, how: str) -> None:
    end = time.monotonic() + 300
    while last_step(folders[0]) < 4:
        assert time.monotonic() < end, agents[0].log.read_text()
        time.sleep(0.05)
    assert not folders[1].path.exists(), "rank 0 writes, on its host"
    lost = time.monotonic()
    if how == "killed":
        agents[1].kill_host()
    else:
        agents[1].host.cut()
    while not agents[0].lines():
        assert time.monotonic() - lost < ENDS_WITHIN, agents[0].log.read_text()
        time.sleep(0.1)
    print(f"{how}: said after {time.monotonic() - lost:.1f} s: {agents[0].lines()}")
    wait_for(agents[0].process, 300)
    print(f"done after {time.monotonic() - lost:.1f} s")
    assert agents[0].process.returncode == 0, agents[0].log.read_text()
    (line,) = agents[0].lines()
    assert "rank 1" in line
    assert [session["world_size"] for session in read_environment(folders[0])] == [2, 1]
    _, faults = compare(undisturbed, folders[0], is_bitwise=False)
    assert not faults
    if how == "cut off":  # its torchrun has timeouts of its own
        while agents[1].ranks():
            assert time.monotonic() - lost < ENDS_WITHIN, agents[1].log.read_text()
            time.sleep(0.1)
        (line,) = agents[1].lines()
        assert "lost the connection to the other ranks" in line
