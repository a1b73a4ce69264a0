"""Settings from environment variables and from a ``.env`` file, read by pydantic-settings.

A module of its own because it is imported only where there are such variables: pydantic-settings costs 0.15 s, a
quarter of what ``tars backends`` takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, get_type_hints

import pydantic
import pydantic_settings

from tars_core.config.settings import ENV_PREFIX, KEYS, NESTED, Settings
from tars_core.types.errors import ConfigError

_types = get_type_hints(Settings)
# Names between commas, not JSON; the settings split them.
_types["prefer"] = Annotated[tuple[str, ...], pydantic_settings.NoDecode]


class _Base(pydantic_settings.BaseSettings):
    model_config = pydantic_settings.SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_nested_delimiter=NESTED, env_ignore_empty=True
    )


_Variables = pydantic.create_model(  # type: ignore[call-overload]  # of a dict mypy does not see that the keys fit
    "_Variables", __base__=_Base, **{key: (_types[key], None) for key in KEYS}
)


def from_environment() -> dict[str, object]:
    """Return what the process's environment sets. Raises ``ConfigError`` for a list or table that is no JSON."""
    return _read(pydantic_settings.EnvSettingsSource(_Variables))


def from_dotenv(file: Path) -> tuple[dict[str, object], Mapping[str, str | None]]:
    """Return what a ``.env`` file sets, and all the variables it has, other programs' too."""
    try:
        source = pydantic_settings.DotEnvSettingsSource(_Variables, env_file=file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    values = {key: value for key, value in _read(source).items() if key in KEYS}
    return values, source.env_vars


def _read(source: pydantic_settings.PydanticBaseSettingsSource) -> dict[str, object]:
    try:
        return source()
    except pydantic_settings.SettingsError as error:
        raise ConfigError(f"the environment: {error}: {error.__cause__}") from error
