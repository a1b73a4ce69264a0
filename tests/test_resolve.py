"""From the name a user gave to the forms of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tars_core.models.resolve import ResolvedModel, resolve
from tars_core.types.errors import ModelNotFound, RequestError
from tars_core.types.models import ModelRef, OfferedModel

GGUF = ModelRef(scheme="path", rest="/wheel/demo.gguf")
SAFETENSORS = ModelRef(scheme="path", rest="/wheel/demo")
DEMO = ModelRef.parse("demo:")
OFFERED = {
    DEMO: OfferedModel(name=DEMO, refs=(GGUF, SAFETENSORS), weights_id="demo-1", notice="this is the demo model"),
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "phi.gguf"
    path.touch()
    return path


def found(
    wanted: str | None,
    aliases: Mapping[str, Sequence[str]] | None = None,
    offered: Mapping[ModelRef, OfferedModel] | None = None,
) -> ResolvedModel:
    return resolve(wanted, aliases=aliases or {}, offered=OFFERED if offered is None else offered)


def hint_of(wanted: str | None, aliases: Mapping[str, Sequence[str]] | None = None, *, demo: bool = True) -> str:
    with pytest.raises(ModelNotFound) as missing:
        found(wanted, aliases, OFFERED if demo else {})
    return f"{missing.value.message}\n{missing.value.hint}"


# ---- no name -----------------------------------------------------------------------------------


def test_no_name_is_the_demo_model_with_a_notice() -> None:
    model = found(None)
    assert (model.name, model.refs, model.notice) == ("demo:", (GGUF, SAFETENSORS), "this is the demo model")
    assert model.weights_ids == {GGUF: "demo-1", SAFETENSORS: "demo-1"}


def test_no_name_and_no_demo_model_is_an_error_that_lists_what_is_known() -> None:
    text = hint_of(None, {"tars": ["hf:microsoft/phi-2"], "small": ["ollama:phi"]}, demo=False)
    for word in ("no model was named", "TARS_MODEL", "tars-demo-model", "tars", "small"):
        assert word in text


def test_a_model_on_disk_is_never_taken_unasked(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    assert str(model.parent) not in hint_of(None, demo=False)
    assert found(None).refs == (GGUF, SAFETENSORS)


# ---- one name ----------------------------------------------------------------------------------


def test_the_demo_model_asked_for_comes_without_a_notice() -> None:
    model = found("demo:")
    assert (model.name, model.refs, model.notice) == ("demo:", (GGUF, SAFETENSORS), None)
    assert model.weights_ids[GGUF] == "demo-1"


def test_the_demo_model_asked_for_and_absent_says_what_to_install() -> None:
    assert "tars-demo-model" in hint_of("demo:", demo=False)


def test_a_file_is_its_only_form(model: Path) -> None:
    resolved = found(str(model))
    assert (resolved.name, resolved.refs) == (str(model), (ModelRef.parse(model),))
    assert (resolved.weights_ids, resolved.notice) == ({}, None)


def test_a_file_in_the_home_folder_is_found_through_the_tilde(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(model.parent))
    assert found("~/phi.gguf").refs == (ModelRef.parse(model),)


@pytest.mark.parametrize("name", ["hf:microsoft/phi-2", "ollama:phi:latest", "no-such-scheme:x"])
def test_a_reference_with_a_scheme_is_left_to_the_plugins(name: str) -> None:
    assert found(name).refs == (ModelRef.parse(name),)


def test_a_checkpoint_folder_is_a_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    assert found(str(tmp_path)).refs == (ModelRef.parse(tmp_path),)


def test_a_folder_of_gguf_files_is_refused_and_they_are_listed(tmp_path: Path) -> None:
    for number in range(7):
        (tmp_path / f"m{number}.gguf").touch()
    text = hint_of(str(tmp_path))
    assert "7 GGUF files" in text
    assert "m0.gguf, m1.gguf, m2.gguf, m3.gguf, m4.gguf" in text
    assert "m5.gguf" not in text


def test_an_empty_folder_is_refused_and_told_what_a_model_looks_like(tmp_path: Path) -> None:
    text = hint_of(str(tmp_path))
    assert "holds no model" in text
    assert "config.json" in text


@pytest.mark.parametrize("name", ["absent.gguf", "/absent/absent.gguf", "~nobody-of-this-name/m.gguf", r"C:\m.gguf"])
def test_14_a_file_that_is_not_there_is_named_with_what_is_known_here(name: str) -> None:
    text = hint_of(name, {"tars": ["ollama:phi"]})
    assert f"there is no file {name}" in text
    assert "known here: tars, demo:" in text


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "a/" * 3000], ids=["NUL", "a long name", "a long path"])
def test_24_a_name_no_file_can_have_is_simply_not_found(name: str) -> None:
    assert hint_of(name)


@pytest.mark.parametrize("name", ["", "  ", "m\ud83d.gguf"])
def test_24_a_name_that_is_none_is_a_request_error(name: str) -> None:
    with pytest.raises(RequestError):
        found(name)


# ---- aliases -----------------------------------------------------------------------------------


def test_an_alias_is_its_references_in_order(model: Path) -> None:
    resolved = found("tars", {"tars": [str(model), "ollama:phi", "hf:microsoft/phi-2"]})
    assert resolved.name == "tars"
    assert [str(ref) for ref in resolved.refs] == [str(model), "ollama:phi", "hf:microsoft/phi-2"]


def test_what_an_alias_lists_and_is_not_here_is_left_out(tmp_path: Path) -> None:
    resolved = found("tars", {"tars": [str(tmp_path / "absent.gguf"), "ollama:phi"]})
    assert [str(ref) for ref in resolved.refs] == ["ollama:phi"]


def test_an_alias_of_which_nothing_is_here_names_the_first_missing(tmp_path: Path) -> None:
    absent = [str(tmp_path / "one.gguf"), str(tmp_path / "two.gguf")]
    assert f"there is no file {absent[0]}" in hint_of("tars", {"tars": absent})


def test_an_alias_may_include_a_model_a_plugin_brings_with_its_weights() -> None:
    resolved = found("tars", {"tars": ["ollama:phi", "demo:"]})
    assert resolved.refs == (ModelRef.parse("ollama:phi"), GGUF, SAFETENSORS)
    assert resolved.weights_ids == {GGUF: "demo-1", SAFETENSORS: "demo-1"}


def test_a_form_listed_twice_is_asked_about_once() -> None:
    resolved = found("tars", {"tars": ["ollama:phi", "hf:x/y", "ollama:phi"]})
    assert [str(ref) for ref in resolved.refs] == ["ollama:phi", "hf:x/y"]


def test_an_alias_goes_before_a_file_of_that_name(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    assert found(model.name, {model.name: ["ollama:phi"]}).refs == (ModelRef.parse("ollama:phi"),)


def test_an_alias_without_references_is_named_and_not_the_demo_model() -> None:
    text = hint_of("tars", {"tars": []})
    assert "the alias tars lists no model" in text
    assert "models.tars" in text
