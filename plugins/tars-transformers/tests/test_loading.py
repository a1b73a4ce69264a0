"""Loading and the loop, step by step and in this process."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
import torch

import tars_demo_model
from tars_core.plugin import (
    BackendEvent,
    Finished,
    GenerateRequest,
    GenerationFailed,
    LoadFailed,
    LoadOptions,
    ModelRef,
    OutOfMemory,
    Progress,
    SamplingParams,
    TextDelta,
)
from tars_transformers import plugin
from tars_transformers.generate import Network, TransformersModel

WEIGHTS = tars_demo_model.WEIGHTS
OPTIONS = LoadOptions(threads=1)
UNIT = "<|im_end|>"


def _load(folder: Path = WEIGHTS, options: LoadOptions = OPTIONS, told: list[str] | None = None) -> TransformersModel:
    notes = [] if told is None else told
    loaded = plugin.tars_load(
        model=ModelRef.parse(folder),
        options=options,
        progress=lambda _fraction, note: notes.append(note),
        cancel=threading.Event(),
    )
    assert isinstance(loaded, TransformersModel)
    return loaded


@pytest.fixture(scope="module")
def model() -> TransformersModel:
    return _load()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a copy of the demo model's folder."""
    copy = tmp_path / "copy"
    shutil.copytree(WEIGHTS, copy, ignore=shutil.ignore_patterns("*.gguf"))
    return copy


def _change(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **changes}), "utf-8")


def _request(prompt: str, max_tokens: int = 20) -> GenerateRequest:
    return GenerateRequest(prompt=prompt, sampling=SamplingParams(temperature=0, max_tokens=max_tokens))


def _prepared(model: TransformersModel, request: GenerateRequest) -> GenerateRequest:
    """Prepare a request as the core does: with its tokens, and the answer bounded by the room they leave."""
    tokens = tuple(model.tokenize(request.prompt))
    room = model.context_length - len(tokens)
    sampling = msgspec.structs.replace(request.sampling, max_tokens=min(request.sampling.max_tokens, room))
    return msgspec.structs.replace(request, tokens=tokens, sampling=sampling)


def _run(
    model: TransformersModel, request: GenerateRequest, cancel: threading.Event | None = None
) -> list[BackendEvent]:
    prepared = _prepared(model, request)
    return list(plugin.tars_generate(loaded=model, request=prepared, cancel=cancel or threading.Event()))


