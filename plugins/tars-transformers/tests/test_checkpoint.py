"""What is refused before anything is loaded, and what a probe says. No runtime is imported here."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tars_demo_model
from tars_core import BackendUnavailable, InferenceEngine
from tars_core.plugin import BASIC_FEATURES, LoadFailed, ModelRef, ProbeLimits, ProbeReport
from tars_transformers import checkpoint, plugin

WEIGHTS = tars_demo_model.WEIGHTS
NAME = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a copy of the demo model's folder."""
    copy = tmp_path / "copy"
    shutil.copytree(WEIGHTS, copy, ignore=shutil.ignore_patterns("*.gguf"))
    return copy


def _probe(model: Path | str) -> ProbeReport | None:
    return plugin.tars_probe(model=ModelRef.parse(model), limits=ProbeLimits())


def _refused(model: Path | str) -> str:
    report = _probe(model)
    assert report is not None
    assert not report.available
    return str(report.reason)


def _change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, **changes}), "utf-8")


def _split(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / NAME).rename(folder / "part.safetensors")
    (folder / f"{NAME}.index.json").write_text(json.dumps({"weight_map": weight_map}))


class TestAProbe:
    def test_tells_what_the_files_say(self) -> None:
        report = _probe(WEIGHTS)
        assert report is not None
        assert (report.available, report.context_length) == (True, 512)
        assert report.features == BASIC_FEATURES | {"token_ids", "tokenize"}
        assert report.memory_bytes is not None
        assert report.memory_bytes > (WEIGHTS / NAME).stat().st_size
        assert (report.weights_id or "").startswith("safetensors:")

    @pytest.mark.parametrize("model", [WEIGHTS / "tars-demo.gguf", WEIGHTS.parent, "ollama:phi", "hf:a/b:c.gguf"])
    def test_leaves_other_kinds_to_others(self, model: Path | str) -> None:
        assert _probe(model) is None

    def test_knows_equal_weights_however_they_are_packed(self, folder: Path) -> None:
        whole, (size,) = (folder / NAME).read_bytes(), struct.unpack("<Q", (folder / NAME).read_bytes()[:8])
        header = json.loads(whole[8 : 8 + size])
        again = json.dumps({**dict(reversed(header.items())), "__metadata__": {"format": "pt"}}, indent=1).encode()
        (folder / NAME).write_bytes(struct.pack("<Q", len(again)) + again + whole[8 + size :])
        assert checkpoint.inspect(folder).weights_id == checkpoint.inspect(WEIGHTS).weights_id

    def test_knows_other_weights(self, folder: Path) -> None:
        data = bytearray((folder / NAME).read_bytes())
        data[-1] ^= 1
        (folder / NAME).write_bytes(data)
        assert checkpoint.inspect(folder).weights_id != checkpoint.inspect(WEIGHTS).weights_id

    @pytest.mark.parametrize(
        ("config", "length"),
        [
            ({"n_positions": 1024}, 1024),
            ({"text_config": {"max_position_embeddings": 4096}}, 4096),
            ({"max_position_embeddings": "many"}, None),
        ],
    )
    def test_finds_the_context_under_its_many_names(
        self, folder: Path, config: dict[str, Any], length: int | None
    ) -> None:
        (folder / "config.json").write_text(json.dumps(config))
        assert checkpoint.inspect(folder).context_length == length

    @pytest.mark.parametrize(
        ("version", "device"), [("2.13.0+cpu", "cpu"), ("2.13.0", "cuda"), ("2.13.0+cu130", "cuda")]
    )
    def test_guesses_the_device_from_the_build_and_the_driver(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str, device: str
    ) -> None:
        monkeypatch.setattr("tars_transformers.plugin.importlib.metadata.version", lambda _name: version)
        monkeypatch.setattr("tars_transformers.plugin._NVIDIA", tmp_path)
        report = plugin.tars_probe(model=None, limits=ProbeLimits())
        assert report is not None
        assert report.device == device

    def test_without_its_runtime_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(name: str) -> str:
            raise importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr("tars_transformers.plugin.importlib.metadata.version", missing)
        with InferenceEngine(model=WEIGHTS, plugins="transformers") as engine:
            with pytest.raises(BackendUnavailable, match="pip install torch transformers"):
                engine.generate("hola")
            (status,) = engine.backends()
        assert (status.available, status.reason) == (False, "the package torch is not installed")


