"""Names of models, and what a plugin offers under them."""

from __future__ import annotations

from pathlib import Path

from tars_core.types.errors import RequestError
from tars_core.types.public import Public
from tars_core.types.text import check_text

_PATH = "path"


class ModelRef(Public, frozen=True, kw_only=True):
    r"""A model's name: ``scheme:rest`` or a path.

    A scheme has at least two letters, so that ``C:\models`` is a path. A scheme the core does not know is
    passed to every plugin's probe as it is.
    """

    scheme: str
    rest: str

    @classmethod
    def parse(cls, text: str | Path) -> ModelRef:
        """Read a reference. Raises :class:`~tars_core.types.errors.RequestError` where it is blank or not UTF-8."""
        check_text("the model's name", str(text))
        if isinstance(text, Path):
            return cls(scheme=_PATH, rest=_expanded(text))
        if not text.strip():
            raise RequestError("the model's name is blank", hint="tars plan shows what there is")
        scheme, colon, rest = text.partition(":")
        if colon and len(scheme) > 1 and scheme.replace("-", "").replace("_", "").isalnum():
            return cls(scheme=scheme.lower(), rest=rest)
        return cls(scheme=_PATH, rest=_expanded(Path(text)))

    @property
    def path(self) -> Path | None:
        """The file or folder meant, or ``None`` where the scheme is not a path."""
        return Path(self.rest) if self.scheme == _PATH else None

    def __str__(self) -> str:
        return self.rest if self.scheme == _PATH else f"{self.scheme}:{self.rest}"


class OfferedModel(Public, frozen=True, kw_only=True):
    """A model a plugin brings along or can name.

    ``refs`` lists the forms it has, best first. With a ``weights_id`` the plugin vouches that all hold these weights.
    """

    name: ModelRef
    refs: tuple[ModelRef, ...]
    weights_id: str | None = None
    notice: str | None = None
    """Shown when it is used without having been asked for."""


def _expanded(path: Path) -> str:
    try:
        return str(path.expanduser())
    except RuntimeError:  # no such user, no home: it stays as it is, as in a shell
        return str(path)
