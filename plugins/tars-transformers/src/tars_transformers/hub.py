"""``hf:org/name``: what Hugging Face's cache on this machine holds, and fetching it where that is allowed."""

from __future__ import annotations

import os
import re
from pathlib import Path

from tars_core.plugin import CancelFlag, LoadFailed, ModelNotFound, ModelRef, ProgressCallback
from tars_transformers import checkpoint

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_REVISION = re.compile(r"[0-9a-f]{40}")
_WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
"""Weights and tokenizers; no pickles, and no Python."""


def repository(model: ModelRef) -> str | None:
    """Return the repository that ``model`` names as a checkpoint, if it does: one with a file's name is a GGUF."""
    return model.rest if model.scheme == "hf" and _REPOSITORY.fullmatch(model.rest) else None


def cached(name: str) -> Path | None:
    """Return the folder of ``name`` in the cache, read as huggingface_hub lays it out.

    ``None`` where it is not there, or not with all its weights. Importing that package to ask takes longer than a probe
    may.
    """
    folder = _cache() / f"models--{name.replace('/', '--')}"
    try:
        revision = (folder / "refs" / "main").read_text("ascii").strip()
        snapshot = folder / "snapshots" / revision
        if not _REVISION.fullmatch(revision) or not (snapshot / checkpoint.CONFIG).is_file():
            return None
        checkpoint.weight_files(snapshot)
    except (OSError, ValueError, checkpoint.Incomplete):
        return None
    except LoadFailed:
        pass  # there, and not to be used: whoever asks is told why
    return snapshot


def _cache() -> Path:
    variables = os.environ
    if folder := variables.get("HF_HUB_CACHE") or variables.get("HUGGINGFACE_HUB_CACHE"):
        return Path(folder).expanduser()
    home = variables.get("HF_HOME") or str(Path(variables.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    return Path(home).expanduser() / "hub"


def missing(name: str) -> ModelNotFound:
    """Say how to get ``name``."""
    return ModelNotFound(
        f"hf:{name} is not on this machine",
        hint=f"hf download {name} fetches it, or allow_download=True (TARS_ALLOW_DOWNLOAD=1) lets TARS do it",
    )


def download(name: str, progress: ProgressCallback, cancel: CancelFlag) -> Path:
    """Fetch ``name`` and return its folder."""
    import huggingface_hub  # noqa: PLC0415 - a probe goes without it
    from huggingface_hub import errors  # noqa: PLC0415
    from tqdm.auto import tqdm  # noqa: PLC0415

    class Told(tqdm):  # type: ignore[misc]
        """Tells TARS instead of the terminal."""

        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            del n
            if cancel.is_set():
                raise LoadFailed(f"fetching hf:{name} was cancelled")
            progress(0.0, f"fetching {name}")
            return None

    progress(0.0, f"fetching {name}")
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_WANTED, tqdm_class=Told))
    except LoadFailed:
        raise
    except errors.GatedRepoError as error:
        raise ModelNotFound(
            f"hf:{name} is given only to those who accepted its terms",
            hint=f"accept them on its page, then log in: hf auth login ({_short(error)})",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFound(f"there is no hf:{name}, or it is private", hint="check the name") from error
    except Exception as error:  # the hub's client raises its own, its transport's and the system's errors
        raise LoadFailed(
            f"hf:{name} cannot be fetched: {_short(error)}", hint="check the network, then try again"
        ) from error


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