def _text(events: Sequence[BackendEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


class TestLoading:
    def test_tells_what_it_is_at(self) -> None:
        told: list[str] = []
        _load(told=told)
        assert told == [
            "importing torch",
            "importing transformers",
            "reading the tokenizer of weights",
            "loading weights",
            "moving weights to cpu",
        ]

    @pytest.mark.parametrize(("wanted", "given"), [(None, 512), (64, 64), (10_000, 512)])
    def test_keeps_the_context_within_the_models_own(self, wanted: int | None, given: int) -> None:
        loaded = _load(options=msgspec.structs.replace(OPTIONS, context_length=wanted))
        assert loaded.context_length == given
        end = _run(loaded, _request(UNIT * (given - 2), max_tokens=2**40))[-1]
        assert isinstance(end, Finished)
        assert end.usage.completion_tokens <= 2

    def test_refuses_a_model_that_lacks_tensors_instead_of_running_on_random_numbers(self, folder: Path) -> None:
        _change(folder / "config.json", num_hidden_layers=5)
        with pytest.raises(LoadFailed, match=r"copy lacks \d+ of its model's tensors: model\.layers\.4"):
            _load(folder)

    def test_refuses_a_task_that_it_cannot_do(self) -> None:
        with pytest.raises(LoadFailed, match="transformers does not support the task 'embed'"):
            _load(options=LoadOptions(task="embed"))

    def test_gives_transformers_own_words_for_what_it_cannot_load(self, folder: Path) -> None:
        _change(folder / "config.json", model_type="xlama", architectures=[])
        with pytest.raises(LoadFailed, match=r"transformers cannot load copy: .*xlama"):
            _load(folder)

    def test_refuses_a_tokenizer_that_brings_code(self, folder: Path) -> None:
        (folder / "tokenizer.py").write_text("raise SystemExit('it ran')")
        code = {"AutoTokenizer": ["tokenizer.Evil", None]}
        _change(folder / "tokenizer_config.json", auto_map=code, tokenizer_class="Evil")
        with pytest.raises(LoadFailed, match="transformers cannot load copy"):
            _load(folder)

    def test_reaches_for_no_network_and_runs_nothing_of_the_checkpoint(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reached: list[object] = []
        monkeypatch.setattr("socket.getaddrinfo", lambda *address, **_: reached.append(address))
        for name in ("custom_generate/generate.py", "modeling_llama.py", "tokenization_llama.py"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("raise SystemExit('it ran')")
        (folder / "pytorch_model.bin").write_bytes(b"not read")
        assert _text(_run(_load(folder), _request("Hola")))
        assert reached == []

    def test_stops_when_it_is_cancelled(self) -> None:
        cancel = threading.Event()
        cancel.set()
        with pytest.raises(LoadFailed, match="loading weights was cancelled"):
            plugin.tars_load(model=ModelRef.parse(WEIGHTS), options=OPTIONS, progress=lambda *_: None, cancel=cancel)

    def test_keeps_the_checkpoints_own_number_format(self, folder: Path) -> None:
        _change(folder / "config.json", dtype="bfloat16")
        loaded = _load(folder)
        assert loaded._network.native.dtype is torch.bfloat16
        assert _text(_run(loaded, _request("Hola")))

    @pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
    def test_ends_answers_at_every_token_the_checkpoint_lists(self, folder: Path, file: str) -> None:
        first = next(e.token_ids[0] for e in _run(_load(), _request("Hola")) if isinstance(e, TextDelta))
        _change(folder / file, eos_token_id=[2, first])
        events = _run(_load(folder), _request("Hola"))
        assert [type(event) for event in events] == [Finished]


class TestAGPU:
    """There is none where the tests run: ``cuda:0`` stands for the CPU here, and for its refusals."""

    @pytest.fixture(autouse=True)
    def _pretend(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.empty_cache", lambda: None)

    def _refuse(self, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        real = torch.nn.Module.to

        def to(module: torch.nn.Module, device: str) -> torch.nn.Module:
            if device != "cpu":
                raise error
            return real(module, device)

        monkeypatch.setattr("transformers.PreTrainedModel.to", to)

    def test_without_the_memory_is_left_for_the_cpu_which_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._refuse(monkeypatch, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
        told: list[str] = []
        assert _load(told=told).device == "cpu"
        assert told[-2:] == ["moving weights to cuda:0", "moving weights to cpu"]

    def test_that_was_asked_for_is_not_left(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._refuse(monkeypatch, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
        with pytest.raises(OutOfMemory, match="weights does not fit the memory: CUDA out of memory"):
            _load(options=msgspec.structs.replace(OPTIONS, device="gpu"))

    def test_with_another_fault_is_not_left_silently(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._refuse(monkeypatch, RuntimeError("CUDA error: no kernel image is available for execution on the device"))
        with pytest.raises(LoadFailed, match="no kernel image"):
            _load()

    def test_is_not_touched_where_the_cpu_was_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._refuse(monkeypatch, AssertionError())
        assert _load(options=msgspec.structs.replace(OPTIONS, device="cpu")).device == "cpu"


def test_a_gpu_that_is_asked_for_and_not_there_is_an_error() -> None:
    with pytest.raises(LoadFailed, match="finds no GPU here"):
        _load(options=msgspec.structs.replace(OPTIONS, device="gpu"))


class TestTheLoop:
    def test_reads_a_prompt_in_pieces_and_tells_after_each(self, model: TransformersModel) -> None:
        events = _run(model, _request(UNIT * 510))
        assert [event.prompt_tokens_done for event in events if isinstance(event, Progress)] == [256]
        assert isinstance(events[-1], Finished)

    def test_reads_in_pieces_what_it_would_read_at_once(
        self, model: TransformersModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        at_once = _text(_run(model, _request("<|im_start|>user\nWhat is TARS?<|im_end|>\n<|im_start|>assistant\n")))
        monkeypatch.setattr("tars_transformers.generate._PROMPT_TOKENS_A_STEP", 3)
        pieces = _text(_run(model, _request("<|im_start|>user\nWhat is TARS?<|im_end|>\n<|im_start|>assistant\n")))
        assert pieces == at_once

    def test_gives_a_model_with_a_recurrent_state_its_prompt_whole(
        self, model: TransformersModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(model._network, "divisible", False)
        assert not [e for e in _run(model, _request(UNIT * 500)) if isinstance(e, Progress)]

    @pytest.mark.parametrize("after", [0, 1, 5])
    def test_stops_within_a_token_of_a_cancel(
        self, model: TransformersModel, monkeypatch: pytest.MonkeyPatch, after: int
    ) -> None:
        monkeypatch.setattr(model, "_ends", frozenset())
        cancel = threading.Event()
        wild = SamplingParams(temperature=10, top_k=0, top_p=1, max_tokens=400, seed=1)
        request = _prepared(model, GenerateRequest(prompt="a", sampling=wild))
        events = plugin.tars_generate(loaded=model, request=request, cancel=cancel)
        for _ in range(after):
            next(iter(events))
        cancel.set()
        (last,) = list(events)
        assert isinstance(last, Finished)
        assert last.finish_reason == "cancelled"
        assert last.usage.prompt_tokens == 1
        assert after <= last.usage.completion_tokens <= after * 4  # some tokens are parts of a character

    def test_goes_on_to_the_end_of_the_context_where_max_tokens_is_huge(
        self, model: TransformersModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(model, "_ends", frozenset())
        last = _run(model, _request(UNIT * 500, max_tokens=2**40))[-1]
        assert isinstance(last, Finished)
        assert (last.finish_reason, last.usage.completion_tokens) == ("length", 12)

    def test_runs_out_of_memory_with_a_typed_error(
        self, model: TransformersModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def forward(*_: object) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(Network, "forward", forward)
        with pytest.raises(GenerationFailed, match="no memory left after 0 tokens"):
            _run(model, _request("Hola"))
