"""The loop's caching, over tiny random models of the kinds there are, against reading all anew for each token."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
import transformers

import tars_demo_model
from tars_core.plugin import GenerateRequest, LoadFailed, LoadOptions, ModelRef, SamplingParams, TextDelta
from tars_transformers import plugin
from tars_transformers.generate import TransformersModel

PROMPT = "¿Qué es TARS? Hola, buenos días. What is your name, please?"
VOCABULARY = json.loads((tars_demo_model.WEIGHTS / "config.json").read_text("utf-8"))["vocab_size"]
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "bos_token_id": None, "eos_token_id": 2}
HEADS = {**SIZES, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
CONFIGS = {
    "grouped heads": transformers.Qwen3Config(**HEADS, head_dim=16),
    "learned positions": transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, eos_token_id=2),
    "relative bias": transformers.BloomConfig(
        vocab_size=VOCABULARY, hidden_size=64, n_layer=2, n_head=4, eos_token_id=2
    ),
    "sliding window": transformers.MistralConfig(**HEADS, sliding_window=16),
    "some layers sliding": transformers.Gemma3TextConfig(**HEADS, head_dim=16, sliding_window=16),
    "experts": transformers.MixtralConfig(**HEADS, num_local_experts=4),
    "recurrent state": transformers.MambaConfig(**SIZES),
    "state and attention": transformers.JambaConfig(**HEADS, num_experts=2, attn_layer_offset=1, attn_layer_period=2),
}


def _save(folder: Path, config: transformers.PretrainedConfig) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    network = transformers.AutoModelForCausalLM.from_config(config).eval()
    for weights in network.parameters():
        if weights.dim() > 1:
            torch.nn.init.normal_(weights, std=0.3)  # as made, all tokens are about equally likely
    network.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tars_demo_model.WEIGHTS / file, folder)
    return network


def _load(folder: Path) -> TransformersModel:
    loaded = plugin.tars_load(
        model=ModelRef.parse(folder),
        options=LoadOptions(threads=1),
        progress=lambda *_: None,
        cancel=threading.Event(),
    )
    assert isinstance(loaded, TransformersModel)
    return loaded


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_each_token_is_the_one_that_the_whole_text_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: transformers.PretrainedConfig
) -> None:
    monkeypatch.setattr("tars_transformers.generate._PROMPT_TOKENS_A_STEP", 7)
    network, loaded = _save(tmp_path, config), _load(tmp_path)
    monkeypatch.setattr(loaded, "_ends", frozenset())
    greedy = SamplingParams(temperature=0, repeat_penalty=1.0, max_tokens=30)
    request = GenerateRequest(prompt=PROMPT, tokens=tuple(loaded.tokenize(PROMPT)), sampling=greedy)
    events = plugin.tars_generate(loaded=loaded, request=request, cancel=threading.Event())
    got = [token for event in events if isinstance(event, TextDelta) for token in event.token_ids]
    text = loaded._vocabulary.tokenize(PROMPT)
    with torch.inference_mode():
        for token in got:
            assert token == int(network(torch.tensor([text]), use_cache=False).logits[0, -1].argmax())
            text.append(token)
    assert len(got) > 10


def test_one_that_keeps_its_state_elsewhere_is_refused(tmp_path: Path) -> None:
    _save(tmp_path, transformers.RwkvConfig(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2))
    with pytest.raises(LoadFailed, match="RwkvForCausalLM uses an unsupported kind of cache"):
        _load(tmp_path)
