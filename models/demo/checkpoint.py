"""The committed master: an ordinary Hugging Face checkpoint folder, written and read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from network import Shape
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokens import CHAT_TEMPLATE, END, PAD
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

RESULTS = Path(__file__).parent / "results.json"
WEIGHTS = Path(__file__).parents[2] / "plugins" / "tars-demo-model" / "src" / "tars_demo_model" / "weights"


def save(folder: Path, weights: dict[str, Tensor], shape: Shape, tokenizer: Tokenizer) -> None:
    """Write the folder that ``LlamaForCausalLM`` and ``AutoTokenizer`` load."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    vocab = tokenizer.get_vocab()
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        head_dim=shape.head_width,
        max_position_embeddings=shape.context,
        rms_norm_eps=shape.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_base},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=vocab[END],
        pad_token_id=vocab[PAD],
        dtype="float32",
    ).save_pretrained(folder)
    GenerationConfig(eos_token_id=vocab[END]).save_pretrained(folder)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        model_max_length=shape.context,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    # transformers 5 writes a class name that transformers 4 does not know; both know this one
    named = folder / "tokenizer_config.json"
    settings = json.loads(named.read_text("utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    del settings["backend"]
    named.write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
    (folder / "model.safetensors").chmod(0o644)


def write_results(part: str, figures: dict[str, Any]) -> None:
    """Replace one part, `training` or `evaluation`, of ``results.json``."""
    results = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    results[part] = figures
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", "utf-8")
