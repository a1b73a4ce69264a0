"""Results as JSON for other programs."""

from __future__ import annotations

import json

from tars_core.types.public import plain


def dump(value: object) -> str:
    """Return ``value`` as indented JSON, a line feed behind it; a model's reference is the text a user would type."""
    return json.dumps(plain(value), ensure_ascii=False, indent=2) + "\n"
