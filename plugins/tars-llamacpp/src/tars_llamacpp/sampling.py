"""How the next token is chosen: llama.cpp's own samplers, in llama.cpp's own order."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import llama_cpp

from tars_core.plugin import GREEDY_BELOW, PENALTY_WINDOW, SamplingParams, engine_seed
from tars_llamacpp.context import Context
from tars_llamacpp.tokens import Vocabulary

_OFF = 0.0
_KEEP_ONE = 1


class Sampler:
    """One request's chain of samplers. The prompt counts for the penalty, as it does in llama.cpp's server."""

    def __init__(self, vocabulary: Vocabulary, sampling: SamplingParams, prompt: Sequence[int]) -> None:
        self._chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        for sampler in _samplers(vocabulary, sampling):
            llama_cpp.llama_sampler_chain_add(self._chain, sampler)
        for token in prompt[-PENALTY_WINDOW:]:
            llama_cpp.llama_sampler_accept(self._chain, token)

    def sample(self, context: Context, row: int) -> int:
        """Choose a token from the logits of a row of the last batch, and remember it for the penalty."""
        token: int = llama_cpp.llama_sampler_sample(self._chain, context.native, row)
        return token

    def close(self) -> None:
        """Free the chain."""
        llama_cpp.llama_sampler_free(self._chain)


def _samplers(vocabulary: Vocabulary, sampling: SamplingParams) -> Iterator[int]:
    if never := vocabulary.never:
        biases = (llama_cpp.llama_logit_bias * len(never))(
            *[llama_cpp.llama_logit_bias(token, -math.inf) for token in never]
        )
        yield llama_cpp.llama_sampler_init_logit_bias(vocabulary.size, len(never), biases)
    yield llama_cpp.llama_sampler_init_penalties(vocabulary.size, PENALTY_WINDOW, sampling.repeat_penalty, _OFF, _OFF)
    if sampling.temperature < GREEDY_BELOW:
        yield llama_cpp.llama_sampler_init_greedy()
        return
    yield llama_cpp.llama_sampler_init_top_k(sampling.top_k)
    yield llama_cpp.llama_sampler_init_top_p(sampling.top_p, _KEEP_ONE)
    yield llama_cpp.llama_sampler_init_min_p(sampling.min_p, _KEEP_ONE)
    yield llama_cpp.llama_sampler_init_temp(sampling.temperature)
    yield llama_cpp.llama_sampler_init_dist(engine_seed(sampling.seed))
