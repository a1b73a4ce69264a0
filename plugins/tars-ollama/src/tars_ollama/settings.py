"""``[backends.ollama]``."""

from __future__ import annotations

from typing import Annotated

import pydantic
from pydantic import Field

_DURATION = r"^-?(\d+(\.\d*)?(ns|us|µs|ms|s|m|h))+$"


class OllamaSettings(pydantic.BaseModel):
    """What can be set for this backend alone."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    host: str | None = None
    """Where the daemon listens, in the forms of ``OLLAMA_HOST``; ``None``: as that variable says."""
    keep_alive: Annotated[float, Field(allow_inf_nan=False)] | Annotated[str, Field(pattern=_DURATION)] | None = None
    """How long the daemon keeps the model in memory after an answer: seconds, or ``"1h30m"``; below 0: for ever.
    ``None``: as the daemon is set."""
    parallel: Annotated[int, Field(ge=1)] | None = None
    """Requests the daemon runs at once, which only its own OLLAMA_NUM_PARALLEL decides; ``None``: 1, its default.
    More are held back here, where waiting is not taken for a hang."""
    grow_context: bool = False
    """Reload the model with a larger context where a prompt does not fit, up to what it was trained for."""
