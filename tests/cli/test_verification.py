"""`megdet verify` as a user calls it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megdet.cli import verification
from megdet.cli.main import main
from megdet.contract.trials import LeftOut
from megdet.contract.verify import Comparison, Verdict

pytestmark = pytest.mark.distributed


def test_a_fresh_process_proves_the_contract_and_prints_one_json_object(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megdet", "verify", "verify", "--devices", "1,2", "--steps", "1", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["pass"] is True
    assert 0 < found["largest_relative_difference"] < 1e-9
    assert [(row["case"], row["devices"], row["pass"]) for row in found["layouts"]] == [
        ("base", 1, True),
        ("base", 2, True),
    ]
    assert [row["compared_with"] for row in found["layouts"]] == ["nothing", "another layout"]
    assert found["compared_with_another_layout"] == 1
    assert {"case": "lane-2", "devices": [1, 2], "why": "not asked for"} in found["left_out"]
    assert {"lane_width", "rounds", "largest_relative_difference", "where"} <= set(found["layouts"][1])
    assert "base on 2 device(s)" in done.stderr


@pytest.mark.parametrize(("fault", "code"), [("", 0), ("weights.x differs by 1, allowed 1e-09", 1)])
def test_the_table_ends_with_the_verdict_and_the_exit_code_says_it(
    fault: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        Comparison("base", 1, None, 1, 4, 0.0, "", None, "", {}, "nothing"),
        Comparison("resume", 3, 8, 1, 2, 2e-13, "weights.x", None, fault, {}),
    ]
    left = [LeftOut(case, (2, 4), "to save time") for case in ("bn-2", "bn-8")] + [LeftOut("lars", (8,), "why not")]
    monkeypatch.setattr(verification, "verify", lambda *_, **__: Verdict(rows, 1e-9, left))
    if code:
        with pytest.raises(SystemExit) as ended:
            main(["verify", "--devices", "1,3"])
        assert ended.value.code == code
    else:
        assert main(["verify", "--devices", "1,3"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert any("8, then 3" in line for line in lines)
    assert lines[-1].startswith(
        "fail: 1 of 2 runs; case resume on 3 device(s): weights.x"
        if code
        else "pass: 1 runs compared with another layout; "
    )
    assert "left out, to save time: bn-2, bn-8 on 2, 4" in lines
    assert "left out, why not: lars on 8" in lines
    assert any("reference" in line for line in lines)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--devices", "1,x"], "'x' is not a whole number"),
        (["--devices", "0,1"], "'0,1' names no devices"),
        (["--cases", "basis"], "no case 'basis' (did you mean 'base'?)"),
        (["--devices", "1,3", "--lane-width", "2"], "lane width 2 does not divide 3 devices"),
        (["no-such-recipe"], "no recipe 'no-such-recipe'"),
    ],
)
def test_bad_words_are_refused_in_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["verify", *words]) == 2
    printed = capsys.readouterr()
    assert message.split(" (")[0] in printed.err
    assert len(printed.err.splitlines()) == 1
    assert printed.out == ""
    assert not list(tmp_path.iterdir())
