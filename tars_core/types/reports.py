"""What a plugin states about a model, and what is shown of a plugin."""

from __future__ import annotations

from tars_core.types.errors import ContractError
from tars_core.types.models import ModelRef
from tars_core.types.public import Public
from tars_core.types.request import Task


class ProbeLimits(Public, frozen=True, kw_only=True):
    """What a probe may cost."""

    deadline_s: float = 2.0


class ProbeReport(Public, frozen=True, kw_only=True):
    """Facts a plugin states about one model on this machine. It does not rank itself."""

    available: bool
    reason: str | None = None
    """Why it is not available."""
    hint: str | None = None
    """What the user can do about it."""
    device: str | None = None
    """Where it would likely run: ``cpu``, ``cuda``, ``metal``, …"""
    memory_bytes: int | None = None
    """Estimate of what the loaded model takes."""
    weights_id: str | None = None
    """Equal for equal tensor contents and dtypes."""
    context_length: int | None = None
    """Tokens the model was trained for."""
    features: frozenset[str] | None = None
    """What the loaded model will likely be able to do (:data:`~tars_core.types.features.FEATURES`); ``None``: known
    only when it is loaded."""
    deviations: tuple[str, ...] = ()
    """Where a request means something else here than on the other backends; ``tars backends`` shows them."""
    preference: int = 50
    """0 to 100; decides only where all else is equal."""

    def __post_init__(self) -> None:
        if not self.available and not self.reason:
            raise ContractError("a ProbeReport with available=False must give its reason")
        if not 0 <= self.preference <= 100:  # noqa: PLR2004 - a percentage
            raise ContractError(f"preference is 0 to 100, not {self.preference}")


class BackendStatus(Public, frozen=True, kw_only=True):
    """One installed plugin, as ``tars backends`` shows it.

    ``available`` is ``None`` for a plugin that brings models and runs none.
    """

    name: str
    distribution: str
    version: str
    available: bool | None
    device: str | None = None
    reason: str | None = None
    hint: str | None = None
    features: tuple[str, ...] = ()
    """What it can do, as far as that is known before a model is loaded."""
    deviations: tuple[str, ...] = ()
    """Where a request means something else here than on the other backends."""
    quarantined: str | None = None
    """The stage at which it was put aside: discovery, generation, import, register, probe."""


class LoadedStatus(Public, frozen=True, kw_only=True):
    """A model in memory, as ``engine.loaded()`` shows it."""

    name: str
    """The name it was asked for by."""
    backend: str
    model: ModelRef
    task: Task
    device: str
    context_length: int
    concurrency: int
    """Requests it runs at once."""
    running: int
    """Requests it runs now."""
    features: tuple[str, ...]
    pid: int | None
    """The worker process; ``None`` for a backend in this one."""
    resident_bytes: int | None
    """Memory the process holds now, files it has mapped included."""
    idle_s: float
    """Seconds since it was used."""
    warnings: tuple[str, ...] = ()
    """Settings that could not be honoured exactly."""
