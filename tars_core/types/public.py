"""What all public values share: ``to_dict()``, ``to_json()``, and one line when printed."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from pydantic_core.core_schema import CoreSchema

_LONG = 60
_NESTED = 190
_LINE = 225


class Public(msgspec.Struct, frozen=True, kw_only=True):
    """A value that users see.

    ``repr`` is one line: long values are shortened and defaults are left out. Pydantic and FastAPI accept the value as
    it is and write it as :meth:`to_dict` does.
    """

    def to_dict(self) -> dict[str, Any]:
        """Return the value as plain dicts, lists, strings and numbers; a model's reference becomes its name."""
        return {name: plain(getattr(self, name)) for name in self.__struct_fields__}

    def to_json(self) -> str:
        """Return :meth:`to_dict` as JSON, on one line."""
        return json.dumps(self.to_dict(), ensure_ascii=False)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Yield names and plain values, so that ``dict(value)`` works, as it does for pydantic's models."""
        yield from self.to_dict().items()

    def __repr__(self) -> str:
        text = ", ".join(self._parts())
        if not text.isprintable():  # a file's name may hold anything
            text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
        return f"{type(self).__name__}({text if len(text) <= _LINE else text[:_LINE] + '…'})"

    def _parts(self) -> list[str]:
        """Return ``name=value`` for each field that is not at its default."""
        parts = []
        for field in msgspec.structs.fields(self):
            value = getattr(self, field.name)
            factory = field.default_factory
            if value != (field.default if factory is msgspec.NODEFAULT else factory()):
                parts.append(f"{field.name}={brief(value)}")
        return parts

    @classmethod
    def __get_pydantic_core_schema__(cls, _source: object, _handler: object) -> CoreSchema:
        from pydantic_core import core_schema  # noqa: PLC0415 - who calls this has imported pydantic

        written = core_schema.plain_serializer_function_ser_schema(plain)
        return core_schema.is_instance_schema(cls, serialization=written)

    @classmethod
    def __get_pydantic_json_schema__(cls, _schema: object, _handler: object) -> dict[str, Any]:
        what = "string" if cls.__str__ is not object.__str__ else "object"
        return {"type": what, "title": cls.__name__, "description": f"{cls.__name__} of tars_core"}


def brief(value: object) -> str:  # noqa: PLR0911 - one case a type
    """Return ``value`` in a few words on one line."""
    match value:
        case str():
            return repr(value if len(value) <= _LONG else value[: _LONG - 1] + "…")
        case float():
            return f"{value:.4g}"
        case bytes():
            return f"<{len(value)} bytes>"
        case tuple() | AbstractSet() | Mapping() if len(value) > _LONG // 3 or len(repr(value)) > _LONG:
            return f"<{len(value)} items>"
        case Public() if _has_text(value):  # of a path, the end says most
            text = str(value)
            return text if len(text) <= _LONG else "…" + text[1 - _LONG :]
        case Public() if len(repr(value)) > _NESTED:
            return f"<{type(value).__name__}>"
    return repr(value)


def field_error(error: Exception, strip: str = "") -> str:
    """Return msgspec's complaint with the field first: ``token_ids[0]: expected int, got str``.

    ``strip`` is the part of its path that says nothing to the reader.
    """
    message, at, path = str(error).partition(" - at `$")
    field = path.rstrip("`").removeprefix(strip).lstrip(".")
    words = message.replace("`", "").replace("Expected", "expected")
    return f"{field}: {words}" if at and field else words


def _has_text(value: Public) -> bool:
    """Say whether it stands for a text, as a model's reference does."""
    return type(value).__str__ is not object.__str__


def plain(value: object) -> Any:  # noqa: ANN401 - whatever JSON can hold
    """Return ``value`` as dicts, lists, strings, numbers and ``None``."""
    result: object = str(value)
    match value:
        case Public() if not _has_text(value):
            result = value.to_dict()
        case AbstractSet():
            result = sorted(map(str, value))
        case Mapping():
            result = {str(key): plain(item) for key, item in value.items()}
        case tuple() | list():
            result = [plain(item) for item in value]
        case bytes():
            result = base64.b64encode(value).decode()
        case float() if not math.isfinite(value):
            result = None  # JSON has no word for it
        case None | bool() | int() | float() | str():
            result = value
    return result
