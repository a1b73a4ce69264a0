"""Speeds measured on this machine by ``tars benchmark``; ranking looks at them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from tars_core.planning.ranking import Key
from tars_core.types.models import ModelRef

_log = logging.getLogger("tars_core.planning.speeds")


def read(folder: Path, models: Iterable[ModelRef]) -> dict[Key, float]:
    """Return the tokens per second of each backend that was measured with one of ``models``."""
    everything = _all(folder)
    return {(name, model): speed for model in models for name, speed in everything.get(_name(model), {}).items()}


def keep(folder: Path, speeds: Mapping[Key, float]) -> None:
    """Remember ``speeds``; where the folder cannot be written, say so in the log and go on without."""
    everything = _all(folder)
    for (name, model), speed in speeds.items():
        everything.setdefault(_name(model), {})[name] = speed
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _file(folder).write_bytes(msgspec.json.encode(everything))
    except OSError as error:
        _log.warning("the speeds are not kept: %s", error)


def _name(model: ModelRef) -> str:
    return str(model) if model.path is None else str(model.path.absolute())


def _file(folder: Path) -> Path:
    return folder / "speeds.json"


def _all(folder: Path) -> dict[str, dict[str, float]]:
    try:
        return msgspec.json.decode(_file(folder).read_bytes(), type=dict[str, dict[str, float]])
    except (OSError, msgspec.DecodeError):
        return {}  # never measured, or an interrupted write: both mean that nothing is known
