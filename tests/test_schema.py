"""Requests and results: what is refused, with which words, and what survives a round trip."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tars_core.types.errors import (
    BackendError,
    ContextLengthExceeded,
    ContractError,
    DeadlineExceeded,
    GenerationFailed,
    LoadFailed,
    ModelNotFound,
    OutOfMemory,
    Overloaded,
    PluginError,
    RequestError,
    TarsError,
    WorkerDied,
)
from tars_core.types.failures import Failure
from tars_core.types.messages import Image, Message, Text, check_messages
from tars_core.types.models import ModelRef
from tars_core.types.reports import ProbeReport
from tars_core.types.request import GenerateRequest, SamplingParams
from tars_core.types.text import check_text
from tars_core.worker.protocol import LoadRefused, encode, worker_frames

LONE = "\ud83d"
"""Half a character: what a string cut in two by UTF-16 tools ends in."""

RANGES = {
    "temperature": (0.0, 10.0),
    "top_p": (0.0, 1.0),
    "top_k": (0, 2**31 - 1),
    "min_p": (0.0, 1.0),
    "repeat_penalty": (0.0, 10.0),
    "max_tokens": (1, 2**63 - 1),
    "seed": (0, 2**32 - 1),
}
WHOLE = ("top_k", "max_tokens", "seed")


def sampling(**values: object) -> SamplingParams:
    return SamplingParams(**values)  # type: ignore[arg-type]  # wrong types are what is tested


# ---- sampling ----------------------------------------------------------------------------------


def test_the_defaults_are_those_the_design_states() -> None:
    params = SamplingParams()
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.8, 0.9, 40, 0)
    assert (params.repeat_penalty, params.max_tokens, params.stop, params.seed) == (1.1, 200, (), None)


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("temperature", -0.1, "it must be in [0, 10]"),
        ("temperature", 10.1, "it must be in [0, 10]"),
        ("temperature", math.nan, "it must be in [0, 10]"),
        ("temperature", math.inf, "it must be in [0, 10]"),
        ("temperature", -math.inf, "it must be in [0, 10]"),
        ("temperature", 10**400, "it must be in [0, 10]"),
        ("top_p", 0, "it must be in (0, 1]"),
        ("top_p", 1.0001, "it must be in (0, 1]"),
        ("top_p", math.nan, "it must be in (0, 1]"),
        ("min_p", 1, "it must be in [0, 1)"),
        ("min_p", -1e-9, "it must be in [0, 1)"),
        ("repeat_penalty", 0, "it must be in (0, 10]"),
        ("top_k", -1, "at least 0"),
        ("top_k", 2**31, "at most 2147483647"),
        ("max_tokens", 0, "at least 1"),
        ("max_tokens", -1, "at least 1"),
        ("max_tokens", 2**63, "at most 9223372036854775807"),
        ("seed", -1, "at least 0"),
        ("seed", 2**32, "at most 4294967295"),
    ],
)
def test_26_a_value_out_of_range_is_refused_with_its_name_and_the_range(name: str, value: object, hint: str) -> None:
    with pytest.raises(RequestError, match=f"^{name} is ") as refused:
        sampling(**{name: value})
    assert refused.value.hint is not None
    assert hint in refused.value.hint


@pytest.mark.parametrize("name", sorted(RANGES))
@pytest.mark.parametrize("sign", [1, -1])
def test_26_a_number_too_long_to_print_is_refused_like_any_other(name: str, sign: int) -> None:
    with pytest.raises(RequestError, match=f"^{name} is beyond ") as refused:
        sampling(**{name: sign * 10**5000})
    assert refused.value.hint


@pytest.mark.parametrize("name", sorted(RANGES))
@pytest.mark.parametrize("value", ["0.5", b"1", True, [1], {}, object(), 1j], ids=lambda value: type(value).__name__)
def test_25_a_value_of_the_wrong_type_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=f"^{name} must be a (whole )?number, not "):
        sampling(**{name: value})


@pytest.mark.parametrize("name", sorted(RANGES.keys() - {"seed"}))
def test_none_is_no_value_except_for_the_seed(name: str) -> None:
    assert sampling(seed=None).seed is None
    with pytest.raises(RequestError, match=name):
        sampling(**{name: None})


@pytest.mark.parametrize("name", WHOLE)
def test_a_fraction_is_no_count(name: str) -> None:
    with pytest.raises(RequestError, match=f"^{name} must be a whole number"):
        sampling(**{name: 3.0})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0),
        ("temperature", 10),
        ("top_p", 1),
        ("top_p", 5e-324),
        ("min_p", 0),
        ("repeat_penalty", 10),
        *((name, RANGES[name][0]) for name in WHOLE),
        *((name, RANGES[name][1]) for name in WHOLE),
    ],
)
def test_a_value_on_the_edge_of_its_range_is_taken_as_it_is(name: str, value: object) -> None:
    assert getattr(sampling(**{name: value}), name) == value


@given(st.sampled_from(sorted(RANGES)), st.one_of(st.floats(), st.integers(), st.integers(-(10**30), 10**30)))
def test_25_any_number_is_either_within_its_range_or_a_request_error(name: str, value: float) -> None:
    low, high = RANGES[name]
    try:
        params = sampling(**{name: value})
    except RequestError as error:
        assert name in error.message  # noqa: PT017 - either outcome is right
    else:
        assert low <= getattr(params, name) <= high


@pytest.mark.parametrize("stop", [None, 5, [5], [b"x"], [None], ["a", 1.5]])
def test_a_stop_that_is_neither_a_string_nor_a_list_of_them_is_refused(stop: object) -> None:
    with pytest.raises(RequestError, match=r"^stop must be "):
        sampling(stop=stop)


def test_what_is_a_number_or_a_text_by_inheritance_becomes_a_plain_one() -> None:
    """NumPy's numbers and texts are such; a worker could not be sent them."""

    class Half(float):
        pass

    class Text(str):
        __slots__ = ()

    class Few(enum.IntEnum):
        TWO = 2

    class Role(str, enum.Enum):
        USER = "user"

    params = sampling(temperature=Half(0.5), max_tokens=Few.TWO, seed=Few.TWO, stop=[Text("x")])
    assert msgspec.json.decode(msgspec.json.encode(params), type=SamplingParams) == params
    message = Message(role=Role.USER, content=Text("hi"))  # type: ignore[arg-type]
    assert msgspec.json.decode(msgspec.json.encode(message), type=Message) == Message(role="user", content="hi")


