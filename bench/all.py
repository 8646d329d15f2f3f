"""Runs the benchmarks with their settings of record, one after another, and writes docs/benchmarks.json and .md.

    python bench/all.py                      # all; `make bench`
    python bench/all.py --only data,memory   # these again, the others keep their last results
    python bench/all.py --missing            # what has no result or has failed: goes on after an interruption
    python bench/all.py --merge other.json   # takes over what another machine has measured (--results other.json there)
    python bench/all.py --page               # the page again from the results; `make bench-page`

Results are {"results": {name: entry}}, the names those of `page.py`. An entry has

    date        ISO 8601 with seconds, UTC, of the start
    command     as a shell reads it, in the root of the repository
    machine     {"cpu": {"model", "cores", "memory_bytes"}, "devices": [{"name", "memory_bytes"}], "native_bf16"}
    versions    python, torch, torchvision, timm, megdet
    git         {"commit", "dirty"}, null outside of a repository
    result      the object that the benchmark prints with --json; or, where it failed,
    error       the last line that it wrote, and its exit code

The results are replaced as a whole after every benchmark, the page at the end. Where one fails the others go on, and
the exit code is 1.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from page import COMMANDS, GPU, write_page

from megdet.errors import InputError
from megdet.files import read_json, write_json_atomically, write_text_atomically
from megdet.run_folder.environment import collect_environment

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="NAME,NAME", help=f"of {', '.join(COMMANDS)}; memory is every memory/...")
    parser.add_argument("--missing", action="store_true", help="only what has no result or has failed")
    parser.add_argument("--merge", type=Path, metavar="FILE", help="take over the entries of another file of results")
    parser.add_argument("--page", action="store_true", help="run nothing, write the page again")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "docs/benchmarks.json", help="the page is beside it, .md"
    )
    options = parser.parse_args(argv)
    try:
        if options.page or options.merge:
            record(options.results, read_results(options.merge) if options.merge else {})
            publish(options.results)
            return 0
        names = chosen(options.only)
        if options.missing:
            done = read_results(options.results) if options.results.exists() else {}
            names = [name for name in names if "result" not in done.get(name, {})]
        try:
            return run_all(names, options.results)
        finally:
            publish(options.results)
    except InputError as error:
        print(f"bench/all.py: {error}", file=sys.stderr)
        return 2


def chosen(only: str | None) -> list[str]:
    """The names that are meant, in the order of the page."""
    wanted = only.split(",") if only else list(COMMANDS)
    for word in wanted:
        if not any(_means(word, name) for name in COMMANDS):
            raise InputError(f"there is no benchmark {word!r}; there are {', '.join(COMMANDS)}")
    return [name for name in COMMANDS if any(_means(word, name) for word in wanted)]


def _means(word: str, name: str) -> bool:
    return word in (name, name.partition("/")[0])


def run_all(names: Sequence[str], results: Path) -> int:
    """Run these and record each when it is finished; 1 where one has failed."""
    failed = False
    for name in names:
        if name == GPU and not torch.cuda.is_available():
            print(f"{name}: left out, there is no GPU", flush=True)
            continue
        print(f"{name}: {COMMANDS[name]}", flush=True)
        started = time.monotonic()
        entry = run(COMMANDS[name])
        record(results, {name: entry})
        outcome = f"FAILED: {entry['error']}" if "error" in entry else "done"
        print(f"{name}: {outcome}, {time.monotonic() - started:.0f} s", flush=True)
        failed |= "error" in entry
    return int(failed)


def run(command: str) -> dict[str, Any]:
    """One benchmark in a process of its own; its entry."""
    words = [*shlex.split(command), "--json"]
    place = collect_environment(1, "cuda" if torch.cuda.is_available() else "cpu")
    versions = place["versions"]
    entry = {
        "date": place["started_utc"],
        "command": shlex.join(["python", f"bench/{words[0]}", *words[1:]]),
        "machine": {
            "cpu": place["cpu"],
            "devices": place["devices"],
            "native_bf16": torch.cpu._is_avx512_bf16_supported(),
        },
        "versions": {name: versions[name] for name in ("python", "torch", "torchvision", "timm", "megdet")},
        "git": place["git"],
    }
    done = subprocess.run(
        [sys.executable, str(BENCH / words[0]), *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "it said nothing")
        return {**entry, "error": f"{last.strip()} (exit code {done.returncode})"}
    try:
        result = json.loads(done.stdout, parse_constant=_refuse)
    except ValueError as error:
        return {**entry, "error": f"it did not print one JSON object: {error}"}
    return {**entry, "result": result} if isinstance(result, dict) else {**entry, "error": "it printed no JSON object"}


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")


def read_results(path: Path) -> dict[str, Any]:
    """The entries of a file. Raises InputError."""
    content = read_json(path)
    results = content.get("results") if isinstance(content, dict) else None
    if not isinstance(results, dict):
        raise InputError(f"{path} has no object 'results'; it is no file of bench/all.py")
    return results


def record(path: Path, entries: dict[str, Any]) -> None:
    """Put entries in the place of older ones of their names; the file is read anew each time."""
    merged = {**(read_results(path) if path.exists() else {}), **entries}
    results = {name: merged[name] for name in COMMANDS if name in merged}  # what is no longer measured goes
    write_json_atomically(path, {"results": results}, indent=2)


def publish(path: Path) -> None:
    """Write the page of a file of results."""
    write_text_atomically(path.with_suffix(".md"), write_page(read_results(path) if path.exists() else {}))


if __name__ == "__main__":
    sys.exit(main())
