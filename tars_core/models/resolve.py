"""From the name a user gave to the forms of the model that backends can be asked about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from tars_core.types.errors import ModelNotFound
from tars_core.types.models import ModelRef, OfferedModel

DEMO = ModelRef(scheme="demo", rest="")


class ResolvedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model and its forms, best first."""

    name: str
    refs: tuple[ModelRef, ...]
    first: tuple[ModelRef, ...]
    """Those of them that are the first model of an alias; empty where that is missing."""
    weights_ids: Mapping[ModelRef, str | None]
    """Forms whose weights the provider vouches for; the others speak through the probe."""
    notice: str | None = None


def resolve(
    wanted: str | None,
    *,
    aliases: Mapping[str, Sequence[str]],
    offered: Mapping[ModelRef, OfferedModel],
) -> ResolvedModel:
    """Return the model ``wanted`` names: an alias, a path, or a reference with a scheme.

    No name: the demo model with a notice. Never whatever lies on disk. Raises
    :class:`~tars_core.types.errors.ModelNotFound` where there is nothing by that name.
    """
    if wanted is None:
        demo = offered.get(DEMO)
        if demo is None:
            raise ModelNotFound(
                "no model was named, and the demo model is not installed",
                hint="name one (-m PATH, or TARS_MODEL), or, from a clone: pip install ./plugins/tars-demo-model"
                + _listed(aliases, offered),
            )
        return ResolvedModel(
            name=str(DEMO),
            refs=demo.refs,
            first=demo.refs,
            weights_ids=dict.fromkeys(demo.refs, demo.weights_id),
            notice=demo.notice,
        )
    names = aliases.get(wanted, (wanted,))
    if not names:
        raise ModelNotFound(f"the alias {wanted} lists no model", hint=f"write references into models.{wanted}")
    forms: list[tuple[ModelRef, ...]] = []
    weights_ids: dict[ModelRef, str | None] = {}
    missing: list[ModelNotFound] = []
    lacking: set[ModelRef] = set()
    for ref in map(ModelRef.parse, names):
        model = offered.get(ref)
        if model is not None:
            forms.append(model.refs)
            weights_ids |= dict.fromkeys(model.refs, model.weights_id)
            continue
        try:
            _check(ref, aliases, offered)
            forms.append((ref,))
        except ModelNotFound as error:
            missing.append(error)
            lacking.add(ref)
    if not forms:
        raise missing[0]
    return ResolvedModel(
        name=wanted,
        refs=tuple(dict.fromkeys(ref for refs in forms for ref in refs)),
        first=() if ModelRef.parse(names[0]) in lacking else forms[0],
        weights_ids=weights_ids,
        notice=f"{'; '.join(error.message for error in missing)}: going on without" if missing else None,
    )


def _check(ref: ModelRef, aliases: Mapping[str, Sequence[str]], offered: Mapping[ModelRef, OfferedModel]) -> None:
    if ref.scheme == DEMO.scheme:
        raise ModelNotFound(
            f"the model {ref} is not installed",
            hint="the only demo model is demo:" if ref.rest else "from a clone: pip install ./plugins/tars-demo-model",
        )
    path = ref.path
    if path is None:
        return
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:
        raise ModelNotFound(f"{path} cannot be read: {error.strerror}", hint="check the path") from error
    if is_folder:
        _check_folder(path)
    elif not is_file:
        raise ModelNotFound(f"there is no file {path}", hint=f"check the path{_listed(aliases, offered)}")


def _check_folder(folder: Path) -> None:
    if (folder / "config.json").is_file():
        return
    files = sorted(p.name for p in folder.glob("*.gguf"))
    if files:
        raise ModelNotFound(
            f"{folder} is a folder with {len(files)} GGUF files", hint=f"name one of them: {', '.join(files[:5])}"
        )
    raise ModelNotFound(
        f"the folder {folder} holds no model", hint="a checkpoint folder has a config.json and *.safetensors"
    )


def _listed(aliases: Mapping[str, Sequence[str]], offered: Mapping[ModelRef, OfferedModel]) -> str:
    known = [*aliases, *map(str, offered)]
    return f"; known here: {', '.join(known)}" if known else ""