def test_a_single_stop_string_needs_no_list() -> None:
    assert sampling(stop="User:").stop == ("User:",)


def test_an_empty_stop_string_is_refused_with_the_reason() -> None:
    with pytest.raises(RequestError, match="empty") as refused:
        sampling(stop=["a", ""])
    assert refused.value.hint == "it would stop before the first token"


@pytest.mark.parametrize("stop", [["a", "b"], ("a", "b"), iter(["a", "b"])], ids=["list", "tuple", "iterator"])
def test_stop_strings_come_out_as_a_tuple_whatever_they_came_in(stop: object) -> None:
    assert sampling(stop=stop).stop == ("a", "b")


def test_24_a_lone_surrogate_in_a_stop_string_is_refused() -> None:
    with pytest.raises(RequestError, match=r"U\+D83D"):
        SamplingParams(stop=("a" + LONE,))


def test_what_was_checked_cannot_be_changed_afterwards() -> None:
    params = SamplingParams()
    with pytest.raises(AttributeError):
        params.top_k = -1  # type: ignore[misc]  # that it is refused is the point


# ---- names of models ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "scheme", "rest"),
    [
        ("hf:microsoft/phi-2", "hf", "microsoft/phi-2"),
        ("hf:org/name:file.gguf", "hf", "org/name:file.gguf"),
        ("ollama:phi:latest", "ollama", "phi:latest"),
        ("Ollama:Phi", "ollama", "Phi"),
        ("demo:", "demo", ""),
        ("my-scheme:x", "my-scheme", "x"),
        ("my_scheme:x", "my_scheme", "x"),
        ("https://example.org/m.gguf", "https", "//example.org/m.gguf"),
        ("/models/phi.gguf", "path", "/models/phi.gguf"),
        ("phi.gguf", "path", "phi.gguf"),
        ("./a:b.gguf", "path", "a:b.gguf"),
        ("folder/a:b.gguf", "path", "folder/a:b.gguf"),
        (r"C:\models\phi.gguf", "path", r"C:\models\phi.gguf"),
        ("C:/models/phi.gguf", "path", "C:/models/phi.gguf"),
        ("d:phi.gguf", "path", "d:phi.gguf"),
        (":phi", "path", ":phi"),
        ("--:phi", "path", "--:phi"),
        ("~nobody-of-this-name/phi.gguf", "path", "~nobody-of-this-name/phi.gguf"),
    ],
)
def test_a_name_is_a_scheme_of_two_letters_or_more_else_a_path(text: str, scheme: str, rest: str) -> None:
    ref = ModelRef.parse(text)
    assert (ref.scheme, ref.rest) == (scheme, rest)
    assert (ref.path is not None) == (scheme == "path")


