"""Tokens per second of TARS against the engines under it, in turns; see README.md."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import page
import picture

from models import WORDS, benchmark_model

_CELLS = "1x60x64 1x60x400 8x60x64 16x60x64 8x900sharedx32 4x1170x16"
_CELL = re.compile(r"([1-9]\d*)x([1-9]\d*)(shared)?x([1-9]\d*)")
_PEERS = ("llama", "server")
_BACKENDS = ("llamacpp", "xllamacpp")
_TARS = "tars"
_OWN_ENDING = 8
"""Tokens behind a shared beginning, each caller's own."""
_ALTERNATIONS = 5
_CELL_S = 600.0
"""What a cell may take; alternations that would take longer are left out."""
_SCRIPT = Path(__file__).parent / "contender.py"
_LEGEND = (
    "llama is Llama of llama-cpp-python, one request after another; server is the Server of xllamacpp. Tokens/s: answer"
    " tokens of all callers by wall time, prompts included; the median (lowest-highest) of the alternations. First"
    " token: the median caller's, from the moment at which all ask. Ratios are of tokens/s, the median of those of each"
    " alternation: above 1 the row is faster than the peer."
)


class Cell(NamedTuple):
    """So many callers at once, each with a prompt and an answer of so many tokens."""

    name: str
    callers: int
    prompt_tokens: int
    is_shared: bool
    answer_tokens: int

    @classmethod
    def parse(cls, name: str) -> Cell:
        """Read ``8x60x64``, or ``8x900sharedx32``."""
        match = _CELL.fullmatch(name)
        if match is None:
            raise argparse.ArgumentTypeError(f"{name} is not like 8x60x64 or 8x900sharedx32")
        callers, prompt, shared, answer = match.groups()
        return cls(name, int(callers), int(prompt), shared is not None, int(answer))

    def prompts(self, alternation: int) -> list[str]:
        """Return a prompt for each caller. None begins like one of an earlier alternation: no cache helps twice."""
        draw = random.Random(f"{self.name} {alternation}")  # noqa: S311 - the same for every contender
        shared = draw.choices(WORDS, k=self.prompt_tokens if self.is_shared else 0)
        return [" ".join(shared + draw.choices(WORDS, k=self.prompt_length - len(shared))) for _ in range(self.callers)]

    @property
    def prompt_length(self) -> int:
        """Tokens of one prompt in all."""
        return self.prompt_tokens + (_OWN_ENDING if self.is_shared else 0)

    @property
    def title(self) -> str:
        """A heading and a sentence."""
        shared = f" that all share, and {_OWN_ENDING} of each one's own" if self.is_shared else ""
        told = (
            f"{self.callers} at once, prompts of {self.prompt_tokens} tokens{shared}, answers of {self.answer_tokens}."
        )
        return f"## {self.name}\n\n{page.text(told)}"


class Entry(NamedTuple):
    """Who takes part: a peer, or a version of TARS with one of its backends."""

    name: str
    kind: str
    python: str
    version: str | None = None


class Run(NamedTuple):
    """One contender's figures in one alternation."""

    tokens_per_s: float
    first_s: float


class FailedError(Exception):
    """A contender did not start, or did not answer as it should."""


