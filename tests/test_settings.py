"""Settings: which source wins, and what an error names."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tars_core import InferenceEngine
from tars_core.config.gather import load_settings
from tars_core.config.settings import KEYS, Settings, user_file
from tars_core.types.errors import ConfigError

WriteUserFile = Callable[[str | bytes], Path]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.fixture
def write_user_file() -> WriteUserFile:
    def write(content: str | bytes) -> Path:
        path = user_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return an empty folder that the command line was called in."""
    path = tmp_path / "project"
    path.mkdir()
    return path


def load(**arguments: object) -> Settings:
    return load_settings(arguments)


def refusal(arguments: dict[str, object] | None = None, *, file: Path | None = None) -> ConfigError:
    with pytest.raises(ConfigError) as refused:
        load_settings(arguments or {}, file=file)
    return refused.value


# ---- which source wins -------------------------------------------------------------------------


def test_without_any_source_everything_has_its_default() -> None:
    settings = load()
    assert settings == Settings()
    assert (settings.model, settings.device, settings.concurrency, settings.allow_download) == (None, "auto", 4, False)
    assert settings.limits.total_s == 900


def test_an_argument_wins_over_the_environment_that_over_a_named_file_that_over_the_users_that_over_the_default(
    monkeypatch: pytest.MonkeyPatch, write_user_file: WriteUserFile, tmp_path: Path
) -> None:
    write_user_file("model = 'user'\nbackend = 'user'\ndevice = 'gpu'\nthreads = 5")
    named = tmp_path / "named.toml"
    named.write_text("model = 'named'\nbackend = 'named'\ndevice = 'cpu'")
    monkeypatch.setenv("TARS_MODEL", "environment")
    monkeypatch.setenv("TARS_BACKEND", "environment")
    settings = load_settings({"model": "argument"}, file=named)
    assert settings.model == "argument"
    assert settings.backend == "environment"
    assert settings.device == "cpu"
    assert settings.threads == 5
    assert settings.concurrency == 4


def test_nested_settings_and_aliases_come_together_from_all_sources(
    monkeypatch: pytest.MonkeyPatch, write_user_file: WriteUserFile
) -> None:
    write_user_file("[limits]\nload_s = 1\ntotal_s = 2\nprobe_s = 3\n[models]\nmine = ['hf:a/b']\nother = ['hf:c/d']")
    monkeypatch.setenv("TARS_LIMITS__TOTAL_S", "20")
    monkeypatch.setenv("TARS_LIMITS__PROBE_S", "30")
    settings = load(limits={"probe_s": 300}, models={"mine": ["ollama:x"]})
    limits = settings.limits
    assert (limits.load_s, limits.total_s, limits.probe_s, limits.first_token_s) == (1, 20, 300, 120)
    assert settings.models == {"mine": ("ollama:x",), "other": ("hf:c/d",)}


def test_variables_are_read_in_any_case_and_nested_ones_as_parts_or_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("tars_model", "phi.gguf")
    monkeypatch.setenv("TARS_LIMITS", '{"load_s": 7}')
    monkeypatch.setenv("TARS_MODELS", '{"tars": ["a.gguf", "ollama:phi"]}')
    settings = load()
    assert (settings.model, settings.limits.load_s) == ("phi.gguf", 7)
    assert settings.models == {"tars": ("a.gguf", "ollama:phi")}


def test_a_variable_lists_names_with_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TARS_PREFER", "ollama, xllamacpp,")
    assert load().prefer == ("ollama", "xllamacpp")
    assert load(prefer=["llamacpp"]).prefer == ("llamacpp",)


def test_a_file_of_the_current_folder_is_read_only_where_the_command_line_asks(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / ".env").write_text("TARS_MODEL=dotenv\n")
    (folder / "tars.toml").write_text("model = 'toml'\nbackend = 'toml'\n")
    (folder / "pyproject.toml").write_text("[tool.tars]\nmodel = 'pyproject'\nbackend = 'pyproject'\nthreads = 3\n")
    monkeypatch.chdir(folder)
    assert load() == Settings()
    settings = load_settings({}, folder=folder)
    assert (settings.model, settings.backend, settings.threads) == ("dotenv", "toml", 3)


def test_every_value_knows_where_it_came_from(monkeypatch: pytest.MonkeyPatch, write_user_file: WriteUserFile) -> None:
    path = write_user_file("device = 'cpu'\n[limits]\ntotal_s = 9")
    monkeypatch.setenv("TARS_LIMITS__LOAD_S", "5")
    settings = load(model="x")
    origins = [settings.origin(key) for key in ("model", "limits.load_s", "device", "limits.total_s", "threads")]
    assert origins == ["argument", "environment variable TARS_LIMITS__LOAD_S", str(path), str(path), "default"]


# ---- permitting and forbidding -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["use_llama_cpp", "use_llamacpp", "use_LlamaCpp"])
def test_use_with_false_forbids_the_backend_however_its_name_is_written(name: str) -> None:
    settings = load(**{name: False})
    assert settings.forbids("llamacpp")
    assert settings.forbids("llama_cpp")
    assert not settings.forbids("xllamacpp")


