"""Settings, and where each came from.

Arguments, then ``TARS_…`` environment variables, then the file the caller names, then the user's file, then defaults.
The user's file is ``config.toml`` in the platform's folder for configuration (on Linux ``~/.config/tars``). Only the
command line also reads ``.env``, ``tars.toml`` and ``[tool.tars]`` of ``pyproject.toml`` in the current folder.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal, NamedTuple

import platformdirs
from annotated_types import Ge, Interval

from tars_core.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_log = logging.getLogger("tars_core.settings")
ENV_PREFIX = "TARS_"
NESTED = "__"
_USE = "use_"
_ENV_USE = "TARS_USE_"
_DEFAULT = "default"

_TABLES = ("tars_limits", "tars_backends", "tars_models")

Seconds = Annotated[float, Interval(gt=0, lt=math.inf)]
Count = Annotated[int, Ge(1)]


@dataclass(frozen=True)
class LimitSettings:
    """Time limits in seconds. The first three bound the time without progress."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    load_s: Seconds = 300.0
    first_token_s: Seconds = 120.0
    between_tokens_s: Seconds = 30.0
    total_s: Seconds = 900.0
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
        yield from _leaves(values)


KEYS = tuple(key.name for key in dataclasses.fields(Settings) if key.name != "origins")
_KNOWN = (*KEYS, *(f"limits.{key.name}" for key in dataclasses.fields(LimitSettings)))


def user_file() -> Path:
    """Return where the user's own settings are looked for."""
    return platformdirs.user_config_path("tars", appauthor=False) / "config.toml"


def cache_folder() -> Path:
    """Return where what can be found out again is kept."""
    return platformdirs.user_cache_path("tars", appauthor=False)


def load_settings(arguments: Mapping[str, object], *, file: Path | None = None, folder: Path | None = None) -> Settings:
    """Gather the settings, ``arguments`` first; ``use_NAME`` is taken for ``use.NAME``.

    ``file`` is one the caller names; it must exist. ``folder`` is where the command line was called. Raises
    :class:`~tars_core.errors.ConfigError` naming key, origin and, for an unknown key, the nearest known one.
    """
    for key in arguments:
        if not isinstance(key, str):
            raise ConfigError(f"settings have names, not {key!r:.40}")
    values: dict[str, object] = {}
    origins: dict[str, str] = {}
    for layer in reversed(list(_layers(arguments, file, folder))):
        _merge(values, layer.values)
        for key, _ in _leaves(layer.values):
            origins[key] = layer.origin(key)
    for key in values:
        if key not in KEYS:
            raise unknown_key(key, origins, _KNOWN)
    if not values:
        return Settings()
    from tars_core import validation  # noqa: PLC0415 - imports pydantic

    return dataclasses.replace(validation.checked(values, origins, _KNOWN), origins=origins)


class _Layer(NamedTuple):
    """One source's values. ``place`` tells where; variables are named each by itself."""

    place: str
    values: dict[str, object]
    variables: frozenset[str] = frozenset()

    def origin(self, key: str) -> str:
        parts = key.split(".")
        for length in range(len(parts), 0, -1):
            for between in (NESTED, "_"):  # TARS_LIMITS__LOAD_S, TARS_USE_OLLAMA
                name = (ENV_PREFIX + between.join(parts[:length])).upper()
                if name in self.variables:
                    return f"{self.place} {name}"
        return self.place


def _layers(arguments: Mapping[str, object], file: Path | None, folder: Path | None) -> Iterator[_Layer]:
    """Yield the sources, best first."""
    yield _Layer("argument", _from_arguments(arguments))
    yield from _variables(os.environ, folder)
    if file is not None:
        if not file.is_file():
            raise ConfigError(f"there is no settings file {file}")
        yield _toml(file)
    if folder is not None:
        yield _toml(folder / "tars.toml")
        yield _toml(folder / "pyproject.toml", "tool", "tars")
    yield _toml(user_file())


def _variables(environment: Mapping[str, str], folder: Path | None) -> Iterator[_Layer]:
    names = _ours(environment, "environment")
    dotenv = folder / ".env" if folder is not None else None
    has_file = dotenv is not None and dotenv.is_file()
    if not names and not has_file:
        return
    from tars_core import variables  # noqa: PLC0415 - see there

    values = _with_use(variables.from_environment(), environment)
    yield _Layer("environment variable", values, names)
    if dotenv is not None and has_file:
        values, found = variables.from_dotenv(dotenv)
        yield _Layer(f"{dotenv}:", _with_use(values, found), _ours(found, str(dotenv)))


