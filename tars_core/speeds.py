"""Speeds measured on this machine by ``tars benchmark``; ranking looks at them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import msgspec

_log = logging.getLogger("tars_core.speeds")


def read(folder: Path, model: str) -> dict[str, float]:
    """Return tokens per second by backend, for ``model`` as the user names it; empty where nothing was measured."""
    return _all(folder).get(model, {})


def keep(folder: Path, model: str, speeds: Mapping[str, float]) -> None:
    """Remember ``speeds``; where the folder cannot be written, say so in the log and go on without."""
    everything = _all(folder)
    everything[model] = {**everything.get(model, {}), **speeds}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _file(folder).write_bytes(msgspec.json.encode(everything))
    except OSError as error:
        _log.warning("the speeds are not kept: %s", error)


def _file(folder: Path) -> Path:
    return folder / "speeds.json"


def _all(folder: Path) -> dict[str, dict[str, float]]:
    try:
        return msgspec.json.decode(_file(folder).read_bytes(), type=dict[str, dict[str, float]])
    except (OSError, msgspec.DecodeError):
        return {}  # never measured, or an interrupted write: both mean that nothing is known