def test_use_with_true_permits() -> None:
    assert not load(use_llama_cpp=True).forbids("llamacpp")
    assert not load().forbids("llamacpp")


def test_a_backend_forbidden_in_the_file_or_the_environment_is_permitted_by_an_argument(
    monkeypatch: pytest.MonkeyPatch, write_user_file: WriteUserFile
) -> None:
    write_user_file("[use]\nllamacpp = false\nollama = false")
    monkeypatch.setenv("TARS_USE__LLAMA_CPP", "false")
    assert load().forbids("llamacpp")
    settings = load(use_llama_cpp=True)
    assert not settings.forbids("llamacpp")
    assert settings.forbids("ollama")


def test_use_as_a_table_and_as_keywords_go_together() -> None:
    settings = load(use={"ollama": False}, use_llamacpp=False)
    assert settings.forbids("ollama")
    assert settings.forbids("llamacpp")


@pytest.mark.parametrize("value", ["no", 0, None])
def test_use_takes_only_true_or_false(value: object) -> None:
    assert (
        refusal({"use_ollama": value}).message == f"setting use_ollama (argument): {value!r} is neither True nor False"
    )


# ---- unknown keys ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "nearest"), [("modle", "model"), ("prefers", "prefer"), ("gpu_layer", "gpu_layers"), ("Device", "device")]
)
def test_an_unknown_argument_is_named_with_the_nearest_known_one(key: str, nearest: str) -> None:
    error = refusal({key: "x"})
    assert error.message == f"unknown setting {key} (argument)"
    assert error.hint == f"did you mean {nearest}?"


def test_an_unknown_key_like_none_is_answered_with_all_there_are() -> None:
    hint = refusal({"quux": "x"}).hint or ""
    assert hint.startswith("known: ")
    assert set(KEYS) <= set(hint.removeprefix("known: ").split(", "))


def test_an_unknown_key_in_a_file_is_named_with_the_file(write_user_file: WriteUserFile, tmp_path: Path) -> None:
    named = tmp_path / "named.toml"
    named.write_text("thread = 3")
    error = refusal(file=named)
    assert (error.message, error.hint) == (f"unknown setting thread ({named})", "did you mean threads?")
    path = write_user_file("[limits]\nload = 3")
    error = refusal()
    assert (error.message, error.hint) == (f"unknown setting limits.load ({path})", "did you mean limits.load_s?")
    write_user_file("[limit]\nload_s = 3")
    error = refusal()
    assert (error.message, error.hint) == (f"unknown setting limit ({path})", "did you mean limits?")


@pytest.mark.parametrize(
    ("variable", "nearest"), [("TARS_MODLE", "TARS_MODEL"), ("TARS_LIMITS__LOAD", "limits.load_s")]
)
def test_an_unknown_variable_is_named_with_the_nearest_known_one(
    variable: str, nearest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "3")
    error = refusal()
    assert variable in error.message
    assert error.hint == f"did you mean {nearest}?"


def test_another_programs_variable_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TARS_HOME_ASSISTANT_URL", "x")
    assert load() == Settings()


@pytest.mark.parametrize("key", ["_env_file", "_cli_parse_args", "_case_sensitive", "_secrets_dir", "origins"])
def test_the_options_of_the_library_underneath_are_no_settings(key: str) -> None:
    assert f"unknown setting {key}" in refusal({key: True}).message


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"config": {1: 2}}, "settings have names, not 1"),
        ({"model": 5}, "model must be a path or a name, not 5"),
        ({"settings_file": 5}, "settings_file must be a path or a name, not 5"),
        ({"config": {"use": 5}, "use_alpha": False}, r"setting use \(argument\): 5"),
    ],
    ids=str,
)
def test_an_engine_refuses_arguments_of_the_wrong_type(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        InferenceEngine(**arguments)


# ---- values that cannot be meant ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("threads", "many"),
        ("threads", 0),
        ("threads", 1.5),
        ("threads", {"count": 2}),
        ("concurrency", None),
        ("max_queue", -1),
        ("gpu_layers", -2),
        ("context_length", 0),
        ("device", "tpu"),
        ("require_device", "cpu"),
        ("isolation", "some"),
        ("allow_download", "perhaps"),
        ("model", 5),
        ("models", ["a"]),
        ("models", {"tars": 5}),
        ("plugins", 5),
        ("use", {"ollama": "perhaps"}),
        ("prefer", 5),
        ("limits", 5),
        ("limits", {"load_s": 0}),
        ("limits", {"load_s": float("nan")}),
        ("limits", {"load_s": float("inf")}),
        ("limits", {"load_s": "soon"}),
    ],
)
def test_a_value_that_cannot_be_meant_names_key_and_origin(key: str, value: object) -> None:
    message = refusal({key: value}).message
    assert message.startswith(f"setting {key}")
    assert "(argument): " in message
    assert "should" in message or "None" in message