class TestRefused:
    @pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
    def test_are_pickles_which_can_run_code(self, folder: Path, name: str) -> None:
        (folder / NAME).rename(folder / name)
        assert "pickle checkpoints can run code" in _refused(folder)
        with InferenceEngine(model=folder, plugins="transformers") as engine, pytest.raises(BackendUnavailable):
            engine.generate("hola")

    def test_are_not_pickles_that_lie_beside_safetensors(self, folder: Path) -> None:
        (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
        report = _probe(folder)
        assert report is not None
        assert report.available

    def test_is_code_that_the_checkpoint_brings(self, folder: Path) -> None:
        _change_config(folder, auto_map={"AutoModelForCausalLM": "modeling.Evil"})
        (folder / "modeling.py").write_text("raise SystemExit('it ran')")
        assert "brings Python code of its own" in _refused(folder)

    @pytest.mark.parametrize(
        "changes", [{"architectures": ["BertForMaskedLM"]}, {"architectures": ["T5Model"], "is_encoder_decoder": True}]
    )
    def test_are_models_that_do_not_continue_a_text(self, folder: Path, changes: dict[str, object]) -> None:
        _change_config(folder, **changes)
        assert "not a causal language model" in _refused(folder)

    @pytest.mark.parametrize("keep", [0, 7, 10, 1000, -100])
    def test_are_truncated_weights(self, folder: Path, keep: int) -> None:
        (folder / NAME).write_bytes((folder / NAME).read_bytes()[:keep])
        assert f"{NAME} is damaged" in _refused(folder)

    def test_is_a_folder_without_weights(self, folder: Path) -> None:
        (folder / NAME).unlink()
        assert "has no model.safetensors" in _refused(folder)

    def test_is_a_missing_part(self, folder: Path) -> None:
        _split(folder, {"a": "part.safetensors", "b": "other.safetensors"})
        assert "lacks 1 of 2 parts of its weights: other.safetensors" in _refused(folder)

    @pytest.mark.parametrize("part", ["../part.safetensors", "/etc/passwd"])
    def test_is_a_part_outside_the_folder(self, folder: Path, part: str) -> None:
        _split(folder, {"a": part})
        assert "it names" in _refused(folder)

    @pytest.mark.parametrize("data", [b"", b"[]", b"[" * 100_000, b"\xff"])
    def test_is_a_configuration_that_is_none(self, folder: Path, data: bytes) -> None:
        (folder / "config.json").write_bytes(data)
        assert "config.json is damaged" in _refused(folder)


@given(
    st.dictionaries(
        st.text(max_size=3),
        st.one_of(
            st.none(),
            st.fixed_dictionaries(
                {"dtype": st.just("F32"), "shape": st.just([1])},
                optional={
                    "data_offsets": st.lists(st.one_of(st.integers(-9, 2**70), st.floats(), st.text()), max_size=3)
                },
            ),
        ),
        max_size=3,
    ),
    st.binary(max_size=20),
)
def test_no_header_does_more_than_be_refused(
    tmp_path_factory: pytest.TempPathFactory, header: dict[str, object], data: bytes
) -> None:
    folder = tmp_path_factory.mktemp("garbled")
    head = json.dumps(header).encode()
    (folder / NAME).write_bytes(struct.pack("<Q", len(head)) + head + data)
    (folder / "config.json").write_text("{}")
    try:
        assert checkpoint.inspect(folder).tensor_bytes <= len(data) * 3
    except LoadFailed as error:
        assert "is damaged" in error.message  # noqa: PT017 - either way is right