def test_a_tilde_is_the_home_folder_in_text_and_in_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ModelRef.parse("~/m.gguf").path == tmp_path / "m.gguf"
    assert ModelRef.parse(Path("~/m.gguf")).path == tmp_path / "m.gguf"


def test_a_path_object_is_a_path_even_where_it_looks_like_a_scheme() -> None:
    assert ModelRef.parse(Path("hf:x")).path == Path("hf:x")


@pytest.mark.parametrize("blank", ["", " ", "\t\n"])
def test_a_blank_name_is_refused(blank: str) -> None:
    with pytest.raises(RequestError, match="blank"):
        ModelRef.parse(blank)


@pytest.mark.parametrize("name", ["hf:" + LONE, LONE, Path("m\udcff.gguf")])
def test_24_a_name_that_is_no_utf8_is_refused(name: str | Path) -> None:
    with pytest.raises(RequestError, match="lone surrogate"):
        ModelRef.parse(name)


@given(st.text("aC:/\\.~-_ 漢", min_size=1, max_size=10).filter(str.strip))
def test_a_parsed_name_reads_the_same_again(text: str) -> None:
    ref = ModelRef.parse(text)
    assert ModelRef.parse(ref.path or str(ref)) == ref


# ---- messages and text -------------------------------------------------------------------------


def test_messages_may_be_objects_or_dictionaries() -> None:
    message = Message(role="user", content="hi")
    assert check_messages([message, {"role": "assistant", "content": ""}]) == (
        message,
        Message(role="assistant", content=""),
    )


@pytest.mark.parametrize("messages", [[], (), "hi", None, 5, {}], ids=repr)
def test_no_messages_at_all_are_refused(messages: Sequence[Message]) -> None:
    with pytest.raises(RequestError, match="at least one message"):
        check_messages(messages)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user"},
        {"content": "hi"},
        {"role": "user", "content": "hi", "name": "x"},
        {},
        "hi",
        None,
        ("user", "hi"),
    ],
    ids=repr,
)
def test_a_message_with_other_keys_is_refused(message: dict[str, str]) -> None:
    with pytest.raises(RequestError, match="has the keys role and content"):
        check_messages([message])


@pytest.mark.parametrize("role", ["developer", "User", "", None, 5, ["user"]])
def test_an_unknown_role_is_refused_and_the_known_ones_listed(role: str) -> None:
    with pytest.raises(RequestError, match="unknown role") as refused:
        check_messages([{"role": role, "content": "hi"}])
    assert refused.value.hint == "use one of system, user, assistant, tool"


@pytest.mark.parametrize("content", [None, 5, b"hi", {"type": "text", "text": "hi"}])
def test_content_that_is_no_text_is_refused(content: str) -> None:
    with pytest.raises(RequestError, match="message content must be text"):
        check_messages([{"role": "user", "content": content}])


