"""The web endpoint under load: requests a second and latency, with requests looked at together and one by one.

    python bench/serve.py runs/demo --images data/demo/val

Two servers of the same run stand on this machine, one with the recipe's `evaluation.batch_size`, one with 1. So many
clients each send image after image over one connection of their own; the servers are measured in turn.
"""

import argparse
import http.client
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from rich.console import Console
from rich.table import Table

KINDS = {"together": (), "one by one": ("--evaluation.batch_size", "1")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--images", type=Path, required=True, help="folder of JPEG files")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    contents = [file.read_bytes() for file in sorted(options.images.glob("*.jpg"))[:100]]
    rows: list[dict[str, object]] = []
    with (
        server(options.run, options.device, *KINDS["together"]) as first,
        server(options.run, options.device, *KINDS["one by one"]) as second,
    ):
        places = dict(zip(KINDS, (first, second), strict=True))
        for place in places.values():
            load(place, contents, 2, 2.0)  # warm
        for clients in options.clients:
            measured = {kind: list[Measured]() for kind in KINDS}
            for _ in range(options.rounds):
                for kind, place in places.items():
                    measured[kind].append(load(place, contents, clients, options.seconds))
            rows += [row(kind, clients, own) for kind, own in measured.items()]
    if options.json:
        print(json.dumps({"run": str(options.run), "seconds": options.seconds, "rows": rows}))
        return
    table = Table(
        "looked at", "clients", "requests a second", "median ms", "95% ms", "images a call", "connections lost"
    )
    for own in rows:
        low, high = own["spread"]
        rate = f"{own['rate']:.1f} ({low:.1f} to {high:.1f})"
        table.add_row(
            str(own["kind"]), str(own["clients"]), rate, *(f"{own[key]:.0f}" for key in ("median", "p95")),
            f"{own['together']:.1f}", str(own["lost"]),
        )  # fmt: skip
    Console(width=120).print(table)


class Measured:
    """What the clients of one measurement saw."""

    def __init__(self) -> None:
        self.latencies: list[float] = []
        self.together: list[int] = []
        self.lost = 0
        self.seconds = 0.0


def load(place: str, contents: list[bytes], clients: int, seconds: float) -> Measured:
    """So many clients for so many seconds; every answer must be a good one."""
    found, end, started = Measured(), time.perf_counter() + seconds, time.perf_counter()
    failures: list[BaseException] = []

    def client(number: int) -> None:
        try:
            connection = http.client.HTTPConnection(place, timeout=120)
            turn = number
            while time.perf_counter() < end:
                content, turn = contents[turn % len(contents)], turn + 1
                sent = time.perf_counter()
                try:
                    connection.request("POST", "/api/detect?score=0.5", content, {"Content-Type": "image/jpeg"})
                    answer = connection.getresponse()
                except ConnectionError:  # it had been idle for too long; the next request opens another one
                    connection.close()
                    found.lost += 1
                    continue
                body = json.loads(answer.read())
                if answer.status != 200:
                    raise RuntimeError(f"{answer.status}: {body}")
                found.latencies.append(time.perf_counter() - sent)
                found.together.append(body["images_together"])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    found.seconds = time.perf_counter() - started
    return found


def row(kind: str, clients: int, measured: list[Measured]) -> dict[str, object]:
    """The figures of all rounds."""
    rates = [len(own.latencies) / own.seconds for own in measured]
    latencies = sorted(1000 * latency for own in measured for latency in own.latencies)
    return {
        "kind": kind,
        "clients": clients,
        "rate": statistics.median(rates),
        "spread": [min(rates), max(rates)],
        "median": statistics.median(latencies),
        "p95": latencies[int(0.95 * (len(latencies) - 1))],
        "requests": len(latencies),
        "lost": sum(own.lost for own in measured),
        # every image of a call counts it, so a mean over images would count large calls more often
        "together": 1 / statistics.fmean(1 / number for own in measured for number in own.together),
    }


@contextmanager
def server(run: Path, device: str, *words: str) -> Iterator[str]:
    """`megdet serve` of a run on a free port; its host and port."""
    call = [sys.executable, "-m", "megdet", "serve", str(run), "--port", "0", "--device", device, *words]
    with subprocess.Popen(call, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline() if process.stdout else ""
            if " at http" not in line:
                raise SystemExit(f"the server did not start: {line}")
            yield urlsplit(line.split(" at ")[1].split()[0]).netloc
        finally:
            process.terminate()


if __name__ == "__main__":
    main()
