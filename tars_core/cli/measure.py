"""``tars benchmark``: each backend that can run the model, cold and warm."""

from __future__ import annotations

import dataclasses
import sys
import time

import click

from tars_core.cli import output
from tars_core.cli.plain import dump
from tars_core.config.settings import Settings, cache_folder
from tars_core.engine import InferenceEngine
from tars_core.planning import speeds
from tars_core.types.errors import TarsError
from tars_core.types.models import ModelRef
from tars_core.types.public import Public
from tars_core.types.results import Completion

_PROMPT = "¿Cuál es tu nombre?"
_TOKENS = 32
_RUNS = 3


class Measured(Public, frozen=True, kw_only=True):
    """One backend's figures; of several warm runs, the median."""

    backend: str
    model: ModelRef | None = None
    device: str | None = None
    load_s: float | None = None
    first_token_s: float | None = None
    tokens_per_s: float | None = None
    total_s: float | None = None
    error: str | None = None


def benchmark(settings: Settings, *, as_json: bool) -> bool:
    """Measure, print a table or JSON, and keep the speeds for ranking; say whether any backend answered."""
    with InferenceEngine(settings) as engine:
        decision = engine.plan()
    names = list(dict.fromkeys(candidate.backend for candidate in decision.candidates))
    with click.progressbar(names, label="measuring", file=sys.stderr, hidden=not sys.stderr.isatty()) as bar:
        measured = [_measure(settings, name) for name in bar]
    known = {(m.backend, m.model): m.tokens_per_s for m in measured if m.model is not None}
    speeds.keep(cache_folder(), {key: speed for key, speed in known.items() if speed is not None})
    if as_json:
        output.write(dump({"model": decision.model, "tokens": _TOKENS, "backends": measured}))
    else:
        _table(decision.model, measured)
    return any(m.error is None for m in measured)


def _measure(settings: Settings, backend: str) -> Measured:
    only = dataclasses.replace(settings, backend=backend)
    with InferenceEngine(only) as engine:
        try:
            cold = _ask(engine)[0]
            warm = sorted((_ask(engine) for _ in range(_RUNS)), key=lambda run: run[1])[_RUNS // 2]
        except TarsError as error:
            return Measured(backend=backend, error=error.message)
    completion, total_s = warm
    return Measured(
        backend=backend,
        model=completion.model,
        device=completion.device,
        load_s=cold.timings.load_s,
        first_token_s=completion.timings.ttft_s,
        tokens_per_s=completion.timings.decode_tokens_per_s,
        total_s=total_s,
    )


def _ask(engine: InferenceEngine) -> tuple[Completion, float]:
    began = time.perf_counter()
    return engine.complete(_PROMPT, temperature=0, max_tokens=_TOKENS), time.perf_counter() - began


def _table(model: str, measured: list[Measured]) -> None:
    output.write(f"{model}, at most {_TOKENS} tokens, median of {_RUNS} warm runs\n")
    width = max(len(m.backend) for m in measured)
    output.write(f"{'':{width}}  {'device':8}  {'load':>8}  {'first token':>11}  {'tokens/s':>8}\n")
    for m in measured:
        if m.error is not None:
            output.write(f"{m.backend:{width}}  failed: {m.error}\n")
            continue
        speed = "-" if m.tokens_per_s is None else f"{m.tokens_per_s:.0f}"
        figures = f"{_seconds(m.load_s):>8}  {_seconds(m.first_token_s):>11}  {speed:>8}"
        output.write(f"{m.backend:{width}}  {m.device:8}  {figures}\n")


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f} s"
