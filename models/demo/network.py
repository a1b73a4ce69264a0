"""The demo model's network: `llama`, written out so that training does only the work it needs.

The maths is that of transformers' ``LlamaForCausalLM`` (``evaluate.py`` loads the result there); the
difference is that past the last attention only the answers' positions are computed, two fifths of all.
Shapes: B sequences, T positions, D width, H heads, V vocabulary, N chosen positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of the network; ``context`` in tokens."""

    vocab: int = 1536
    width: int = 128
    layers: int = 4
    heads: int = 4
    inner: int = 384
    context: int = 512
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5

    @property
    def head_width(self) -> int:
        return self.width // self.heads


def rope_tables(shape: Shape) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding, each ``[context, head_width]``."""
    half = torch.arange(0, shape.head_width, 2, dtype=torch.float32) / shape.head_width
    angles = torch.outer(torch.arange(shape.context, dtype=torch.float32), shape.rope_base**-half)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn queries or keys ``[B, H, T, head_width]`` by their position."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class Block(nn.Module):
    """One layer: attention and SwiGLU, each behind an RMS norm and with a residual connection."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.heads = shape.heads
        self.dropout = dropout
        self.norm1 = nn.RMSNorm(shape.width, eps=shape.norm_eps)
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)
        self.norm2 = nn.RMSNorm(shape.width, eps=shape.norm_eps)
        self.gate_up = nn.Linear(shape.width, 2 * shape.inner, bias=False)
        self.down = nn.Linear(shape.inner, shape.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, where: Tensor | None = None) -> Tensor:
        """``[B, T, D]`` to ``[B, T, D]``, or to ``[N, D]`` at the flat indices ``where``.

        Attention is causal, so padding on the right needs no mask.
        """
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(
            rotate(qkv[0], cos, sin), rotate(qkv[1], cos, sin), qkv[2], is_causal=True
        )
        mixed = mixed.transpose(1, 2).reshape(batch, length, width)
        if where is not None:
            x, mixed = x.reshape(-1, width)[where], mixed.reshape(-1, width)[where]
        x = x + self._drop(self.out(mixed))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
        return x + self._drop(self.down(functional.silu(gate) * up))

    def _drop(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.dropout, self.training) if self.dropout else x


class Network(nn.Module):
    """The whole model with tied input and output embeddings."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape, dropout: float = 0.0) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocab, shape.width)
        blocks = [Block(shape, dropout) for _ in range(shape.layers)]
        self.blocks, self.last = nn.ModuleList(blocks[:-1]), blocks[-1]
        self.norm = nn.RMSNorm(shape.width, eps=shape.norm_eps)
        cos, sin = rope_tables(shape)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                shrink = (2 * shape.layers) ** -0.5 if name.endswith(("out.weight", "down.weight")) else 1.0
                nn.init.normal_(parameter, std=shrink * shape.width**-0.5)

    def forward(self, ids: Tensor, where: Tensor) -> Tensor:
        """Logits ``[N, V]`` of the N positions of ``ids`` ``[B, T]`` whose flat index is in ``where``."""
        length = ids.shape[1]
        x = self.embedding(ids)
        cos, sin = self.cos[:length], self.sin[:length]
        for block in self.blocks:
            x = block(x, cos, sin)
        chosen = self.norm(self.last(x, cos, sin, where))
        return functional.linear(chosen, self.embedding.weight)


def to_llama(network: Network) -> dict[str, Tensor]:
    """The weights under transformers' names, rounded to values that F16 represents, kept as F32.

    The rounding happens once, here, so that the F32 checkpoint and the F16 GGUF hold equal values.
    """
    shape, found = network.shape, network.state_dict()
    named = {"model.embed_tokens.weight": found["embedding.weight"], "model.norm.weight": found["norm.weight"]}
    for i in range(shape.layers):
        old = f"blocks.{i}." if i < shape.layers - 1 else "last."
        new = f"model.layers.{i}."
        q, k, v = found[old + "qkv.weight"].chunk(3)
        gate, up = found[old + "gate_up.weight"].chunk(2)
        named |= {
            new + "input_layernorm.weight": found[old + "norm1.weight"],
            new + "self_attn.q_proj.weight": q,
            new + "self_attn.k_proj.weight": k,
            new + "self_attn.v_proj.weight": v,
            new + "self_attn.o_proj.weight": found[old + "out.weight"],
            new + "post_attention_layernorm.weight": found[old + "norm2.weight"],
            new + "mlp.gate_proj.weight": gate,
            new + "mlp.up_proj.weight": up,
            new + "mlp.down_proj.weight": found[old + "down.weight"],
        }
    return {name: tensor.half().float().contiguous() for name, tensor in named.items()}
