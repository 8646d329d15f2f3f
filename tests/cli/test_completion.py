"""The completion of shells, asked as a shell asks it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megdet.cli.completing import bash_script, fish_script, zsh_script
from megdet.cli.main import VERBS, main
from megdet.recipe_file import packaged_recipes

BASH = shutil.which("bash")
_ASK = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 ))
_megdet
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("completion") / "megdet.bash"
    file.write_text(bash_script())
    return file


def completed(script: Path, *words: str, cwd: Path | None = None) -> set[str]:
    """What bash offers for the last of these words."""
    assert BASH is not None
    command = [BASH, "--norc", "-c", _ASK, "bash", str(script), "megdet", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, cwd=cwd)
    assert done.stderr == ""
    return {line for line in done.stdout.splitlines() if line}


@pytest.mark.skipif(BASH is None, reason="bash is not installed")
def test_bash_completes_verbs_options_values_recipes_keys_and_files(script: Path, tmp_path: Path) -> None:
    assert completed(script, "") == {*VERBS, "--help", "--version"}
    assert completed(script, "wa") == {"watch"}
    assert completed(script, "train", "megdet-r50-m") == {"megdet-r50-modern"}
    assert completed(script, "train", "megdet-r50-b") == {n for n in packaged_recipes() if n.startswith("megdet-r50-b")}
    assert completed(script, "train", "demo", "--optimizer.base") == {"--optimizer.base_lr"}
    assert completed(script, "train", "demo", "--precision", "b") == {"bfloat16"}
    assert completed(script, "train", "demo", "--keep_best", "") == {"true", "false"}
    assert completed(script, "plan", "demo", "--device", "") == {"cpu", "cuda"}
    assert completed(script, "data", "c") == {"check", "convert"}
    assert completed(script, "data", "convert", "--from", "") == {"voc", "yolo"}
    assert completed(script, "data", "check", "--ma") == {"--masks", "--max-pixels"}
    assert completed(script, "watch", "--o") == {"--once"}
    assert completed(script, "recipes", "--optimizer") == set()  # a verb without keys of a recipe
    (tmp_path / "photo.jpg").touch()
    assert completed(script, "detect", "runs/demo", "pho", cwd=tmp_path) == {"photo.jpg"}


@pytest.mark.parametrize(("shell", "write"), [("zsh", zsh_script), ("fish", fish_script)])
def test_the_other_shells_take_their_scripts_where_they_are_installed(shell, write, tmp_path: Path) -> None:
    script = write()
    assert all(verb in script for verb in VERBS)
    assert "--optimizer.base_lr" in script or "-l optimizer.base_lr" in script
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "script").write_text(script)
    subprocess.run([shell, "-n", str(tmp_path / "script")], check=True, timeout=60)


def test_the_command_prints_the_script_and_loads_no_library_that_computes(script: Path) -> None:
    code = (
        "import sys; from megdet.cli.main import main; main(['completion', 'bash']); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == script.read_text()


def test_an_unknown_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "tcsh"]) == 2
    assert "tcsh" in capsys.readouterr().err
