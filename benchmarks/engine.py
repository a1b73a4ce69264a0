"""What the engine itself costs, with a scripted backend that computes nothing; see README.md."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import page

from tars_core import InferenceEngine, TextDelta
from tars_core.testing.fake import BackendScript, Finish, Say, Script, Wait
from tars_core.types.observed import LoadEnded, Observed

_BACKEND = "alpha"
_CALLERS = 32
_DECISION_S = 1.0
_IMPATIENT, _PATIENCE_S = 12, 0.05
_LEGEND = (
    f"The backend is scripted and answers at once. First text: the median (lowest-highest) of requests one after the"
    f" other, the worker running. Impatient callers, one after the other, wait {_PATIENCE_S * 1000:g} ms for a decision"
    f" that takes {_DECISION_S:g} s; the next has patience, and its wait includes the start of a worker."
)


@contextlib.contextmanager
def _machine_of_its_own() -> Iterator[Path]:
    """Yield an empty folder that is this process's home; the scripted backend is registered as if installed."""
    with tempfile.TemporaryDirectory(prefix="tars-bench-") as folder:
        home = Path(folder)
        info = home / "site" / f"tars_{_BACKEND}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tars-{_BACKEND}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[tars.plugins.v1]\n{_BACKEND} = tars_core.testing.fake:{_BACKEND}\n")
        for name in [name for name in os.environ if name.startswith("TARS_")]:
            del os.environ[name]
        os.environ |= {"XDG_CONFIG_HOME": folder, "XDG_CACHE_HOME": folder}
        sys.path.insert(0, str(home / "site"))
        yield home


def _engine(home: Path, script: BackendScript, *, models: int = 1, concurrency: int = 4) -> InferenceEngine:
    """Return an engine with one backend and so many models, ``fake:HOME/0.json`` and so on."""
    for number in range(models):
        (home / f"{number}.json").write_bytes(msgspec.json.encode(Script(backends={_BACKEND: script})))
    return InferenceEngine(model=_model(home, 0), plugins=_BACKEND, concurrency=concurrency)


def _model(home: Path, number: int) -> str:
    return f"fake:{home / str(number)}.json"


def _first_text_ms(engine: InferenceEngine) -> float:
    began = time.perf_counter()
    with engine.stream("hi") as stream:
        next(event for event in stream if isinstance(event, TextDelta))
        return (time.perf_counter() - began) * 1000


def _overhead(home: Path, requests: int) -> list[str]:
    with _engine(home, BackendScript()) as engine:
        engine.generate("hi")
        took = [_first_text_ms(engine) for _ in range(requests)]
    return ["first text through a worker, ms", page.spread(took), ""]


def _events_per_s(home: Path, events: int) -> list[list[str]]:
    script = BackendScript(batched=True, concurrency=_CALLERS, generate=(*[Say("word ")] * events, Finish()))

    def read(engine: InferenceEngine) -> int:
        return sum(isinstance(event, TextDelta) for event in engine.stream("hi"))

    with _engine(home, script, concurrency=_CALLERS) as engine, ThreadPoolExecutor(_CALLERS) as callers:
        engine.generate("hi")
        began = time.perf_counter()
        arrived = sum(callers.map(read, [engine] * _CALLERS))
        took = time.perf_counter() - began
    sent = events * _CALLERS
    return [
        [f"events/s to {_CALLERS} callers", f"{sent / took:,.0f}", ""],
        ["of these joined to one before, for a slower reader", f"{(sent - arrived) / sent:.0%}", ""],
    ]


def _loads(home: Path, turns: int) -> list[str]:
    loads: list[LoadEnded] = []

    def observe(event: Observed) -> None:
        if isinstance(event, LoadEnded):
            loads.append(event)

    with _engine(home, BackendScript(), models=2) as engine:
        engine.observe(observe)
        for turn in range(turns):
            engine.generate("hi", model=_model(home, turn % 2))
    return [f"loads, two models in turn {turns} times", str(len(loads)), "2"]


def _impatience(home: Path) -> list[list[str]]:
    """Let callers give up while it is decided what to try. A decision has a thread named after it."""
    most = 0
    over = threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.wait(0.005):
            most = max(most, sum(thread.name.startswith("tars-decide") for thread in threading.enumerate()))

    async def ask(engine: InferenceEngine) -> float:
        for _ in range(_IMPATIENT):
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(engine.agenerate("hi"), _PATIENCE_S)
        began = time.perf_counter()
        await engine.agenerate("hi")
        return time.perf_counter() - began

    with _engine(home, BackendScript(probe=(Wait(_DECISION_S, deaf=True),))) as engine:
        engine.backends()
        watcher = threading.Thread(target=watch)
        watcher.start()
        waited = asyncio.run(ask(engine))
        over.set()
        watcher.join()
    return [
        [f"decisions at a time for {_IMPATIENT} impatient callers", str(most), "1"],
        ["wait of the next caller, s", page.number(waited), ""],
    ]


def main() -> None:
    """Measure, write the page and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=200, help="for the time to the first text: %(default)s")
    parser.add_argument("--events", type=int, default=2000, help="for each caller: %(default)s")
    parser.add_argument("--turns", type=int, default=100, help="of two models: %(default)s")
    arguments = parser.parse_args()
    with _machine_of_its_own() as home:
        rows = [_overhead(home, arguments.requests)]
        rows += _events_per_s(home, arguments.events)
        rows += [_loads(home, arguments.turns)]
        rows += _impatience(home)
    sys.stdout.write(page.write("engine", page.text(_LEGEND), page.table(["", "measured", "aim"], rows)))


if __name__ == "__main__":
    main()
