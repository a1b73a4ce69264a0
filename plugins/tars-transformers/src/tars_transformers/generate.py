"""The decode loop: one sequence at a time over the network's own forward pass."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers

from tars_core.plugin import (
    Answer,
    BackendEvent,
    CancelFlag,
    GenerateRequest,
    GenerationFailed,
    LoadedModel,
    LoadFailed,
    Progress,
    engine_seed,
)
from tars_transformers.plugin import FEATURES
from tars_transformers.sampling import choose
from tars_transformers.tokens import Vocabulary

_CACHES = ("past_key_values", "cache_params")
_PROMPT_TOKENS_A_STEP = 256
"""A cancel waits for them. Fewer are slower to read, more keep larger attention matrices."""


class Network:
    """A model's forward pass, from tokens to the logits of the last one's successor."""

    def __init__(self, native: transformers.PreTrainedModel) -> None:
        self.native = native
        parameters = inspect.signature(native.forward).parameters
        # One that takes neither (RWKV) swallows them all the same, and forgets everything but the last token.
        cache = next((name for name in _CACHES if name in parameters), None)
        if cache is None:
            raise LoadFailed(f"{type(native).__name__} uses an unsupported kind of cache")
        self._cache: str = cache
        self._last_only: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        # A recurrent state takes up a prompt whole, or token by token; there is no going on with several.
        self.divisible = not native._is_stateful  # noqa: SLF001 - transformers asks no other way itself

    @property
    def device(self) -> torch.device:
        """Where it is now."""
        device: torch.device = self.native.device
        return device

    def new_cache(self) -> transformers.DynamicCache:
        """Return an empty cache for one sequence."""
        return transformers.DynamicCache(config=self.native.config)

    def forward(self, tokens: Sequence[int], cache: transformers.DynamicCache) -> torch.Tensor:
        """Read ``tokens`` after what ``cache`` holds; return one row of logits."""
        with torch.inference_mode():
            output = self.native(
                input_ids=torch.tensor([tokens], device=self.device),
                use_cache=True,
                **{self._cache: cache},
                **self._last_only,
            )
        row: torch.Tensor = output.logits[0, -1]
        return row


class TransformersModel(LoadedModel):
    """A network with its vocabulary, in memory. Runs one request at a time."""

    def __init__(  # noqa: PLR0913 - each is one fact about the model
        self,
        network: Network,
        vocabulary: Vocabulary,
        ends: frozenset[int],
        *,
        context_length: int,
        chat_template: str | None,
        bos_token: str,
        eos_token: str,
    ) -> None:
        super().__init__(
            device=str(network.device),
            context_length=context_length,
            features=FEATURES,
            chat_template=chat_template,
            bos_token=bos_token,
            eos_token=eos_token,
            adds_bos=bool(vocabulary.prefix),
            longest_token=vocabulary.longest,
        )
        self._network = network
        self._vocabulary = vocabulary
        self._ends = ends

    def tokenize(self, text: str) -> Sequence[int]:
        """Return the tokens of ``text``."""
        return self._vocabulary.tokenize(text)

    def generate(self, request: GenerateRequest, cancel: CancelFlag) -> Iterator[BackendEvent]:
        """Answer ``request``; see ``tars_generate``."""
        sampling = request.sampling
        tokens = list(request.tokens)
        prompt_tokens = len(tokens)
        decode, ends = self._vocabulary.decoder(), self._ends
        answer = Answer(lambda token: "" if token in ends else decode(token), request)
        generator = torch.Generator().manual_seed(engine_seed(sampling.seed))
        cache = self._network.new_cache()
        a_step = _PROMPT_TOKENS_A_STEP if self._network.divisible else prompt_tokens
        done = 0
        try:
            while not answer.finished:
                if cancel.is_set():
                    yield from answer.finish("cancelled")
                    return
                read = tokens[done : done + a_step]
                logits = self._network.forward(read, cache)
                done += len(read)
                if done < prompt_tokens:
                    yield Progress(prompt_tokens_done=done)
                    continue
                token = choose(logits, tokens, sampling, generator)
                tokens.append(token)
                yield from answer.push(token, ends=token in ends)
        except torch.OutOfMemoryError as error:
            raise GenerationFailed(
                f"{self.device} has no memory left after {done} tokens: {error}",
                hint="use a smaller context_length, or device=cpu",
            ) from error

    def close(self) -> None:
        """Free the memory."""
        del self._network