def _with_use(values: dict[str, object], variables: Mapping[str, str | None]) -> dict[str, object]:
    """Add what ``TARS_USE_NAME`` says; ``TARS_USE__NAME`` is among ``values`` already."""
    given = values.get("use")
    use = dict(given) if isinstance(given, Mapping) else {}
    for variable, value in variables.items():
        name = variable.upper().removeprefix(_ENV_USE)
        if name != variable.upper() and not name.startswith("_"):
            use[name.lower()] = value
    return _in_one_form({**values, "use": use} if use else values)


def _toml(path: Path, *table: str) -> _Layer:
    """Read a file, or one table of it; a file that is not there says nothing."""
    try:
        values: object = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        values = {}
    except (OSError, ValueError, RecursionError) as error:  # unreadable, no UTF-8, no TOML, nested too deep
        raise ConfigError(f"{path} cannot be read: {error}") from error
    for name in table:
        values = values.get(name, {}) if isinstance(values, dict) else {}
    place = f"{path} [{'.'.join(table)}]" if table else str(path)
    return _Layer(place, _in_one_form(dict(values) if isinstance(values, dict) else {}))


def _from_arguments(arguments: Mapping[str, object]) -> dict[str, object]:
    values = {key: value for key, value in arguments.items() if not key.startswith(_USE)}
    use = {key[len(_USE) :]: value for key, value in arguments.items() if key.startswith(_USE)}
    for name, value in use.items():
        if not isinstance(value, bool):
            raise ConfigError(f"setting {_USE}{name} (argument): {value!r} is neither True nor False")
    if use:
        given = values.get("use", {})
        if not isinstance(given, Mapping):
            raise ConfigError(f"setting use (argument): {given!r:.40} is no table of names and true or false")
        values["use"] = {**given, **use}
    return _in_one_form(values)


def _in_one_form(values: dict[str, object]) -> dict[str, object]:
    """Bring what may be written in several ways into one: names between commas, a single reference, ``llama_cpp``."""
    use, prefer, plugins, models = (values.get(key) for key in ("use", "prefer", "plugins", "models"))
    forbidding = {key[len(_USE) :]: values.pop(key) for key in list(values) if key.startswith(_USE)}
    if forbidding and isinstance(use, Mapping | None):
        use = {**(use or {}), **forbidding}
    if isinstance(use, Mapping):
        values["use"] = {plain_name(str(name)): value for name, value in use.items()}
    if isinstance(prefer, str):
        values["prefer"] = tuple(name.strip() for name in prefer.split(",") if name.strip())
    if isinstance(plugins, list | tuple):
        values["plugins"] = ",".join(map(str, plugins))
    if isinstance(models, Mapping):
        values["models"] = {name: (refs,) if isinstance(refs, str) else refs for name, refs in models.items()}
    return values


def plain_name(name: str) -> str:
    """Return a plugin's name as it is compared: ``llama_cpp`` and ``llamacpp`` are one."""
    return name.replace("_", "").replace("-", "").lower()


def _merge(into: dict[str, object], values: Mapping[str, object]) -> None:
    for key, value in values.items():
        inner = into.get(key)
        if isinstance(value, Mapping) and isinstance(inner, dict):
            _merge(inner, value)
        else:
            into[key] = dict(value) if isinstance(value, Mapping) else value


def _leaves(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _ours(names: Iterable[str], place: str) -> frozenset[str]:
    """Return the variables meant for TARS.

    One that is nearly a setting is refused; another program's own ``TARS_HOME`` is only logged.
    """
    ours = frozenset(name.upper() for name in names if name.upper().startswith(ENV_PREFIX))
    _check_variables(ours, place)
    return ours


def _check_variables(names: frozenset[str], place: str) -> None:
    known = [ENV_PREFIX + key.upper() for key in KEYS]
    for name in sorted(names):
        stem = name.partition(NESTED)[0]
        if stem in known or name.startswith(_ENV_USE):
            continue
        table = next((k for k in known if name.startswith(f"{k}_") and k.lower() in _TABLES), None)
        if table:
            key = name.removeprefix(f"{table}_")
            raise ConfigError(f"unknown setting {name} ({place})", hint=f"did you mean {table}{NESTED}{key}?")
        near = difflib.get_close_matches(stem, known, n=1, cutoff=0.8)
        if near:
            raise ConfigError(f"unknown setting {name} ({place})", hint=f"did you mean {near[0]}?")
        _log.info("the environment variable %s is no setting of TARS", name)


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
