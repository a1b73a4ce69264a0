"""``[backends.xllamacpp]``."""

from __future__ import annotations

from typing import Annotated

import pydantic
from pydantic import Field


class XLlamaCppSettings(pydantic.BaseModel):
    """What can be set for this backend alone."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    batch: Annotated[int, Field(ge=2, le=4096)] = 128
    """Prompt tokens read at a time; a cancel waits for one batch: 0.45 s for a 135M model on 2 cores."""
    prompt_cache_mib: Annotated[int, Field(ge=0)] = 512
    """Memory for prompts seen before; the engine's own default is 8192."""
