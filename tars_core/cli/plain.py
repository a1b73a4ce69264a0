"""Results as JSON for other programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from collections.abc import Set as AbstractSet

import msgspec

from tars_core.schema import ModelRef


def dump(value: object) -> str:
    """Return ``value`` as indented JSON, a line feed behind it; a model's reference is the text a user would type."""
    return json.dumps(_plain(value), ensure_ascii=False, indent=2) + "\n"


def _plain(value: object) -> object:
    if isinstance(value, ModelRef):
        return str(value)
    if isinstance(value, msgspec.Struct):
        return {name: _plain(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, AbstractSet):
        return sorted(map(str, value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
