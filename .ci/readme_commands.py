"""Runs every command of the README's shell blocks, in order, in the repository; stops at the first that fails.

`make test` is left out, since CI has just run it. A block marked `<!-- not in CI: reason -->` needs what CI has not.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(?P<mark><!-- not in CI: [^>]+ -->\n)?```sh\n(?P<text>.*?)```", re.DOTALL)


def commands(text: str) -> list[str]:
    """The commands of all shell blocks that CI can run, continued lines joined."""
    found = []
    for block in BLOCK.finditer(text):
        if block["mark"]:
            continue
        lines = block["text"].replace("\\\n", " ").splitlines()
        found += [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]
    return [command for command in found if command != "make test"]


def main() -> int:
    """Run them; returns the exit code of the first failure."""
    environment = {**os.environ, "PATH": f"{ROOT / '.venv/bin'}:{os.environ['PATH']}"}
    for command in commands((ROOT / "README.md").read_text(encoding="utf-8")):
        print(f"$ {command}", flush=True)
        started = time.monotonic()
        code = subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment, check=False).returncode
        print(f"  exit code {code} after {time.monotonic() - started:.0f} s", flush=True)
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
