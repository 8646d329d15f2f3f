"""Runs the commands of the shell blocks of README and pages, in order, in the repository; stops at the first failure.

`make test` is left out: CI has just run it. A block marked `<!-- not in CI: reason -->`
needs what CI has not, and a command that another page has run is not run again.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(?P<mark><!-- not in CI: [^>]+ -->\n)?```sh\n(?P<text>.*?)```", re.DOTALL)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(text: str) -> Iterator[tuple[str, bool]]:
    """Every command of the shell blocks, continued lines joined, and whether its block is run."""
    for block in BLOCK.finditer(text):
        for line in block["text"].replace("\\\n", " ").splitlines():
            command = " ".join(re.split(r"\s+# ", line)[0].split())
            if command and not line.startswith("#"):
                yield command, not block["mark"]


def commands_to_run() -> list[str]:
    """Those of all pages, each once."""
    wanted = [own for page in PAGES for own, is_run in commands(page.read_text(encoding="utf-8")) if is_run]
    return [own for own in dict.fromkeys(wanted) if own != "make test"]


def main() -> int:
    """Run them; returns the exit code of the first failure."""
    environment = {**os.environ, "PATH": f"{ROOT / '.venv/bin'}:{os.environ['PATH']}"}
    for command in commands_to_run():
        print(f"$ {command}", flush=True)
        started = time.monotonic()
        code = subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment, check=False).returncode
        print(f"  exit code {code} after {time.monotonic() - started:.0f} s", flush=True)
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
