"""What a checkpoint folder holds, read from its JSON and the headers of its weights. Nothing of it is executed."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tars_core.plugin import LoadFailed

CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_LENGTHS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "n_ctx")
_CONTINUES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_MAX_JSON_BYTES = 100 * 2**20  # the limit of the safetensors format for its header
_SAMPLE_BYTES = 4096
_SIZE = struct.Struct("<Q")


class Checkpoint(NamedTuple):
    """Facts about a checkpoint. ``context_length`` is ``None`` where the configuration names none."""

    context_length: int | None
    tensor_bytes: int
    weights_id: str


class Incomplete(LoadFailed):
    """Weights are missing, so that fetching would help."""


class _Tensor(NamedTuple):
    size: int
    digest: bytes


def inspect(folder: Path) -> Checkpoint:
    """Read ``folder``. Raises ``LoadFailed`` with the reason where it cannot be run, or not safely."""
    try:
        config = _json(folder / CONFIG)
        _refuse(folder, config)
        tensors = [tensor for file in weight_files(folder) for tensor in _read_header(file)]
        digest = hashlib.sha256(b"".join(sorted(tensor.digest for tensor in tensors)))
        return Checkpoint(
            context_length=_context_length(config),
            tensor_bytes=sum(tensor.size for tensor in tensors),
            weights_id="safetensors:" + digest.hexdigest()[:32],
        )
    except OSError as error:
        raise LoadFailed(f"{error.filename or folder} cannot be read: {error.strerror}") from error


def _refuse(folder: Path, config: Mapping[str, Any]) -> None:
    if "auto_map" in config:
        raise LoadFailed(
            f"{folder.name} brings Python code of its own (auto_map in its {CONFIG}), and none is run",
            hint="use a GGUF file of it, or a checkpoint that transformers knows by itself",
        )
    architectures = [name for name in config.get("architectures") or () if isinstance(name, str)]
    if config.get("is_encoder_decoder") or (architectures and not any(n.endswith(_CONTINUES) for n in architectures)):
        raise LoadFailed(f"{folder.name} ({', '.join(architectures)}) is not a causal language model")


def weight_files(folder: Path) -> list[Path]:
    """Return the files of the weights. Raises ``Incomplete`` where some are missing, ``LoadFailed`` for pickles."""
    index = folder / _INDEX
    if index.is_file():
        parts = _json(index).get("weight_map")
        if not isinstance(parts, dict) or not parts:
            raise _damaged(index, "it lists no weights")
        names = sorted(map(str, set(parts.values())))
        # A part is a file of this folder: no other path is followed.
        if outside := next((name for name in names if Path(name).name != name), None):
            raise _damaged(index, f"it names {outside!r:.80}")
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise Incomplete(f"{folder} lacks {len(missing)} of {len(names)} parts of its weights: {missing[0]}, …")
        return [folder / name for name in names]
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        raise LoadFailed(
            f"{folder} has its weights in {pickles[0]}: pickle checkpoints can run code",
            hint="use its *.safetensors; many publishers offer both",
        )
    raise Incomplete(f"{folder} has no {_WEIGHTS} and no {_INDEX}")


def _read_header(file: Path) -> Iterator[_Tensor]:
    """Yield the file's tensors; all of them lie inside it."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        head = opened.read(_SIZE.size)
        length = _SIZE.unpack(head)[0] if len(head) == _SIZE.size else size
        start = _SIZE.size + length
        if length > _MAX_JSON_BYTES or start > size:
            raise _damaged(file, "it ends inside its header")
        header = _parsed(file, opened.read(length))
        header.pop("__metadata__", None)
        reached = 0
        for name, tensor in header.items():
            match tensor:
                case {"dtype": str(), "shape": list(), "data_offsets": [int() as begin, int() as end]}:
                    pass
                case _:
                    raise _damaged(file, f"tensor {name!r:.80} is not described")
            if not 0 <= begin <= end <= size - start:
                raise _damaged(file, f"tensor {name!r:.80} ends after the file")
            reached = max(reached, end)
            # As for GGUF files: names, types, shapes, and 8 KiB of each tensor; whole files take minutes.
            digest = hashlib.sha256(json.dumps([name, tensor["dtype"], tensor["shape"]]).encode())
            for at in (begin, max(begin, end - _SAMPLE_BYTES)):
                opened.seek(start + at)
                digest.update(opened.read(min(_SAMPLE_BYTES, end - at)))
            yield _Tensor(end - begin, digest.digest())
    if start + reached != size:
        raise _damaged(file, f"{size - start - reached} bytes belong to no tensor")


def _context_length(config: Mapping[str, Any]) -> int | None:
    text = config.get("text_config")  # where a model also sees or hears
    for part in (config, text if isinstance(text, dict) else {}):
        for key in _LENGTHS:
            length = part.get(key)
            if isinstance(length, int) and length > 0:
                return length
    return None


def _json(file: Path) -> dict[str, Any]:
    if file.stat().st_size > _MAX_JSON_BYTES:
        raise _damaged(file, "it is too large")
    return _parsed(file, file.read_bytes())


def _parsed(file: Path, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"it is not JSON ({type(error).__name__})") from error
    if not isinstance(value, dict):
        raise _damaged(file, "it is not a JSON object")
    return value


def _damaged(file: Path, what: str) -> LoadFailed:
    return LoadFailed(f"{file.name} is damaged: {what}", hint="fetch it again")
