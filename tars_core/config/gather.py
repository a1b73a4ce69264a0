"""Where settings come from.

Arguments, then ``TARS_…`` environment variables, then the file the caller names, then the user's file, then defaults.
The user's file is ``config.toml`` in the platform's folder for configuration (on Linux ``~/.config/tars``). Only the
command line also reads ``.env``, ``tars.toml`` and ``[tool.tars]`` of ``pyproject.toml`` in the current folder.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from tars_core.config.settings import (
    ENV_PREFIX,
    KEYS,
    KNOWN,
    NESTED,
    Settings,
    leaves,
    plain_name,
    unknown_key,
    user_file,
)
from tars_core.types.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_log = logging.getLogger("tars_core.config")
_USE = "use_"
_ENV_USE = "TARS_USE_"
_TABLES = ("tars_limits", "tars_backends", "tars_models")
_OFF = "none"


def load_settings(arguments: Mapping[str, object], *, file: Path | None = None, folder: Path | None = None) -> Settings:
    """Gather the settings, ``arguments`` first; ``use_NAME`` is taken for ``use.NAME``.

    ``file`` is one the caller names; it must exist. ``folder`` is where the command line was called. Raises
    :class:`~tars_core.types.errors.ConfigError` naming key, origin and, for an unknown key, the nearest known one.
    """
    for key in arguments:
        if not isinstance(key, str):
            raise ConfigError(f"settings have names, not {key!r:.40}")
    values: dict[str, object] = {}
    origins: dict[str, str] = {}
    for layer in reversed(list(_layers(arguments, file, folder))):
        _merge(values, layer.values)
        for key, _ in leaves(layer.values):
            origins[key] = layer.origin(key)
    for key in values:
        if key not in KEYS:
            raise unknown_key(key, origins, KNOWN)
    if not values:
        return Settings()
    from tars_core.config import checks  # noqa: PLC0415 - imports pydantic

    return dataclasses.replace(checks.checked(values, origins, KNOWN), origins=origins)


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


def _variables(environ: Mapping[str, str], folder: Path | None) -> Iterator[_Layer]:
    names = _ours(environ, "environment")
    dotenv = folder / ".env" if folder is not None else None
    has_file = dotenv is not None and dotenv.is_file()
    if not names and not has_file:
        return
    from tars_core.config import environment  # noqa: PLC0415 - see there

    values = _with_use(environment.from_environment(), environ)
    yield _Layer("environment variable", values, names)
    if dotenv is not None and has_file:
        values, found = environment.from_dotenv(dotenv)
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
            raise ConfigError(f"setting use (argument): {given!r:.40} is not a table of name = true or false")
        values["use"] = {**given, **use}
    return _in_one_form(values)


def _in_one_form(values: dict[str, object]) -> dict[str, object]:
    """Bring what may be written in several ways into one: names between commas, a single reference, ``llama_cpp``."""
    use, prefer, plugins, models = (values.get(key) for key in ("use", "prefer", "plugins", "models"))
    limits = values.get("limits")
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
    if isinstance(limits, Mapping):  # neither TOML nor a variable has a word for None
        values["limits"] = {key: None if value == _OFF else value for key, value in limits.items()}
    for key in ("keep_alive", "max_loaded"):
        if values.get(key) == _OFF:
            values[key] = None
    return values


def _merge(into: dict[str, object], values: Mapping[str, object]) -> None:
    for key, value in values.items():
        inner = into.get(key)
        if isinstance(value, Mapping) and isinstance(inner, dict):
            _merge(inner, value)
        else:
            into[key] = dict(value) if isinstance(value, Mapping) else value


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
        _log.info("the environment variable %s is not a TARS setting", name)
