"""Train the demo model from nothing and write its checkpoint folder.

Repeatable to the bit on one machine: the number of steps and of threads is fixed, every draw is seeded, and nothing
reads a clock except the progress lines.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAYON_NUM_THREADS"] = "1"

import noise
import torch
from checkpoint import WEIGHTS, save, write_results
from corpus import HELD_OUT, LANGUAGES, Conversation, Corpus
from muon import Muon
from network import Network, Shape, to_llama
from tokens import Encoder, train_tokenizer
from torch import Tensor
from torch.nn import functional

_ALONE = 0.05
"""Share of the training during which every conversation has one exchange."""
_THREADS = 2
"""They give the same bits as one, in three quarters of the time; how many more would add up is not known."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the result. ``batch_tokens`` counts padding too."""

    steps: int = 7900
    batch_tokens: int = 1024
    peak_rate: float = 3e-3
    matrix_rate: float = 0.007
    warmup: int = 200
    decay: float = 0.1
    dropout: float = 0.0
    word_dropout: float = 0.15
    unknown: float = 0.3
    quiet_logits: float = 1e-3
    seed: int = 20261122


@dataclass(frozen=True)
class Batch:
    """``ids`` ``[B, T]``; ``where`` flat indices of the N positions whose next token is ``target``."""

    ids: Tensor
    where: Tensor
    target: Tensor


def encode(talk: Conversation, encoder: Encoder, rng: Random, dropout: float) -> tuple[list[int], list[int]]:
    """Ids of a conversation and, per position, the next token where an answer says it, else -1."""
    ids: list[int] = []
    targets: list[int] = []
    if talk.system is not None:
        ids += encoder.turn("system", talk.system, rng, dropout)
    for exchange in talk.exchanges:
        ids += encoder.turn("user", exchange.question, rng, dropout) + encoder.answer_head()
        targets += [-1] * (len(ids) - 1 - len(targets))
        answer = [*encoder.encode(exchange.answer), encoder.end]
        ids += answer
        targets += answer
        ids += encoder.newline
    targets += [-1] * (len(ids) - len(targets))
    return ids, targets


def turns(rng: Random, progress: float) -> int:
    """Length of a conversation: one exchange at first, soon up to seven."""
    alone = noise.happens(rng, 0.5)
    return 1 if alone or progress < _ALONE else rng.randint(2, 7)


def batches(corpus: Corpus, encoder: Encoder, recipe: Recipe, context: int) -> Iterator[Batch]:
    """Endless batches of conversations of similar length, about ``batch_tokens`` each."""
    rng = Random(recipe.seed)  # noqa: S311 - not for secrets
    made = 0
    while True:
        pool = []
        for _ in range(1024):
            talk = corpus.conversation(rng, turns(rng, made / recipe.steps), recipe.unknown)
            pair = encode(talk, encoder, rng, recipe.word_dropout)
            pool.append((pair[0][:context], pair[1][:context]))
        pool.sort(key=lambda pair: len(pair[0]))
        groups: list[list[tuple[list[int], list[int]]]] = [[]]
        for pair in pool:
            if (len(groups[-1]) + 1) * len(pair[0]) > recipe.batch_tokens:
                groups.append([])
            groups[-1].append(pair)
        rng.shuffle(groups)
        made += len(groups)
        yield from (_batch(group) for group in groups)


def _batch(group: list[tuple[list[int], list[int]]]) -> Batch:
    length = len(group[-1][0])
    ids = torch.tensor([row + [0] * (length - len(row)) for row, _ in group])
    targets = torch.tensor([row + [-1] * (length - len(row)) for _, row in group]).reshape(-1)
    where = torch.nonzero(targets >= 0).squeeze(1)
    return Batch(ids, where, targets[where])