def test_parts_that_are_all_text_are_one_text() -> None:
    parts = [{"type": "text", "text": "What is "}, Text(text="TARS?")]
    (message,) = check_messages([{"role": "user", "content": parts}])
    assert message == Message(role="user", content="What is TARS?")


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"type": "image_url", "image_url": {"url": "x"}}, "'image_url' is not supported"),
        ({"type": "text", "text": "x", "cache_control": {}}, "'text' is not supported"),
        ({"type": "text", "text": 5}, "must be text, not int"),
        ("hi", "a part of a message is"),
    ],
)
def test_a_part_of_another_kind_is_refused_and_never_dropped(part: object, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        check_messages([{"role": "user", "content": [part]}])


def test_a_picture_stays_a_part_and_needs_a_backend_that_reads_pictures() -> None:
    message = Message(role="user", content=(Text(text="What is this?"), Image(data=b"x", media_type="image/png")))
    assert message.text == "What is this?"
    assert "images" in GenerateRequest(messages=(message,), sampling=SamplingParams()).needs()


def test_24_a_lone_surrogate_is_refused_with_its_place() -> None:
    with pytest.raises(RequestError, match=r"U\+D83D\) at position 2") as refused:
        Message(role="user", content="hi" + LONE)
    assert "errors='replace'" in (refused.value.hint or "")


@pytest.mark.parametrize("text", ["", "\0", "a\0b", "\N{ROCKET}", "\U0010ffff", "\ufffe", "\u0301", "\r\n\u2028"])
def test_24_every_text_that_utf8_can_express_is_let_through(text: str) -> None:
    check_text("prompt", text)
    assert Message(role="user", content=text).content == text


# ---- probes ------------------------------------------------------------------------------------


def test_a_plugin_that_says_no_must_say_why() -> None:
    with pytest.raises(ContractError, match="reason"):
        ProbeReport(available=False)


@pytest.mark.parametrize("preference", [-1, 101])
def test_a_preference_is_a_percentage(preference: int) -> None:
    with pytest.raises(ContractError, match="0 to 100"):
        ProbeReport(available=True, preference=preference)


# ---- failures ----------------------------------------------------------------------------------

CROSSING: tuple[type[TarsError], ...] = (
    RequestError,
    ModelNotFound,
    Overloaded,
    BackendError,
    PluginError,
    LoadFailed,
    OutOfMemory,
    GenerationFailed,
    ContractError,
)


@pytest.mark.parametrize("kind", CROSSING)
def test_an_error_crosses_to_the_other_process_with_its_type_and_hint(kind: type[TarsError]) -> None:
    back = Failure.of(kind("it broke", hint="mend it")).to_error(GenerationFailed)
    assert type(back) is kind
    assert (back.message, back.hint) == ("it broke", "mend it")


def test_22_a_prompt_too_long_crosses_with_both_numbers() -> None:
    back = Failure.of(ContextLengthExceeded(prompt_tokens=5000, context_length=2048)).to_error(GenerationFailed)
    assert isinstance(back, ContextLengthExceeded)
    assert (back.prompt_tokens, back.context_length) == (5000, 2048)
    assert "5000" in back.message
    assert "2048" in back.message


@pytest.mark.parametrize(
    "error", [WorkerDied(returncode=-11), DeadlineExceeded(stage="load", limit_s=1), KeyError("x"), SystemExit(3)]
)
def test_an_error_that_is_not_the_workers_to_raise_becomes_the_default(error: BaseException) -> None:
    failure = Failure.of(error)
    back = failure.to_error(LoadFailed)
    assert type(back) is LoadFailed
    assert type(error).__name__ in failure.kind
    assert back.message == failure.message


def test_a_foreign_error_is_told_with_its_type() -> None:
    assert Failure.of(KeyError("vocab")).message == "KeyError: 'vocab'"


def test_another_librarys_request_error_is_not_taken_for_the_callers_mistake() -> None:
    foreign = type("RequestError", (Exception,), {"__module__": "ollama"})
    failure = Failure.of(foreign("no such model"))
    assert failure.kind == "ollama.RequestError"
    assert type(failure.to_error(GenerationFailed)) is GenerationFailed


def test_a_plugins_own_kind_of_error_counts_as_what_it_is_derived_from() -> None:
    class NoVideoMemory(OutOfMemory):
        pass

    assert type(Failure.of(NoVideoMemory("6 GiB short")).to_error(LoadFailed)) is OutOfMemory


@pytest.mark.parametrize(
    "error",
    [OSError("no file m\udcff.gguf"), LoadFailed("m\udcff.gguf", hint="rename m\udcff.gguf"), LoadFailed(OSError(5))],  # type: ignore[arg-type]
    ids=["a file's name", "also in the hint", "no text at all"],
)
def test_whatever_an_error_says_it_can_be_sent(error: Exception) -> None:
    frame = LoadRefused(failure=Failure.of(error))
    assert list(worker_frames().feed(encode(frame))) == [frame]
