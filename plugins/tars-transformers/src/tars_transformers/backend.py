"""This backend alone, without the choice between several."""

from __future__ import annotations

import os
import re
from pathlib import Path

from tars_core.standalone import Backend

_GPUS = ("cuda", "mps", "gpu")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class TransformersBackend(Backend):
    """One checkpoint, run by transformers in a process of its own.

    ``model_name`` is a folder, or a repository of Hugging Face's hub (``microsoft/phi-2``); a folder goes first.
    ``device`` is ``auto``, ``cpu``, or ``cuda`` (``mps``, ``gpu``), which then is required.
    """

    name = "transformers"

    def __init__(self, model_name: str | os.PathLike[str], device: str = "auto", **settings: object) -> None:
        name = os.fspath(model_name)
        if _REPOSITORY.fullmatch(name) and not Path(name).exists():
            name = f"hf:{name}"
        super().__init__(name, device="gpu" if device.partition(":")[0] in _GPUS else device, **settings)
