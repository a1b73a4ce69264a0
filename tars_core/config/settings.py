"""What can be set, with the defaults. Where the values come from is told in :mod:`.gather`."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypeAlias

import platformdirs
from annotated_types import Ge, Interval

from tars_core.types.errors import ConfigError

ENV_PREFIX = "TARS_"
NESTED = "__"
_DEFAULT = "default"

Seconds: TypeAlias = Annotated[float, Interval(gt=0, lt=math.inf)]
Count: TypeAlias = Annotated[int, Ge(1)]


@dataclass(frozen=True)
class LimitSettings:
    """Time limits in seconds. The first three bound the time without progress.

    ``None`` (in files and variables ``"none"``) turns one of the first four off.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    load_s: Seconds | None = 300.0
    first_token_s: Seconds | None = 120.0
    between_tokens_s: Seconds | None = 30.0
    total_s: Seconds | None = 900.0
    """For the whole request with all its attempts."""
    import_s: Seconds = 10.0
    """For the first import of a plugin."""
    probe_s: Seconds = 2.0


@dataclass(frozen=True)
class Settings:
    """Every setting of an engine, with its default. :func:`load_settings` checks the values; this class does not."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    model: str | None = None
    """Path, reference or alias; ``None``: the demo model."""
    models: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Aliases: a name for an ordered list of references."""
    backend: str | None = None
    """Use this backend and no other."""
    prefer: tuple[str, ...] = ()
    """Backends to try first, in this order."""
    use: dict[str, bool] = field(default_factory=dict)
    """``use.NAME = false`` forbids a backend. As an argument also ``use_NAME=False``."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    require_device: Literal["gpu"] | None = None
    """Fail where the model ends up elsewhere, instead of running slowly on the CPU."""
    context_length: Count | None = None
    """Tokens for one request, prompt and answer; ``None``: the model's own, within what memory allows."""
    threads: Count | None = None
    gpu_layers: Annotated[int, Ge(-1)] | None = None
    """Layers to put on the GPU; -1: all."""
    concurrency: Count = 4
    """Requests one loaded model runs at once; more wait."""
    max_queue: Count = 256
    """Requests an engine holds, running and waiting; more are refused with ``Overloaded``."""
    isolation: Literal["process", "none"] = "process"
    """``none`` runs backends in this process: no crash is contained, no hang can be ended."""
    python: str | None = None
    """The interpreter that runs worker processes; ``None``: this one. A frozen program has to name one."""
    max_loaded: Count | None = None
    """Models an engine keeps in memory at once; ``None``: as many as fit."""
    keep_alive: Annotated[float, Ge(0)] | None = None
    """Seconds that a model nobody uses stays in memory; ``None``: until the memory is needed."""
    allow_download: bool = False
    plugins: str = ""
    """Plugins that may be imported: names between commas, ``-name`` denies one; empty: all."""
    limits: LimitSettings = LimitSettings()
    backends: dict[str, dict[str, object]] = field(default_factory=dict)
    """A backend's own settings, by its name; see the backend's page."""
    origins: dict[str, str] = field(default_factory=dict, repr=False, compare=False)
    """No setting: where each that is not at its default came from."""

    def forbids(self, backend: str) -> bool:
        """Say whether ``use`` forbids ``backend``; ``llama_cpp`` and ``llamacpp`` are one name."""
        return not self.use.get(plain_name(backend), True)

    def origin(self, key: str) -> str:
        """Return where ``key`` (``limits.load_s``, ``backends.ollama``) came from."""
        return origin_of(key, self.origins)

    def listed(self) -> Iterator[tuple[str, object]]:
        """Yield every setting with its value, nested ones by their dotted keys."""
        values = dataclasses.asdict(self)
        del values["origins"]
        yield from leaves(values)


KEYS = tuple(key.name for key in dataclasses.fields(Settings) if key.name != "origins")
KNOWN = (*KEYS, *(f"limits.{key.name}" for key in dataclasses.fields(LimitSettings)))


def user_file() -> Path:
    """Return where the user's own settings are looked for."""
    return platformdirs.user_config_path("tars", appauthor=False) / "config.toml"


def cache_folder() -> Path:
    """Return where what can be found out again is kept."""
    return platformdirs.user_cache_path("tars", appauthor=False)


def plain_name(name: str) -> str:
    """Return a plugin's name as it is compared: ``llama_cpp`` and ``llamacpp`` are one."""
    return name.replace("_", "").replace("-", "").lower()


def leaves(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield every value in nested tables, by its dotted key."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def unknown_key(key: str, origins: Mapping[str, str], known: Sequence[str]) -> ConfigError:
    """Return the error for ``key``, with the nearest of the ``known`` ones."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
    return ConfigError(f"unknown setting {key} ({origin_of(key, origins)})", hint=hint)


def origin_of(key: str, origins: Mapping[str, str]) -> str:
    """Return where ``key`` came from; a key inside a table is where the table is, and the other way round."""
    for known, origin in origins.items():
        if known.startswith(key + "."):
            return origin
    while key:
        if key in origins:
            return origins[key]
        key = key.rpartition(".")[0]
    return _DEFAULT
