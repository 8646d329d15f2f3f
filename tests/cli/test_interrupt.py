"""An interrupt from the keyboard is one line, whatever the program is doing."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("module", ["rich.console", "torch.nn.functional", "torchvision.ops"])
def test_an_interrupt_while_the_program_loads_is_one_line(module: str, tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "megdet", "train", "demo", "--run", str(tmp_path / "run")]
    lines = []
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        # a shell's job in the background ignores interrupts, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:  # one comes when a module is loaded
            lines.append(line)
            if line.split("|")[-1].strip() == module:
                process.send_signal(signal.SIGINT)
                break
        lines += process.stderr.readlines()
        assert process.wait(60) == 130
    said = [line for line in lines if not line.startswith("import time:")]
    assert said == ["megdet: interrupted; the same command goes on from the last checkpoint, if there is one\n"]
    assert not (tmp_path / "run").exists()


def test_an_interrupt_of_the_exec_of_a_string_ends_with_the_exit_code_and_not_by_a_signal(tmp_path: Path) -> None:
    (tmp_path / "interrupted.py").write_text(
        "import sys\n"
        "from megdet.cli import main\n"
        "main._run = lambda words: exec('raise KeyboardInterrupt')\n"
        "sys.exit(main.main(['train', 'demo']))\n"
    )
    ended = subprocess.run([sys.executable, "-m", "interrupted"], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 130
    assert ended.stderr == "megdet: interrupted; the same command goes on from the last checkpoint, if there is one\n"
