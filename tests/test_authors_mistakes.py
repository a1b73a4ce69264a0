"""What a plugin's author is told of a mistake: the plugin, the rule, the line, and the fix; in every command alike."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tars_core import AllBackendsFailed, BackendUnavailable, InferenceEngine, StreamInterrupted, TarsError
from tars_core.plugin import (
    BackendEvent,
    Finished,
    LoadedModel,
    ProbeReport,
    TextDelta,
    Usage,
    hookimpl,
)

Install = Callable[..., None]
GOOD = """
from tars_core.plugin import *

@hookimpl
def tars_probe(model):
    return ProbeReport(available=True)

@hookimpl
def tars_load(model):
    return LoadedModel(device="cpu", context_length=100)
"""


@pytest.fixture
def install(tmp_path: Path, plant: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Return a function that installs code as a plugin, as a distribution would be."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), os.environ["PYTHONPATH"]]))
    modules = set(sys.modules)

    def write(code: str, name: str = "mine", **how: str) -> None:
        (site / f"plugin_of_{name}.py").write_text(code)
        plant(site, name, f"plugin_of_{name}", **how)
        importlib.invalidate_caches()

    yield write
    for name in set(sys.modules) - modules:
        if name.startswith("plugin_of_"):
            del sys.modules[name]


def told(only: str = "mine", **settings: object) -> str:
    """Return what is said of the plugin, which is the same in the list of backends and in a plan."""
    with InferenceEngine(settings, plugins=only, model="mine:x") as engine:
        (status,) = [s for s in engine.backends() if s.name == only]
        assert status.quarantined or status.reason
        with pytest.raises(BackendUnavailable) as caught:
            engine.plan()
        assert status.reason
        assert status.reason in str(caught.value)
        return f"{status.quarantined}: {status.reason} → {status.hint}"


@pytest.mark.parametrize(
    ("before", "after", "wanted"),
    [
        (
            "@hookimpl\ndef tars_load",
            "def tars_load",
            "register: tars_load (plugin_of_mine.py, line 8) has no @hookimpl, so it would never be called",
        ),
        (
            "def tars_load",
            "def tars_laod",
            "register: tars_laod (plugin_of_mine.py, line 8) is not a hook; did you mean tars_load?",
        ),
        (
            "@hookimpl\ndef tars_load",
            "def tars_laod",
            "register: tars_laod (plugin_of_mine.py, line 8) is not a hook; did you mean tars_load?",
        ),
        (
            "def tars_load(model)",
            "def tars_load(modle)",
            "register: tars_load (plugin_of_mine.py, line 8) has the argument modle, which it is never given; it may",
        ),
        (
            "return ProbeReport(available=True)",
            "return True",
            "probe: tars_probe: it must return ProbeReport, not True (bool)",
        ),
        (
            "return ProbeReport(available=True)",
            "return ProbeReport(available=True, memory_bytes='2 GB')",
            "probe: tars_probe: invalid ProbeReport: memory_bytes: expected int | null, got str",
        ),
        (
            "return ProbeReport(available=True)",
            "raise StopIteration('odd')",
            "probe: tars_probe: StopIteration: odd (plugin_of_mine.py, line 6)",
        ),
    ],
)
def test_a_mistake_in_a_hook_is_named_with_its_line_and_its_fix(
    install: Install, before: str, after: str, wanted: str
) -> None:
    assert before in GOOD
    install(GOOD.replace(before, after))
    assert told().startswith(wanted)


def test_a_module_without_any_hook_is_said_to_have_none(install: Install) -> None:
    install("import tars_core\n\ndef answer():\n    return 42\n")
    assert told().startswith(
        "register: plugin_of_mine implements no hook; a backend has at least tars_probe and tars_load"
    )


def test_a_function_of_the_authors_own_with_the_prefix_is_not_taken_for_a_mistake(install: Install) -> None:
    install(GOOD + "\ndef tars_helper_for_paths():\n    return 1\n")
    with InferenceEngine(plugins="mine", model="mine:x") as engine:
        assert engine.list_available_backends() == ["mine"]


@pytest.mark.parametrize(
    ("returned", "wanted"),
    [
        ("['tiny']", "probe: tars_models: it must return OfferedModel, not 'tiny' (str)"),
        ("{'tiny': 1}", "probe: tars_models: it must return a list of OfferedModel, not {'tiny': 1}"),
        ("None", "probe: tars_models: it must return a list of OfferedModel, not None"),
    ],
)
def test_models_of_a_wrong_type_get_the_same_verdict_in_every_command(
    install: Install, returned: str, wanted: str
) -> None:
    install(f"{GOOD}\n@hookimpl\ndef tars_models():\n    return {returned}\n")
    assert told().startswith(wanted)
    with InferenceEngine(plugins="mine") as engine:
        engine.models()
        (status,) = engine.backends()
    assert f"{status.quarantined}: {status.reason}".startswith(wanted)


def test_settings_that_are_no_pydantic_model_are_named_as_such(install: Install) -> None:
    install(GOOD + "\n@hookimpl\ndef tars_settings():\n    return {'size': int}\n")
    said = told(backends={"mine": {"size": 1}})
    assert said.startswith(
        "probe: tars_settings must return a subclass of pydantic.BaseModel, not {'size': <class 'int'>}"
    )


@pytest.mark.parametrize("group", ["tars.plugins", "tars.plugin.v1", "tars_plugins.v1", "tars.plugins.1"])
def test_a_group_that_nearly_matches_is_reported_with_the_right_one(install: Install, group: str) -> None:
    install(GOOD, group=group)
    said = told()
    assert said.startswith(f"discovery: its entry-point group is '{group}', which is not the group of TARS plugins")
    assert "'tars.plugins.v1'" in said


def test_another_programs_group_is_not_reported(install: Install) -> None:
    install(GOOD, name="other", group="tarsier.plugins")
    with InferenceEngine(plugins="other") as engine:
        assert engine.backends() == ()


def test_31_a_name_of_this_projects_own_distributions_cannot_be_taken_by_another(install: Install) -> None:
    install(GOOD, name="openai", distribution="tars-hijack")
    with InferenceEngine(plugins="openai") as engine:
        (status,) = engine.backends()
    assert status.quarantined == "discovery"
    assert status.reason == "the name openai belongs to tars-openai, and tars-hijack uses it, too"


def test_an_object_given_in_code_answers_in_place_of_the_installed_plugin(install: Install) -> None:
    install(GOOD)
    with InferenceEngine(plugins="mine", model="mine:x", extra_plugins={"mine": Speaker(END)}) as engine:
        assert engine.generate("hi") == "hello"
        (status,) = engine.backends()
    assert (status.available, status.quarantined, status.distribution) == (True, None, "(object given in code)")


# ---- events ------------------------------------------------------------------------------------

END = Finished(finish_reason="stop", usage=Usage(prompt_tokens=1, completion_tokens=1))


NUMBER: Any = 5
FRACTION: Any = 1.5
WORD: Any = "done"
"""Values that a type checker would have refused, and nobody ran one."""


class Speaker:
    """A plugin object whose answer is what it is given."""

    def __init__(self, *events: Any) -> None:  # noqa: ANN401 - mistakes have any type
        self._events = events

    @hookimpl
    def tars_probe(self) -> ProbeReport:
        return ProbeReport(available=True)

    @hookimpl
    def tars_load(self) -> LoadedModel:
        return LoadedModel(device="cpu", context_length=100)

    @hookimpl
    def tars_generate(self) -> Iterator[BackendEvent]:
        yield TextDelta(text="hello")
        yield from self._events


@pytest.mark.parametrize(
    ("events", "rule"),
    [
        (("text",), "events are Progress, TextDelta and Finished, not 'text' (str)"),
        ((TextDelta(text=""), END), "a TextDelta must not be empty; leave it out"),
        ((TextDelta(text=NUMBER), END), "invalid TextDelta: text: expected str, got int"),
        ((TextDelta(text="a", token_ids=(FRACTION,)), END), "invalid TextDelta: token_ids[0]: expected int, got float"),
        (
            (Finished(finish_reason=WORD, usage=END.usage),),
            "invalid Finished: finish_reason: Invalid enum value 'done'",
        ),
        ((), "it ended without Finished"),
        ((END, TextDelta(text="more")), "an event came after Finished"),
        (
            (Finished(finish_reason="stop", usage=Usage(prompt_tokens=1, completion_tokens=999)),),
            "it sampled 999 tokens, and request.sampling.max_tokens is 7",
        ),
    ],
)
def test_33_an_event_that_breaks_a_rule_is_told_with_field_and_value(events: tuple[object, ...], rule: str) -> None:
    plugins = {"speaker": Speaker(*events)}
    with (
        InferenceEngine(plugins="none", model="mine:x", extra_plugins=plugins) as engine,
        pytest.raises((StreamInterrupted, AllBackendsFailed)) as caught,
    ):
        engine.generate("hi", max_tokens=7)
    assert f"plugin speaker broke the contract of tars_generate: {rule}" in str(caught.value)


def test_a_batched_model_that_lacks_a_method_is_told_which() -> None:
    class Half(LoadedModel):
        def submit(self, *_: object) -> None:
            """Take nothing up."""

        def step(self) -> list[object]:
            return []

    class Plugin(Speaker):
        @hookimpl
        def tars_load(self) -> LoadedModel:
            return Half(device="cpu", context_length=100)

    with (
        InferenceEngine(plugins="none", model="mine:x", extra_plugins={"half": Plugin()}) as engine,
        pytest.raises(TarsError, match="Half has submit, step, but not prepare, cancel"),
    ):
        engine.generate("hi")


def test_62_what_a_plugin_prints_stays_off_the_output_of_commands(install: Install) -> None:
    install(
        "import os\nprint('hi')\nos.write(1, b'raw\\n')\n" + GOOD.replace("return Pr", "print('probing'); return Pr")
    )
    command = [sys.executable, "-m", "tars_core.cli", "plan", "mine:x", "--json"]
    done = subprocess.run(command, env=os.environ | {"TARS_PLUGINS": "mine"}, capture_output=True, check=True)
    assert json.loads(done.stdout)["candidates"][0]["backend"] == "mine"
