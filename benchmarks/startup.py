"""How long the command and the import take, against the bare interpreter, in turns; see README.md."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import page

_RUNS = 21
_TARS = str(Path(sys.executable).with_name("tars"))
_BARE = "python -c pass"
_IMPORT = "import tars_core"
_VERSION = "tars --version"
_COMMANDS = {
    _BARE: [sys.executable, "-c", "pass"],
    _IMPORT: [sys.executable, "-c", "import tars_core"],
    "import InferenceEngine": [sys.executable, "-c", "from tars_core import InferenceEngine"],
    _VERSION: [_TARS, "--version"],
    "tars backends": [_TARS, "backends"],
}
_MOST_IMPORT_MS = 30.0
_MOST_VERSION = 2.0


def _measure(runs: int) -> dict[str, list[float]]:
    """Return milliseconds by command. Once before that counts, for all that is found out and kept at the first time."""
    took: dict[str, list[float]] = {name: [] for name in _COMMANDS}
    with tempfile.TemporaryDirectory(prefix="tars-bench-") as home:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TARS_")}
        environment |= {"XDG_CONFIG_HOME": home, "XDG_CACHE_HOME": home}
        for run in range(1 + runs):
            for name, command in _COMMANDS.items():
                began = time.perf_counter()
                subprocess.run(command, check=True, cwd=home, env=environment, stdout=subprocess.DEVNULL)
                if run:
                    took[name].append((time.perf_counter() - began) * 1000)
    return took


def main() -> None:
    """Measure, write the page and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=_RUNS, help="default: %(default)s")
    took = _measure(parser.parse_args().runs)
    bare = statistics.median(took[_BARE])

    rows = []
    for name, values in took.items():
        over, ratio = statistics.median(values) - bare, statistics.median(values) / bare
        aims = {_IMPORT: over <= _MOST_IMPORT_MS, _VERSION: ratio <= _MOST_VERSION}
        aim = "" if name not in aims else "met" if aims[name] else "missed"
        rows.append([name, page.spread(values), f"{over:.1f}", f"{ratio:.2f}", aim])
    head = ["", "ms", "over bare, ms", "x bare", "aim"]
    told = page.text(
        f"Median (lowest-highest) of {len(took[_BARE])} runs in turns, files in the cache. The aims: {_IMPORT} at most"
        f" {_MOST_IMPORT_MS:g} ms over the bare interpreter, {_VERSION} at most {_MOST_VERSION:g} times it."
    )
    sys.stdout.write(page.write("startup", told, page.table(head, rows)))


if __name__ == "__main__":
    main()
