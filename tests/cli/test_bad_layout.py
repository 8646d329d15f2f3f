"""Layouts, ranks and timeouts that cannot be: one clear line each."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cli_runs import OVERRIDES, TinyData, make_data
from rank_runs import run_ranks

Refused = Callable[..., str]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("verb", [("describe",), ("train", "--run", "nowhere")])
def test_a_bn_size_that_does_not_divide_the_batch_size_is_refused_with_the_divisors(
    verb: tuple[str, ...], refused: Refused
) -> None:
    line = refused(verb[0], "megdet-r50-b256-bn32", *verb[1:], "--bn_size", 30)
    assert "bn_size is 30: it must divide batch_size 256: choose one of 1, 2, 4, 8, 16, 32" in line


def test_a_lane_width_that_does_not_divide_the_ranks_is_refused_with_those_that_do(
    data: TinyData, tmp_path: Path, refused: Refused
) -> None:
    line = refused("describe", "demo", "--devices", 6, "--lane-width", 4)
    assert "lane width 4 does not divide 6 devices: choose one of 1, 2, 3, 6" in line
    line = refused("train", "demo", "--run", tmp_path / "run", *data.options, *OVERRIDES, "--lane-width", 2)
    assert "lane width 2 does not divide 1 device: choose one of 1" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.distributed
def test_a_lane_width_that_does_not_divide_real_ranks_stops_all_of_them(data: TinyData, tmp_path: Path) -> None:
    words = ["train", "demo", "--run", tmp_path / "run", *data.options, *OVERRIDES, "--lane-width", 3]
    for ended in run_ranks(words, 2, tmp_path):
        assert ended.code == 2
        assert "lane width 3 does not divide 2 devices: choose one of 1, 2" in ended.line


@pytest.mark.distributed
def test_more_ranks_than_images_are_refused_by_all_of_them(data: TinyData, tmp_path: Path) -> None:
    words = ["train", "demo", "--run", tmp_path / "run", *data.options, *OVERRIDES, "--batch_size", 2, "--bn_size", 2]
    for ended in run_ranks(words, 3, tmp_path):
        assert ended.code == 2
        assert "3 devices for a mini-batch of 2 images: use at most 2 devices or a larger batch_size" in ended.line
    assert not (tmp_path / "run").exists()


def test_a_share_that_no_layout_makes_small_enough_is_refused_with_the_devices_it_takes(refused: Refused) -> None:
    words = ["describe", "megdet-r50-b256-bn32", "--devices", 4, "--max-images-per-device"]
    assert "it takes at least 16 devices in one lane, or a smaller bn_size" in refused(*words, 2)
    assert "at least 1" in refused(*words, 0)


def test_a_bn_size_of_one_image_has_a_layout(capsys: pytest.CaptureFixture[str]) -> None:
    from megdet.cli.main import main

    assert main(["describe", "demo", "--bn_size", "1", "--devices", "2"]) == 0
    assert "16 of 1 images" in capsys.readouterr().out


def test_a_bn_size_of_one_image_with_maps_of_one_pixel_is_refused_before_any_work(
    data: TinyData, tmp_path: Path, refused: Refused
) -> None:
    words = ["train", "demo", "--run", tmp_path / "run", *data.options, *OVERRIDES, "--batch_size", 2, "--bn_size", 1]
    line = refused(*words, "--data.short_edges", "[32]", "--data.max_long_edge", 32)
    assert "bn_size is 1 and " in line
    assert "canvas of 32 x 32 pixels" in line
    assert "no variance: raise bn_size or data.short_edges" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf", "soon", "1e-9"])
def test_a_timeout_that_is_no_time_is_refused(minutes: str, refused: Refused) -> None:
    line = refused("train", "demo", f"--timeout={minutes}")
    assert f"--timeout: '{minutes}' is not a number of minutes above 0" in line


@pytest.mark.parametrize(("device", "library"), [("cuda", "NCCL"), ("cpu", "gloo")])
def test_a_torch_without_the_library_that_ranks_talk_by_is_refused(
    device: str, library: str, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.distributed, f"is_{library.lower()}_available", lambda: False)
    line = refused("train", "demo", "--device", device)
    assert f"2 processes on {device} talk by {library}" in line
    assert "one process" in line


def test_ranks_that_were_not_told_where_to_meet_are_refused(monkeypatch: pytest.MonkeyPatch, refused: Refused) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    line = refused("train", "demo", "--device", "cpu")
    assert "cannot meet" in line
    assert "torchrun" in line


def test_a_rank_that_nobody_joins_gives_up_after_the_timeout(monkeypatch: pytest.MonkeyPatch, refused: Refused) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "0")):
        monkeypatch.setenv(name, value)
    line = refused("train", "demo", "--device", "cpu", "--timeout", "0.02")
    assert "the 2 processes of this run cannot meet" in line