class Contender:
    """A running process of ``contender.py``, which has to be done at ``ends_at``."""

    def __init__(self, entry: Entry, cell: Cell, home: Path, ends_at: float) -> None:
        self._cell = cell
        self._ends_at = ends_at
        self._log = (home / f"{entry.name}.log").open("w+b")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TARS_")}
        self._process = subprocess.Popen(
            [entry.python, "-I", str(_SCRIPT), entry.kind, str(benchmark_model()), str(cell.callers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=home,
            env=environment | {"XDG_CONFIG_HOME": str(home)},
        )
        assert self._process.stdin is not None  # noqa: S101 - both are pipes
        assert self._process.stdout is not None  # noqa: S101
        self._orders, self._replies = self._process.stdin, self._process.stdout

    def warm_up(self) -> str:
        """Wait until it is loaded, let every caller ask a little, and return the versions."""
        loaded = self._reply()
        self._ask([" ".join(WORDS[:16])] * self._cell.callers, 8)
        return ", ".join(f"{package} {version}" for package, version in loaded.items())

    def measure(self, alternation: int) -> Run:
        """Return what one alternation brings. Raises ``FailedError``, also where tokens are fewer or more."""
        cell = self._cell
        got = self._ask(cell.prompts(alternation), cell.answer_tokens)
        for what, wanted in (("prompt_tokens", cell.prompt_length), ("answer_tokens", cell.answer_tokens)):
            if set(got[what]) != {wanted}:
                raise FailedError(f"{what} are {got[what]}, not {wanted} each")
        return Run(cell.callers * cell.answer_tokens / got["seconds"], statistics.median(got["first_s"]))

    def _ask(self, prompts: list[str], answer_tokens: int) -> dict[str, Any]:
        order = {"prompts": prompts, "answer_tokens": answer_tokens}
        with contextlib.suppress(BrokenPipeError):  # then there is no reply either
            self._orders.write(json.dumps(order).encode() + b"\n")
            self._orders.flush()
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        too_late = threading.Timer(self._ends_at - time.monotonic(), self._process.kill)
        too_late.start()
        line = self._replies.readline()
        too_late.cancel()
        if line:
            return dict(json.loads(line))
        if time.monotonic() >= self._ends_at:
            raise FailedError(f"the cell's {_CELL_S / 60:.0f} minutes were over")
        self._log.seek(0)
        last = self._log.read().decode(errors="replace").strip().rpartition("\n")[2]
        raise FailedError(f"ended with exit code {self._process.wait()}: {last or 'no reason given'}")

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):
            self._orders.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._replies.close()
        self._log.close()


class Measured(NamedTuple):
    """A cell's figures by contender, one for each alternation, and what went wrong."""

    cell: Cell
    runs: dict[str, list[Run]]
    failures: list[str]

    def ratio(self, entry: Entry, peer: str) -> float | None:
        """Return how much faster a version of TARS is than a peer, or than another version's same backend."""
        if entry.version in {None, peer}:
            return None
        other = peer if peer in _PEERS else f"{peer}-{entry.kind}"
        pairs = zip(self.runs.get(entry.name, ()), self.runs.get(other, ()), strict=False)
        ratios = [a.tokens_per_s / b.tokens_per_s for a, b in pairs]
        return statistics.median(ratios) if ratios else None


def measure(cell: Cell, entries: Sequence[Entry], alternations: int, versions: dict[str, str]) -> Measured:
    """Load every contender, warm it up, and let them take turns. Their ``versions`` are noted."""
    measured = Measured(cell, {entry.name: [] for entry in entries}, [])
    running: dict[str, Contender] = {}
    ends_at = time.monotonic() + _CELL_S
    longest_s = 0.0

    @contextlib.contextmanager
    def out_if_it_fails(name: str) -> Iterator[None]:
        try:
            yield
        except FailedError as error:
            measured.failures.append(f"{name}: {error}")
            del running[name]

    with tempfile.TemporaryDirectory(prefix="tars-bench-") as home, contextlib.ExitStack() as at_the_end:
        for entry in entries:
            running[entry.name] = Contender(entry, cell, Path(home), ends_at)
            at_the_end.callback(running[entry.name].close)
            with out_if_it_fails(entry.name):
                versions[entry.name] = running[entry.name].warm_up()
        for alternation in range(alternations):
            began = time.monotonic()
            if began + longest_s > ends_at:
                measured.failures.append(f"{alternations - alternation} alternations, for want of time")
                break
            for name, contender in list(running.items()):
                with out_if_it_fails(name):
                    run = contender.measure(alternation)
                    measured.runs[name].append(run)
                    told = f"{run.tokens_per_s:.1f} tokens/s, first after {run.first_s:.2f} s"
                    sys.stderr.write(f"{cell.name} {alternation + 1}/{alternations} {name}: {told}\n")
            longest_s = max(longest_s, time.monotonic() - began)
    return measured


def _section(measured: Measured, entries: Sequence[Entry], peers: Sequence[str]) -> str:
    """Return the cell's heading, its table, and what went wrong."""
    rows = []
    for entry in entries:
        if runs := measured.runs[entry.name]:
            speed = page.spread([run.tokens_per_s for run in runs])
            first = page.number(statistics.median(run.first_s for run in runs))
            ratios = [measured.ratio(entry, peer) for peer in peers]
            rows.append([entry.name, speed, f"{first} s", *("" if r is None else f"{r:.2f}" for r in ratios)])
    table = page.table(["", "tokens/s", "first token", *(f"/ {peer}" for peer in peers)], rows)
    return "\n\n".join([measured.cell.title, table, *(page.text(f"Missing: {why}") for why in measured.failures)])


def _write(name: str, results: Sequence[Measured], entries: Sequence[Entry], versions: dict[str, str]) -> str:
    others = [entry for entry in entries if entry.version not in {None, _TARS}]
    peers = [*_PEERS, *filter(None, dict.fromkeys(entry.version for entry in others))]
    ours = [entry for entry in entries if entry.version == _TARS]
    ratios = {
        measured.cell.name: {
            (entry.name, peer): ratio
            for entry in ours
            for peer in peers
            if (ratio := measured.ratio(entry, peer)) is not None
        }
        for measured in results
    }
    if any(ratios.values()):
        try:
            picture.draw(page.RESULTS / f"{name}.png", ratios)
        except ImportError as error:
            sys.stderr.write(f"no picture: {error}\n")
    sections = [_section(measured, entries, peers) for measured in results]
    told = [f"{entry.name}: {versions[entry.name]}" for entry in others if entry.name in versions]
    return page.write(name, page.text(_LEGEND), *sections, versions=told)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", nargs="+", type=Cell.parse, help=f"default: {_CELLS}; any other will do")
    parser.add_argument("--alternations", type=int, default=_ALTERNATIONS, help="default: %(default)s")
    parser.add_argument("--only", nargs="+", help="contenders: llama, server, tars-llamacpp, tars-xllamacpp, NAME-...")
    parser.add_argument("--also", nargs="+", default=[], metavar="NAME=PYTHON", help="other versions of TARS")
    return parser.parse_args()


def main() -> None:
    """Measure what was asked for; write the page after each cell, so an interrupted run leaves what it has."""
    arguments = _arguments()
    pythons = dict(pair.split("=", 1) for pair in [f"{_TARS}={sys.executable}", *arguments.also])
    entries = [Entry(peer, peer, sys.executable) for peer in _PEERS]
    entries += [Entry(f"{name}-{kind}", kind, python, name) for name, python in pythons.items() for kind in _BACKENDS]
    if arguments.only:
        if unknown := set(arguments.only) - {entry.name for entry in entries}:
            sys.exit(f"unknown contenders: {', '.join(sorted(unknown))}")
        entries = [entry for entry in entries if entry.name in arguments.only]
    name = "throughput-part" if arguments.cells or arguments.only else "throughput"
    results: list[Measured] = []
    versions: dict[str, str] = {}
    written = ""
    for cell in arguments.cells or map(Cell.parse, _CELLS.split()):
        results.append(measure(cell, entries, arguments.alternations, versions))
        written = _write(name, results, entries, versions)
    sys.stdout.write(written)


if __name__ == "__main__":
    main()