def test_a_bad_value_in_the_environment_is_named_with_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TARS_THREADS", "many")
    message = refusal().message
    assert message.startswith("setting threads (environment variable TARS_THREADS): 'many' should be a valid integer")


@pytest.mark.parametrize(
    ("variable", "value"), [("TARS_LIMITS__LOAD_S", "-1"), ("TARS_LIMITS", '{"load_s": -1}')], ids=["part", "JSON"]
)
def test_a_bad_nested_value_in_the_environment_is_named_with_its_variable(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    message = refusal({"limits": {"total_s": 5}}).message
    assert f"setting limits.load_s (environment variable {variable}): " in message


def test_a_bad_value_in_the_users_file_is_named_with_the_file(write_user_file: WriteUserFile) -> None:
    path = write_user_file("[limits]\ntotal_s = -1")
    assert f"setting limits.total_s ({path}): -1 should be greater than 0" in refusal({"limits": {"load_s": 5}}).message


def test_a_folders_file_that_cannot_be_read_is_named(folder: Path) -> None:
    for name in ("pyproject.toml", "tars.toml", ".env"):
        (folder / name).write_bytes(b"model = '\xff'")
        with pytest.raises(ConfigError, match="cannot be read") as refused:
            load_settings({}, folder=folder)
        assert str(folder / name) in refused.value.message


@pytest.mark.parametrize("variable", ["TARS_LIMITS", "TARS_MODELS", "TARS_USE"])
def test_a_variable_that_is_no_json_is_an_error_that_names_the_setting(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, '{"load_s": ')
    message = refusal().message
    assert variable.removeprefix("TARS_").lower() in message
    assert "environment" in message


@pytest.mark.parametrize(
    "content",
    ["model = ", "model 'x'", "[limits", "model = 'a'\nmodel = 'b'", b"model = '\xff'", b"\xff\xfem\x00"],
    ids=["no value", "no equals sign", "open table", "twice", "no UTF-8", "UTF-16"],
)
def test_a_file_that_is_no_toml_is_an_error_that_names_it(content: str | bytes, write_user_file: WriteUserFile) -> None:
    path = write_user_file(content)
    assert str(path) in str(refusal())


def test_18_a_file_that_cannot_be_looked_for_is_a_settings_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", "/" + "x" * 5000)
    assert "cannot be read" in refusal().message


def test_a_file_the_caller_names_must_exist(tmp_path: Path) -> None:
    assert refusal(file=tmp_path / "absent.toml").message == f"there is no settings file {tmp_path / 'absent.toml'}"


def test_settings_cannot_be_changed_afterwards() -> None:
    settings = load()
    with pytest.raises(AttributeError, match="cannot assign"):
        settings.threads = 2  # type: ignore[misc]
    with pytest.raises(AttributeError, match="cannot assign"):
        settings.limits.load_s = 2  # type: ignore[misc]


def test_an_alias_of_one_reference_needs_no_list_and_plugins_may_be_one(write_user_file: WriteUserFile) -> None:
    write_user_file("plugins = ['llamacpp', '-ollama']\n[models]\nmine = 'a.gguf'")
    settings = load()
    assert settings.models == {"mine": ("a.gguf",)}
    assert settings.plugins == "llamacpp,-ollama"


def test_who_sets_nothing_does_not_pay_for_importing_pydantic() -> None:
    script = """
import sys
from tars_core.config.gather import load_settings
load_settings({})
print('pydantic' in sys.modules)
"""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TARS_")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "False"


def test_a_variable_may_forbid_a_backend_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TARS_USE_LLAMA_CPP", "false")
    settings = load_settings({})
    assert settings.forbids("llamacpp")
    assert settings.origin("use.llamacpp") == "environment variable"


def test_a_variable_with_one_underscore_too_few_is_told_the_right_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TARS_LIMITS_LOAD_S", "60")
    with pytest.raises(ConfigError) as caught:
        load_settings({})
    assert caught.value.hint == "did you mean TARS_LIMITS__LOAD_S?"


def test_a_file_may_forbid_a_backend_with_the_keyword_that_the_engine_takes(write_user_file: WriteUserFile) -> None:
    path = write_user_file("use_llama_cpp = false")
    assert load().forbids("llamacpp")
    write_user_file("use_llama_cpp = 5")
    assert f"setting use.llamacpp ({path})" in refusal().message


def test_an_empty_variable_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TARS_CONCURRENCY", "")
    monkeypatch.setenv("TARS_MODEL", "")
    assert load() == Settings()


def test_what_is_wrong_in_a_dotenv_file_is_told_of_that_file(folder: Path) -> None:
    (folder / ".env").write_text("TARS_MODLE=x\n")
    with pytest.raises(ConfigError, match=r"unknown setting TARS_MODLE \(.*/\.env\)"):
        load_settings({}, folder=folder)
