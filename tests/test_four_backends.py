"""All four backends on the same weights: each fails first once, and another one answers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tars_demo_model
from tars_core import InferenceEngine
from tars_core.worker.host import Worker
from tars_core.worker.protocol import WorkerFrame

sys.path.insert(0, str(Path(__file__).parents[1] / "plugins" / "tars-ollama" / "tests"))  # for the stand-in

from ollama_live import NAME, live_daemon

FOUR = ("llamacpp", "xllamacpp", "ollama", "transformers")
ANSWER = "Me llamo TARS. Soy un modelo de demostración."


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with live_daemon(tmp_path_factory.mktemp("ollama")) as daemon:
        yield daemon.address


def _engine(address: str, first: str) -> InferenceEngine:
    weights = tars_demo_model.WEIGHTS
    return InferenceEngine(
        model="all",
        models={"all": (str(weights / "tars-demo.gguf"), f"ollama:{NAME}", str(weights))},
        prefer=(first, *(name for name in FOUR if name != first)),
        backends={"ollama": {"host": address}},
        plugins=",".join(FOUR),
        threads=1,
    )


@pytest.mark.parametrize("first", FOUR)
def test_whichever_fails_first_the_next_one_answers_with_the_same_text(
    address: str, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Worker._on_frame

    def kill_the_first(worker: Worker, frame: WorkerFrame) -> None:
        """Kill its process with the first that it says; observers may be told too late for that."""
        if worker.plugin == first and worker.pid is not None:
            os.kill(worker.pid, signal.SIGKILL)
        else:
            real(worker, frame)

    monkeypatch.setattr(Worker, "_on_frame", kill_the_first)
    with _engine(address, first) as engine:
        completion = engine.complete("¿Cuál es tu nombre?", temperature=0)
    assert completion.text == ANSWER
    assert completion.attempts[0].backend == first
    assert completion.attempts[0].failure is not None
    assert completion.attempts[0].failure.kind == "WorkerDied"
    assert completion.backend != first


@pytest.mark.parametrize("first", FOUR)
def test_each_answers_when_it_is_asked_first(address: str, first: str) -> None:
    with _engine(address, first) as engine:
        completion = engine.complete("¿Cuál es tu nombre?", temperature=0)
    assert (completion.backend, completion.text, completion.degraded) == (first, ANSWER, False)


def test_backends_shows_all_four_with_what_differs(address: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tars_core.cli", "backends"],
        env={**os.environ, "OLLAMA_HOST": address, "COLUMNS": "80"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    states = dict(line.split()[:2] for line in done.stdout.splitlines() if not line.startswith(" "))
    assert {name: states[name] for name in FOUR} == dict.fromkeys(FOUR, "available")
    assert "differs: answers one request at a time" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
