"""Asks for every outside page that the README and the pages link to; prints the ones that do not answer well.

Run by `make links`, not by CI: other people's servers are not ours to test. Links between our pages are in the tests.
"""

import re
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\]\((https?://[^)\s]+)\)")


def outside_links() -> dict[str, list[str]]:
    """Every address, with the pages that link to it."""
    found: dict[str, list[str]] = {}
    for page in [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]:
        for address in LINK.findall(page.read_text(encoding="utf-8")):
            found.setdefault(address, []).append(page.name)
    return found


def fault_of(address: str) -> str:
    """What is wrong with an address; empty if it answers."""
    request = urllib.request.Request(address, method="HEAD", headers={"User-Agent": "link check"})
    try:
        with urllib.request.urlopen(request, timeout=20):
            return ""
    except (urllib.error.URLError, TimeoutError) as error:
        return str(error)


def main() -> int:
    """Ask for all of them; returns how many do not answer."""
    links = outside_links()
    with ThreadPoolExecutor(8) as pool:
        faults = dict(zip(links, pool.map(fault_of, links), strict=True))
    for address, fault in faults.items():
        if fault:
            print(f"{address} ({', '.join(sorted(set(links[address])))}): {fault}")
    print(f"{len(links)} links, {sum(map(bool, faults.values()))} do not answer")
    return min(1, sum(map(bool, faults.values())))


if __name__ == "__main__":
    sys.exit(main())
