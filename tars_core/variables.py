"""Settings from environment variables and from a ``.env`` file, read by pydantic-settings.

A module of its own because it is imported only where there are such variables: pydantic-settings costs 0.15 s, a
quarter of what ``tars backends`` takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import pydantic_settings

from tars_core.errors import ConfigError
from tars_core.settings import ENV_PREFIX, NESTED, Settings


class _Variables(Settings, pydantic_settings.BaseSettings):
    """The settings, in the form pydantic-settings can fill from variables."""

    model_config = pydantic_settings.SettingsConfigDict(env_prefix=ENV_PREFIX, env_nested_delimiter=NESTED)

    prefer: Annotated[tuple[str, ...], pydantic_settings.NoDecode] = ()
    """Names between commas, not JSON; the settings split them."""


def from_environment() -> dict[str, object]:
    """Return what the process's environment sets. Raises ``ConfigError`` for a list or table that is no JSON."""
    return _read(pydantic_settings.EnvSettingsSource(_Variables))


def from_dotenv(file: Path) -> tuple[dict[str, object], Mapping[str, str | None]]:
    """Return what a ``.env`` file sets, and all the variables it has, other programs' too."""
    try:
        source = pydantic_settings.DotEnvSettingsSource(_Variables, env_file=file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    values = {key: value for key, value in _read(source).items() if key in Settings.model_fields}
    return values, source.env_vars


def _read(source: pydantic_settings.PydanticBaseSettingsSource) -> dict[str, object]:
    try:
        return source()
    except pydantic_settings.SettingsError as error:
        raise ConfigError(f"the environment: {error}: {error.__cause__}") from error
