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
