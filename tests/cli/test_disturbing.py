"""`megdet chaos` as a user calls it."""

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from megdet.cli import disturbing
from megdet.cli.main import main
from megdet.contract.chaos.findings import Disturbed, Findings, Finished


@pytest.mark.parametrize(("faults", "code"), [((), 0), (("model.w differs by 1, allowed 1e-09",), 1)])
def test_the_verdict_is_printed_and_the_exit_code_says_it(
    faults: tuple[str, ...], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {}

    def found(_recipe: object, **options: Any) -> Findings:
        asked.update(options)
        done = [Disturbed(pid, 1, 2, how, "rank", pid, "saving", 3) for pid, how in ((7, "SIGKILL"), (8, "pause"))]
        return Findings(False, 5, disturbed=done, finished=[Finished(1, 2, 2e-13, faults)], folder=Path("/there"))

    monkeypatch.setattr(disturbing, "chaos", found)
    words = ["chaos", "verify", "--kills", "2", "--devices", "1,2", "--seed", "5", "--device", "cpu", "--workers", "3"]
    words += ["--evaluate-in-background", "--timeout", "2"]
    for extra in ([], ["--json"]):
        if code:
            with pytest.raises(SystemExit) as ended:
                main([*words, *extra])
            assert ended.value.code == code
        else:
            assert main([*words, *extra]) == 0
    counts, sentence, as_json = capsys.readouterr().out.strip().splitlines()
    assert counts == "1 SIGKILL, 1 pause, 2 rank, 2 saving"
    assert sentence.startswith("fail: run 1: model.w differs by 1" if code else "pass: 2 disturbances in 1 run(s)")
    assert json.loads(as_json)["pass"] is not bool(code)
    assert json.loads(as_json)["disturbed"][0]["signal"] == "SIGKILL"
    assert (asked["kills"], asked["devices"], asked["seed"], asked["timeout"]) == (2, (1, 2), 5, timedelta(minutes=2))
    assert asked["options"] == ["--device", "cpu", "--workers", "3", "--evaluate-in-background"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["verify", "--kills", "0"], "'0' is not at least 1"),
        (["verify", "--devices", "0"], "'0' names no devices"),
        (["verify", "--devices", "17"], "17 devices for a mini-batch of 16 images"),
        (["no-such-recipe"], "no recipe 'no-such-recipe'"),
    ],
)
def test_bad_words_are_refused_in_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["chaos", *words]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert len(printed.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())
