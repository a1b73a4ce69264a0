"""A machine of the tests' own: empty home, no settings, and fake backends that are really discovered."""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import msgspec
import pytest
from hypothesis import settings

from tars_core import InferenceEngine
from tars_core.testing import fake

settings.register_profile("tars", derandomize=True, deadline=None, max_examples=100)
settings.load_profile("tars")

FAKES = ("alpha", "beta", "gamma")
QUICK = {"load_s": 10.0, "first_token_s": 10.0, "between_tokens_s": 10.0, "total_s": 30.0, "import_s": 30.0}


class Plant(Protocol):
    """Registers a plugin the way an installed distribution does."""

    def __call__(
        self, folder: Path, name: str, target: str, *, group: str = ..., distribution: str | None = ...
    ) -> None: ...


def _plant(
    folder: Path, name: str, target: str, *, group: str = "tars.plugins.v1", distribution: str | None = None
) -> None:
    distribution = distribution or f"tars-{name}"
    info = folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {target}\n")


@pytest.fixture(scope="session")
def plant() -> Plant:
    return _plant


@pytest.fixture(scope="session", autouse=True)
def _own_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Give this process and its children an empty home and the fake backends."""
    # What was started in the background of a script ignores Ctrl-C, and so does all that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    home = tmp_path_factory.mktemp("home")
    installed = tmp_path_factory.mktemp("site")
    for name in FAKES:
        _plant(installed, name, f"tars_core.testing.fake:{name}")
    with pytest.MonkeyPatch.context() as patch:
        for variable in [name for name in os.environ if name.startswith("TARS_")]:
            patch.delenv(variable)
        patch.setenv("HOME", str(home))
        patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        patch.setenv("XDG_CONFIG_HOME", str(home / "config"))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(installed), os.environ.get("PYTHONPATH", "")]).rstrip(":"))
        patch.setattr(sys, "path", [str(installed), *sys.path])
        yield


@pytest.fixture
def write_script(tmp_path: Path) -> Callable[..., str]:
    """Return a function that writes a script for fake backends and returns the model's name."""
    numbers = itertools.count()

    def write(**backends: fake.BackendScript) -> str:
        path = tmp_path / f"script-{next(numbers)}.json"
        path.write_bytes(msgspec.json.encode(fake.Script(backends=backends)))
        return f"fake:{path}"

    return write


@pytest.fixture
def make_engine(write_script: Callable[..., str]) -> Iterator[Callable[..., InferenceEngine]]:
    """Return a function that makes an engine of fake backends, given their scripts; all are closed at the end."""
    engines: list[InferenceEngine] = []

    def make(
        *,
        limits: dict[str, float] | None = None,
        options: dict[str, object] | None = None,
        **backends: fake.BackendScript,
    ) -> InferenceEngine:
        engine = InferenceEngine(
            options,
            model=write_script(**backends),
            plugins=",".join(FAKES),
            limits={**QUICK, **(limits or {})},
            prefer=tuple(backends),
        )
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()
