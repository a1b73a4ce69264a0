"""Derive the demo model's GGUF from its checkpoint folder, and check every value that was written.

The wheel build calls :func:`write_gguf`; only the ``gguf`` and ``safetensors`` packages are needed. The
checkpoint's values are representable in F16, so the F16 file holds the very same numbers and both formats
answer alike.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import gguf
import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

Array: TypeAlias = npt.NDArray[Any]

_NORMAL, _CONTROL = int(gguf.TokenType.NORMAL), int(gguf.TokenType.CONTROL)


class GGUFMismatch(ValueError):
    """The file written does not hold what the master says."""


@dataclass(frozen=True, kw_only=True)
class Master:
    """What the GGUF must hold: metadata by key, and tensors by llama.cpp's names.

    Tensors of two dimensions are F16 ``[out, in]``, those of one dimension F32.
    """

    metadata: dict[str, Any]
    tensors: dict[str, Array]


def read_master(weights_dir: Path) -> Master:
    """Translate a checkpoint folder into GGUF terms."""
    config = json.loads((weights_dir / "config.json").read_text("utf-8"))
    tokenizer = json.loads((weights_dir / "tokenizer.json").read_text("utf-8"))
    template = (weights_dir / "chat_template.jinja").read_text("utf-8")
    metadata = _model_metadata(config) | _tokenizer_metadata(config, tokenizer, template)
    return Master(metadata=metadata, tensors=_tensors(weights_dir, config))


def write_gguf(weights_dir: Path, target: Path) -> None:
    """Write ``target`` from the checkpoint in ``weights_dir``, then read it back and compare.

    The same checkpoint gives the same bytes. Raises :class:`GGUFMismatch` if a tensor, token, merge or
    metadata value differs from the master; ``target`` is then removed.
    """
    master = read_master(weights_dir)
    target.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(target, arch="llama")
    for key, value in master.metadata.items():
        _add(writer, key, value)
    for name, tensor in master.tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    try:
        check_gguf(master, target)
    except GGUFMismatch:
        target.unlink()
        raise


def check_gguf(master: Master, target: Path) -> None:
    """Raise :class:`GGUFMismatch` unless ``target`` holds exactly what ``master`` says."""
    reader = gguf.GGUFReader(target)
    found = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    if set(found) != set(master.metadata):
        raise GGUFMismatch(f"metadata keys differ: {sorted(set(found) ^ set(master.metadata))}")
    for key, expected in master.metadata.items():
        if found[key] != (_as_f32(expected) if isinstance(expected, float) else expected):
            raise GGUFMismatch(f"metadata {key} differs")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if set(tensors) != set(master.tensors):
        raise GGUFMismatch(f"tensors differ: {sorted(set(tensors) ^ set(master.tensors))}")
    for name, wanted in master.tensors.items():
        data = np.asarray(tensors[name].data)
        if data.dtype != wanted.dtype or data.shape != wanted.shape or not np.array_equal(data, wanted):
            raise GGUFMismatch(f"tensor {name} differs")


def _model_metadata(config: dict[str, Any]) -> dict[str, Any]:
    head_width = config["hidden_size"] // config["num_attention_heads"]
    return {
        "general.architecture": "llama",
        "general.name": "TARS demo model",
        "general.file_type": int(gguf.LlamaFileType.MOSTLY_F16),
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.block_count": config["num_hidden_layers"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "llama.rope.freq_base": float(config["rope_parameters"]["rope_theta"]),
        "llama.rope.dimension_count": head_width,
        "llama.vocab_size": config["vocab_size"],
    }


def _tokenizer_metadata(config: dict[str, Any], tokenizer: dict[str, Any], template: str) -> dict[str, Any]:
    vocab: dict[str, int] = tokenizer["model"]["vocab"]
    special = {entry["id"]: entry["content"] for entry in tokenizer["added_tokens"]}
    by_id = {i: token for token, i in vocab.items()} | special
    tokens = [by_id[i] for i in range(config["vocab_size"])]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [_CONTROL if i in special else _NORMAL for i in range(len(tokens))],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in tokenizer["model"]["merges"]],
        # llama.cpp takes token 11 for the beginning when none is named, even where it adds none
        "tokenizer.ggml.bos_token_id": config["pad_token_id"],
        "tokenizer.ggml.eos_token_id": config["eos_token_id"],
        "tokenizer.ggml.padding_token_id": config["pad_token_id"],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": template,
    }


def _tensors(weights_dir: Path, config: dict[str, Any]) -> dict[str, Array]:
    """Tensors in llama.cpp's names and layout; raises if a value would change in F16."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    tensors: dict[str, Array] = {}
    for name, loaded in sorted(load_file(weights_dir / "model.safetensors").items()):
        new = names.get_name(name, try_suffixes=(".weight",))
        if new is None:
            raise GGUFMismatch(f"llama.cpp has no name for {name}")
        part = name.split(".")[-2]
        tensor = _for_rope(loaded, heads[part]) if part in heads else loaded
        half = tensor.astype(np.float16)
        if not np.array_equal(half.astype(np.float32), tensor):
            raise GGUFMismatch(f"{name} has values that F16 cannot hold")
        tensors[new] = np.ascontiguousarray(tensor if tensor.ndim == 1 else half)
    return tensors


def _for_rope(weight: Array, heads: int) -> Array:
    """Reorder rows ``[heads * head_width, in]``: llama.cpp rotates neighbours, transformers halves."""
    split = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    turned: Array = split.swapaxes(1, 2).reshape(weight.shape)
    return turned


def _add(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    """Add one metadata entry with the type that llama.cpp expects for it."""
    if key == "general.architecture":
        return  # the writer added it itself
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        raise TypeError(f"{key}: no GGUF type for {value!r}")


def _as_f32(value: float) -> float:
    return float(np.float32(value))
