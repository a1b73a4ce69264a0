"""Settings: arguments, then ``TARS_…`` environment variables, then the user's file, then defaults.

The user's file is ``config.toml`` in the platform's folder for configuration (on Linux ``~/.config/tars``).
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import platformdirs
import pydantic
import pydantic_settings
from pydantic import Field

from tars_core.errors import ConfigError

_ENV_PREFIX = "TARS_"
_USE = "use_"

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class LimitSettings(pydantic.BaseModel):
    """Time limits in seconds. The first three bound the time without progress."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    load_s: Seconds = 300.0
    first_token_s: Seconds = 120.0
    between_tokens_s: Seconds = 30.0
    total_s: Seconds = 900.0
    """For the whole request with all its attempts."""
    import_s: Seconds = 10.0
    """For the first import of a plugin."""
    probe_s: Seconds = 2.0


class Settings(pydantic_settings.BaseSettings):
    """Every setting of an engine, with its default."""

    model_config = pydantic_settings.SettingsConfigDict(
        env_prefix=_ENV_PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True
    )

    model: str | None = None
    """Path, reference or alias; ``None``: the demo model."""
    models: dict[str, tuple[str, ...]] = {}
    """Aliases: a name for an ordered list of references."""
    backend: str | None = None
    """Use this backend and no other."""
    prefer: tuple[str, ...] = ()
    """Backends to try first, in this order."""
    use: dict[str, bool] = {}
    """``use.NAME = false`` forbids a backend. As an argument also ``use_NAME=False``."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    require_device: Literal["gpu"] | None = None
    """Fail where the model ends up elsewhere, instead of running slowly on the CPU."""
    context_length: Count | None = None
    """Tokens for one request, prompt and answer; ``None``: the model's own, within what memory allows."""
    threads: Count | None = None
    gpu_layers: Annotated[int, Field(ge=-1)] | None = None
    concurrency: Count = 4
    """Requests one loaded model runs at once; more wait."""
    max_queue: Count = 256
    """Requests an engine holds, running and waiting; more are refused with ``Overloaded``."""
    isolation: Literal["process", "none"] = "process"
    allow_download: bool = False
    plugins: str = ""
    """Plugins that may be imported: names between commas, ``-name`` denies one; empty: all."""
    limits: LimitSettings = LimitSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[pydantic_settings.BaseSettings],
        init_settings: pydantic_settings.PydanticBaseSettingsSource,
        env_settings: pydantic_settings.PydanticBaseSettingsSource,
        dotenv_settings: pydantic_settings.PydanticBaseSettingsSource,  # noqa: ARG003 - never read by a library
        file_secret_settings: pydantic_settings.PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[pydantic_settings.PydanticBaseSettingsSource, ...]:
        """Order the sources, best first."""
        file = pydantic_settings.TomlConfigSettingsSource(settings_cls, toml_file=user_file())
        return init_settings, env_settings, file

    def forbids(self, backend: str) -> bool:
        """Say whether ``use`` forbids ``backend``; ``llama_cpp`` and ``llamacpp`` are one name."""
        said = [allowed for name, allowed in self.use.items() if _same_name(name, backend)]
        return bool(said) and not said[-1]  # a better source's keys come after a lesser one's


def user_file() -> Path:
    """Return where the user's own settings are looked for."""
    return platformdirs.user_config_path("tars", appauthor=False) / "config.toml"


def cache_folder() -> Path:
    """Return where what can be found out again is kept."""
    return platformdirs.user_cache_path("tars", appauthor=False)


def load_settings(arguments: Mapping[str, object]) -> Settings:
    """Gather the settings, ``arguments`` first.

    ``use_NAME`` is taken for ``use.NAME``. Raises :class:`~tars_core.errors.ConfigError` naming key, origin and,
    for an unknown key, the nearest known one.
    """
    plain: dict[str, object] = {}
    use: dict[str, object] = {}
    for key, value in arguments.items():
        if key.startswith(_USE):
            if not isinstance(value, bool):
                raise ConfigError(f"setting {key} (argument): {value!r} is neither True nor False")
            use[key[len(_USE) :]] = value
        elif key.startswith("_"):  # pydantic-settings takes these for its own options
            raise ConfigError(f"unknown setting {key} (argument)")
        else:
            plain[key] = value
    if use:
        given = plain.get("use", {})
        plain["use"] = {**(given if isinstance(given, Mapping) else {}), **use}
    try:
        return Settings(**plain)  # type: ignore[arg-type]  # what the values are is for pydantic to check
    except pydantic.ValidationError as error:
        raise _explain(error, arguments) from None
    except pydantic_settings.SettingsError as error:
        hint = 'lists and tables are JSON in the environment: TARS_PREFER=["ollama"]'
        raise ConfigError(f"the environment's settings cannot be read: {error}", hint=hint) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"the settings cannot be read: {error}", hint=f"look at {user_file()}") from error


def _same_name(one: str, other: str) -> bool:
    return one.replace("_", "").replace("-", "").lower() == other.replace("_", "").replace("-", "").lower()


def _explain(error: pydantic.ValidationError, arguments: Mapping[str, object]) -> ConfigError:
    first = error.errors(include_url=False)[0]
    place = [str(part) for part in first["loc"]]
    key = ".".join(place)
    if first["type"] == "extra_forbidden":
        known = [*Settings.model_fields, *(f"limits.{name}" for name in LimitSettings.model_fields)]
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        return ConfigError(
            f"unknown setting {key} ({_origin(place, arguments)})",
            hint=f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}",
        )
    message = first["msg"].removeprefix("Input ")
    return ConfigError(f"setting {key} ({_origin(place, arguments)}): {first['input']!r:.60} {message}")


def _origin(place: list[str], arguments: Mapping[str, object]) -> str:
    given: object = arguments
    for part in place:
        if not isinstance(given, Mapping):
            return "argument"
        if part not in given:
            break
        given = given[part]
    else:
        return "argument"
    for variable in (_ENV_PREFIX + "__".join(place).upper(), _ENV_PREFIX + place[0].upper()):
        if any(name.upper() == variable for name in os.environ):
            return f"environment variable {variable}"
    return str(user_file())


if sys.version_info < (3, 11):  # pragma: no cover - pydantic-settings reads TOML through tomli there
    import tomli as _tomli  # noqa: F401 - fail at import, with the package's name, not at the first setting
