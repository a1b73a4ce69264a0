"""One backend by itself: a model, loaded at once, and raw prompts. No choice, no failover, no chat template."""

from __future__ import annotations

import os
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar

from tars_core.engine import InferenceEngine

if TYPE_CHECKING:
    from typing_extensions import Self


class Backend:
    """Derive from it and name the plugin.

    ``settings`` are those of :class:`~tars_core.engine.InferenceEngine`. No other plugin is imported. As everywhere,
    the model lives in a process of its own; loading happens here, and what stands in its way is raised.
    """

    name: ClassVar[str]

    def __init__(self, model_path: str | os.PathLike[str], **settings: object) -> None:
        self._engine = InferenceEngine(settings, backend=self.name, model=model_path, plugins=self.name)
        self.loaded: bool = False
        try:
            self._engine.load()
        except BaseException:
            self._engine.close()
            raise
        self.loaded = True

    def generate(self, full_prompt: str, max_tokens: int = 200, temperature: float = 0.8) -> str:
        """Continue ``full_prompt`` as it is; return the text without white space around it.

        It also ends before ``User:`` and ``Usuario:``: a raw prompt has no turns that the model could keep to.
        """
        completion = self._engine.complete(full_prompt, raw=True, max_tokens=max_tokens, temperature=temperature)
        return completion.text.strip()

    def close(self) -> None:
        """Free the model; may be called twice."""
        self.loaded = False
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
