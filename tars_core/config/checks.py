"""Checks settings with pydantic.

Apart from the settings because pydantic takes 0.2 s to import, and who sets nothing has nothing to check.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pydantic

from tars_core.config.settings import Settings, origin_of, unknown_key
from tars_core.types.errors import ConfigError, PluginError
from tars_core.types.public import brief

_UNKNOWN = {"extra_forbidden", "unexpected_keyword_argument"}  # of a model, of a dataclass


def checked(values: Mapping[str, object], origins: Mapping[str, str], known: Sequence[str]) -> Settings:
    """Return ``values`` as settings. Raises ``ConfigError`` with the first fault, its ``known`` key and its origin."""
    try:
        settings = pydantic.TypeAdapter(Settings).validate_python(dict(values))
    except pydantic.ValidationError as error:
        raise _explained(error, origins, known) from None
    return settings


def own_settings(name: str, model: object, settings: Settings) -> str:
    """Return ``[backends.NAME]`` as JSON, as the backend's pydantic ``model`` takes it.

    Raises ``ConfigError`` for a value that it refuses, and ``PluginError`` where it is not such a model.
    """
    if model is None:
        raise ConfigError(f"the backend {name} has no settings of its own", hint=f"remove [backends.{name}]")
    if not (isinstance(model, type) and issubclass(model, pydantic.BaseModel)):
        raise PluginError(f"tars_settings must return a subclass of pydantic.BaseModel, not {brief(model)}")
    prefix = f"backends.{name}."
    try:
        return model(**settings.backends[name]).model_dump_json()
    except pydantic.ValidationError as error:
        known = [prefix + key for key in model.model_fields]
        raise _explained(error, settings.origins, known, prefix) from None


def _explained(
    error: pydantic.ValidationError, origins: Mapping[str, str], known: Sequence[str], prefix: str = ""
) -> ConfigError:
    """Turn the first of pydantic's complaints into one line: key, origin, value, and what it should be."""
    first = error.errors(include_url=False)[0]
    key = prefix + ".".join(str(part) for part in first["loc"])
    if first["type"] in _UNKNOWN:
        return unknown_key(key, origins, known)
    message = first["msg"].removeprefix("Input ")
    return ConfigError(f"setting {key} ({origin_of(key, origins)}): {first['input']!r:.60} {message}")
