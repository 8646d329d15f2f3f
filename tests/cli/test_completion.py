"""The completion of shells, asked as a shell asks it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megdet.cli.completing import bash_script, fish_script, zsh_script
from megdet.cli.main import VERBS, main
from megdet.cli.parsers.converting import SOURCES
from megdet.recipe_file import packaged_recipes

BASH, FISH, ZSH = (shutil.which(shell) for shell in ("bash", "fish", "zsh"))
_ASK = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 ))
_megdet
printf '%s\\n' "${COMPREPLY[@]}"
"""
_TYPE = """
zmodload zsh/zpty
zpty -b shell zsh -f -i
zpty -w shell "PS1='ready''now '; autoload -Uz compinit; compinit -u -D; source megdet.zsh"
zpty -r shell seen '*readynow *'
while (( $# )); do
  zpty -w -n shell $'\\C-u'"$1"$'\\t'
  zpty -r -m shell seen "*$1$2*" && print -r -- "completed to $1$2"
  shift 2
done
zpty -d shell
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
    assert completed(script, "data", "convert", "--from", "") == set(SOURCES)
    assert completed(script, "data", "check", "--ma") == {"--masks", "--max-pixels"}
    assert completed(script, "watch", "--o") == {"--once"}
    assert completed(script, "recipes", "--optimizer") == set()  # a verb without keys of a recipe
    (tmp_path / "photo.jpg").touch()
    assert completed(script, "detect", "runs/demo", "pho", cwd=tmp_path) == {"photo.jpg"}


@pytest.mark.skipif(FISH is None, reason="fish is not installed; CI installs it")
def test_fish_completes_them_too(tmp_path: Path) -> None:
    (tmp_path / "megdet.fish").write_text(fish_script())
    (tmp_path / "course.jpg").touch()
    lines = ("megdet wa", "megdet data c", "megdet train demo --optimizer.base", "megdet detect runs/demo cou")
    ask = "source megdet.fish; for line in $argv; complete -C $line; echo end; end"
    command = [str(FISH), "--no-config", "-c", ask, *lines]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, cwd=tmp_path)
    assert done.stderr == ""
    offered = [{line.split("\t")[0] for line in part.splitlines() if line} for part in done.stdout.split("end\n")]
    assert offered[0] == {"watch"}
    assert offered[1] >= {"check", "convert"}
    assert "course.jpg" not in offered[1]
    assert offered[2] == {"--optimizer.base_lr"}
    assert offered[3] == {"course.jpg"}


@pytest.mark.skipif(ZSH is None, reason="zsh is not installed; CI installs it")
def test_zsh_completes_them_too_in_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "megdet.zsh").write_text(zsh_script())
    command = [str(ZSH), "-f", "-c", _TYPE, "zsh", "megdet wa", "tch", "megdet train demo --optimizer.base", "_lr"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, cwd=tmp_path)
    assert done.stdout.splitlines() == [
        "completed to megdet watch",
        "completed to megdet train demo --optimizer.base_lr",
    ]


def test_the_command_prints_the_script_and_loads_no_library_that_computes(script: Path) -> None:
    code = (
        "import sys; from megdet.cli.main import main; main(['completion', 'bash']); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == script.read_text()


def test_an_unknown_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "tcsh"]) == 2
    assert "tcsh" in capsys.readouterr().err
