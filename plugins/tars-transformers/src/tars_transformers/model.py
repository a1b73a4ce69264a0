"""Loading: from a folder and options to a model that runs, or to the reason why not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers

from tars_core.plugin import (
    DEFAULT_CONTEXT,
    CancelFlag,
    LoadFailed,
    LoadOptions,
    OutOfMemory,
    ProgressCallback,
    is_out_of_memory,
)
from tars_transformers.checkpoint import Checkpoint
from tars_transformers.generate import Network, TransformersModel
from tars_transformers.tokens import Vocabulary

_CPU = "cpu"
_OFFLINE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
_TURN_ENDS = (
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>"),
    *("<|endoftext|>", "<end_of_turn>", "<end_of_utterance>"),
)
"""llama.cpp ends an answer at these too, by name: checkpoints often forget to list them."""


def load(
    folder: Path, checkpoint: Checkpoint, options: LoadOptions, progress: ProgressCallback, cancel: CancelFlag
) -> TransformersModel:
    """Load ``folder``. Raises ``LoadFailed`` with transformers' own words, or ``OutOfMemory``."""
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(options.cpu_threads)
    devices = _devices(options)
    try:
        progress(0.4, f"reading the tokenizer of {folder.name}")
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **_OFFLINE)
        _stop_if(cancel, folder)
        progress(0.5, f"loading {folder.name}")
        network = Network(_weights(folder))
        _stop_if(cancel, folder)
        for at, device in enumerate(devices):
            progress(0.8 + at / 10, f"moving {folder.name} to {device}")
            if _fits(network, device, last=at == len(devices) - 1):
                break
    except LoadFailed:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise _out_of_memory(folder, error) from error
    except Exception as error:  # every architecture has failures of its own
        if is_out_of_memory(str(error)):
            raise _out_of_memory(folder, error) from error
        if isinstance(error, safetensors.SafetensorError):
            raise LoadFailed(f"the weights of {folder.name} are damaged: {error}", hint="fetch them again") from error
        raise LoadFailed(
            f"transformers cannot load {folder.name}: {type(error).__name__}: {_first_line(error)}"
        ) from error
    native = getattr(tokenizer, "backend_tokenizer", None)
    if native is None:
        raise LoadFailed(f"{folder.name} has no tokenizer.json, nor anything one could be made from")
    vocabulary = Vocabulary(native)
    own = checkpoint.context_length or DEFAULT_CONTEXT
    return TransformersModel(
        network,
        vocabulary,
        _ends(network, tokenizer, vocabulary),
        context_length=min(options.context_length or DEFAULT_CONTEXT, own),
        chat_template=_template(tokenizer),
        bos_token=tokenizer.bos_token or "",
        eos_token=tokenizer.eos_token or "",
    )


def _weights(folder: Path) -> transformers.PreTrainedModel:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", use_safetensors=True, output_loading_info=True, **_OFFLINE
    )
    # transformers fills what a checkpoint lacks with random numbers, and only logs it.
    if missing := sorted(info["missing_keys"]):
        raise LoadFailed(f"{folder.name} lacks {len(missing)} of its model's tensors: {missing[0]}, …")
    model.eval()
    return model


def _devices(options: LoadOptions) -> list[str]:
    """Return where to try, in order."""
    gpu = "cuda:0" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else None
    if options.device == "gpu":
        if gpu is None:
            raise LoadFailed(
                f"torch {torch.__version__} finds no GPU here",
                hint="install a build of torch for this GPU and its driver, or use device=cpu",
            )
        return [gpu]
    return [_CPU] if gpu is None or options.device == _CPU else [gpu, _CPU]


def _fits(network: Network, device: str, *, last: bool) -> bool:
    """Move the network and compute once; ``False`` where memory forbids it and there is another device to try."""
    try:
        network.native.to(device)
        network.forward([0], network.new_cache())
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if last or not is_out_of_memory(str(error)):
            raise
    else:
        return True
    network.native.to(_CPU)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return False


def _ends(network: Network, tokenizer: transformers.PreTrainedTokenizerBase, vocabulary: Vocabulary) -> frozenset[int]:
    """Return the tokens that end an answer, from everywhere a checkpoint may name them."""

    def named() -> Iterator[object]:
        for source in (network.native.generation_config, network.native.config, tokenizer):
            ids = getattr(source, "eos_token_id", None)
            yield from ids if isinstance(ids, list | tuple) else (ids,)
        for name in _TURN_ENDS:
            yield vocabulary.special.get(name)

    return frozenset(token for token in named() if isinstance(token, int))


def _template(tokenizer: transformers.PreTrainedTokenizerBase) -> str | None:
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several, by name
        template = template.get("default")
    return template if isinstance(template, str) else None


def _stop_if(cancel: CancelFlag, folder: Path) -> None:
    if cancel.is_set():
        raise LoadFailed(f"loading {folder.name} was cancelled")


def _out_of_memory(folder: Path, error: BaseException) -> OutOfMemory:
    return OutOfMemory(
        f"{folder.name} does not fit the memory: {_first_line(error)}",
        hint="use a smaller model, or a quantised GGUF file of this one",
    )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "no reason given")
