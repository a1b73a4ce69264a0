"""What ``import tars_core`` promises."""

from __future__ import annotations

import importlib.metadata
import inspect
import subprocess
import sys

import msgspec
import pytest

import tars_core
from tars_core import plugin
from tars_core.types import errors, failures

HEAVY = (
    "pydantic",
    "pydantic_settings",
    "asyncio",
    "jinja2",
    "click",
    "rich",
    "pluggy",
    "torch",
    "transformers",
    "llama_cpp",
    "xllamacpp",
    "ollama",
)
ERRORS = {
    name: value
    for module in (errors, failures)
    for name, value in vars(module).items()
    if inspect.isclass(value) and issubclass(value, errors.TarsError)
}
STRUCTS = {
    name: value
    for module in (tars_core, plugin)
    for name in module.__all__
    if inspect.isclass(value := getattr(module, name)) and issubclass(value, msgspec.Struct)
}


def imported_by(statement: str) -> set[str]:
    """Return the top-level modules that ``statement`` imports in a fresh interpreter."""
    script = f"import sys\nbefore = set(sys.modules)\n{statement}\nprint(*sys.modules.keys() - before)"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in ran.stdout.split()}


@pytest.mark.parametrize("name", tars_core.__all__)
def test_every_exported_name_resolves(name: str) -> None:
    assert getattr(tars_core, name) is getattr(tars_core, name)


def test_the_exported_names_are_sorted_listed_once_and_what_dir_shows() -> None:
    assert sorted(set(tars_core.__all__)) == tars_core.__all__ == dir(tars_core)


def test_a_name_that_is_not_exported_is_an_attribute_error_that_names_it() -> None:
    with pytest.raises(AttributeError, match="no attribute 'InferenceEngin'"):
        _ = tars_core.InferenceEngin  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", plugin.__all__)
def test_every_name_a_plugin_author_needs_resolves(name: str) -> None:
    assert hasattr(plugin, name)


def test_the_version_is_the_installed_one() -> None:
    assert tars_core.__version__ == importlib.metadata.version("tars-core")


def test_importing_the_package_imports_nothing_heavy() -> None:
    imported = imported_by("import tars_core")
    assert "tars_core" in imported
    assert not imported.intersection(HEAVY)


def test_errors_events_and_types_come_without_the_engine() -> None:
    imported = imported_by("from tars_core import AllBackendsFailed, Message, ModelRef, RequestError, TextDelta")
    assert not imported.intersection(HEAVY)


def test_importing_the_engine_and_the_plugin_contract_imports_no_runtime() -> None:
    imported = imported_by("import tars_core.plugin\nfrom tars_core import InferenceEngine")
    assert {"pluggy", "asyncio"} <= imported
    assert not imported.intersection({"torch", "transformers", "llama_cpp", "xllamacpp", "ollama"})


@pytest.mark.parametrize("kind", STRUCTS.values(), ids=STRUCTS)
def test_what_crosses_a_seam_is_frozen_and_keyword_only(kind: type[msgspec.Struct]) -> None:
    assert kind.__struct_config__.frozen
    with pytest.raises(TypeError, match="positional"):
        kind("one", "two")


# ---- errors ------------------------------------------------------------------------------------


def drawn() -> dict[str, str | None]:
    """Read the tree in the docstring of ``tars_core.types.errors``: each error with the one it is drawn under."""
    tree: dict[str, str | None] = {}
    above: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        words = line.replace("│", " ").replace("├── ", "    ").replace("└── ", "    ").split()
        if not words or not (words[0] == "TarsError" or "── " in line):
            continue
        name = words[0]
        indent = line.index(name)
        while above and above[-1][0] >= indent:
            above.pop()
        tree[name] = above[-1][1] if above else None
        above.append((indent, name))
    return tree


def test_every_error_is_drawn_in_the_tree_under_the_one_it_derives_from() -> None:
    bases = {
        name: next((b.__name__ for b in kind.__bases__ if b.__name__ in ERRORS), None) for name, kind in ERRORS.items()
    }
    assert drawn() == bases


def test_every_error_is_exported_and_says_what_it_means() -> None:
    assert set(ERRORS) <= set(tars_core.__all__)
    assert all(kind.__doc__ for kind in ERRORS.values())


def test_an_error_reads_as_what_happened_and_the_next_step() -> None:
    error = errors.LoadFailed("needs 5.1 GiB, 3.8 free", hint="try a smaller model")
    assert str(error) == "needs 5.1 GiB, 3.8 free\n  → try a smaller model"
    assert str(errors.LoadFailed("no")) == "no"


@pytest.mark.parametrize(
    ("returncode", "how", "hint"),
    [
        (-11, "was killed by SIGSEGV", None),
        (-9, "was killed by SIGKILL", "likely out of memory: try a smaller model"),
        (-250, "was killed by signal 250", None),
        (3, "ended with exit code 3", None),
        (0, "ended with exit code 0", None),
        (None, "closed its connection", None),
    ],
)
def test_1_a_dead_worker_is_told_with_its_signal_or_exit_code_and_last_words(
    returncode: int | None, how: str, hint: str | None
) -> None:
    error = errors.WorkerDied(returncode=returncode, stderr_tail="one\ntwo\nthree\nfour\n")
    assert error.message == f"the backend's process {how}\n  | two\n  | three\n  | four"
    assert error.hint == hint


def test_a_deadline_names_the_setting_that_raises_it() -> None:
    error = errors.DeadlineExceeded(stage="first token", limit_s=0.5)
    assert (error.message, error.hint) == (
        "no progress within 0.5 s (first token)",
        "raise limits.first_token_s if the machine is only slow",
    )


def test_a_backend_that_is_unavailable_says_why_for_each_asked() -> None:
    error = errors.BackendUnavailable("no backend can run it", reasons={"a": "no file", "b": "no daemon"}, hint="x")
    assert error.message == "no backend can run it\n  a: no file\n  b: no daemon"
    assert error.reasons == {"a": "no file", "b": "no daemon"}


@pytest.mark.parametrize("kind", [errors.RequestError, errors.ConfigError])
def test_what_the_caller_got_wrong_is_a_value_error_too(kind: type[Exception]) -> None:
    assert issubclass(kind, ValueError)