def pace(step: int, recipe: Recipe) -> float:
    """Learning rate as a share of its peak: a short linear rise, then a cosine down to a hundredth."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return 0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2


def optimizers_for(network: Network, recipe: Recipe) -> tuple[torch.optim.AdamW, Muon]:
    """Muon for the layers' matrices, AdamW for embeddings and norms."""
    stacked = {"qkv": 3, "gate_up": 2}
    matrices, embeddings, norms = [], [], []
    for name, parameter in network.named_parameters():
        if parameter.ndim == 1:
            norms.append(parameter)
        elif name == "embedding.weight":
            embeddings.append(parameter)
        else:
            matrices.append((parameter, stacked.get(name.split(".")[-2], 1)))
    adam = torch.optim.AdamW(
        [{"params": embeddings, "weight_decay": recipe.decay}, {"params": norms, "weight_decay": 0.0}],
        lr=recipe.peak_rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    return adam, Muon(matrices, momentum=0.95, decay=recipe.decay)


def train(recipe: Recipe, shape: Shape, held_out: float = HELD_OUT) -> tuple[Network, Encoder]:
    """Train tokenizer and network; prints a line now and then."""
    torch.set_num_threads(_THREADS)
    torch.manual_seed(recipe.seed)
    corpus = Corpus(held_out)
    tokenizer = train_tokenizer(tokenizer_texts(corpus, recipe.seed), shape.vocab)
    encoder = Encoder(tokenizer)
    network = Network(shape, recipe.dropout)
    adam, muon = optimizers_for(network, recipe)
    network.train()
    started, shown = time.monotonic(), 0.0
    source = batches(corpus, encoder, recipe, shape.context)
    for step in range(recipe.steps):
        batch = next(source)
        now = pace(step, recipe)
        for group in adam.param_groups:
            group["lr"] = recipe.peak_rate * now
        logits = network(batch.ids, batch.where)
        loss = functional.cross_entropy(logits, batch.target)
        # repeat_penalty scales logits by their sign: with the sum of exp held near one, the right
        # token's logit stays near zero, where scaling does nothing
        quiet = logits.logsumexp(dim=-1).square().mean()
        (loss + recipe.quiet_logits * quiet).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        adam.step()
        muon.step(recipe.matrix_rate * now)
        network.zero_grad(set_to_none=True)
        shown = loss.item() if step == 0 else 0.99 * shown + 0.01 * loss.item()
        if (step + 1) % 250 == 0:
            minutes = (time.monotonic() - started) / 60
            print(f"step {step + 1}/{recipe.steps}  loss {shown:.4f}  {minutes:.1f} min", flush=True)
    return network.eval(), encoder


def tokenizer_texts(corpus: Corpus, seed: int) -> Iterator[str]:
    """A sample of what the model reads and writes, in its proportions."""
    rng = Random(seed + 1)  # noqa: S311 - not for secrets
    for _ in range(12_000):
        lang = rng.choice(LANGUAGES)
        exchange = corpus.exchange(rng, lang, 0.25)
        yield exchange.question
        yield f"user\nassistant\nsystem\n{exchange.answer}"


def main() -> None:
    """Train, save, and note what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="fewer for a quick look")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="the checkpoint folder to write")
    arguments = parser.parse_args()
    recipe, shape = Recipe(steps=arguments.steps), Shape()
    started = time.monotonic()
    network, encoder = train(recipe, shape)
    weights = to_llama(network)
    save(arguments.out, weights, shape, encoder.tokenizer)
    file = arguments.out / "model.safetensors"
    figures = {
        "minutes": round((time.monotonic() - started) / 60, 1),
        "cpu_minutes": round(time.process_time() / 60, 1),
        "steps": recipe.steps,
        "parameters": sum(tensor.numel() for tensor in weights.values()),
        "bytes": file.stat().st_size,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "torch": torch.__version__,
    }
    print(json.dumps(figures, indent=2))
    if arguments.out == WEIGHTS:
        write_results("training", figures)


if __name__ == "__main__":
    main()
