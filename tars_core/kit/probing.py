"""The usual answer to ``tars_probe``, for a backend with a scheme of its own."""

from __future__ import annotations

from pathlib import Path

from tars_core.types.models import ModelRef
from tars_core.types.reports import ProbeReport


def probe_file(model: ModelRef | None, scheme: str, *, device: str = "cpu") -> ProbeReport | None:
    """Report on models named ``scheme:PATH``: whether the file, or folder, is there.

    ``None`` for models of another scheme; for ``model=None`` the backend itself is available. ``device`` is where it
    would run.
    """
    if model is not None and model.scheme != scheme:
        return None
    if model is None:
        return ProbeReport(available=True, device=device)
    try:
        size = Path(model.rest).stat().st_size
    except OSError as error:
        return ProbeReport(
            available=False, reason=f"{model.rest or 'the path'}: {error.strerror}", hint=f"name it as {scheme}:PATH"
        )
    return ProbeReport(available=True, device=device, memory_bytes=size)
