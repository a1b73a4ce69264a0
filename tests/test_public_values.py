"""What users get is a value: it becomes a dictionary or JSON, prints on one line, and FastAPI and pydantic take it."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import json
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import fastapi
import msgspec
import pydantic
import pytest

import tars_core
from tars_core import (
    Attempt,
    Candidate,
    Completion,
    Decision,
    Embeddings,
    Failure,
    Image,
    InferenceEngine,
    LoadedStatus,
    Message,
    ModelRef,
    ProbeReport,
    SamplingParams,
    Text,
    TextDelta,
    Timings,
    TokenLogprob,
    Usage,
    plugin,
)
from tars_core.testing.fake import BackendScript, Finish, Say
from tars_core.types import observed
from tars_core.types.public import Public

MakeEngine = Callable[..., InferenceEngine]

KINDS: dict[str, type[Public]] = {
    f"{module.__name__}.{name}": typing.cast("type[Public]", kind)
    for module, names in (
        (tars_core, tars_core.__all__),
        (plugin, plugin.__all__),
        (observed, [kind.__name__ for kind in typing.get_args(observed.Observed)]),
    )
    for name in names
    if inspect.isclass(kind := getattr(module, name)) and issubclass(kind, msgspec.Struct)
}
"""Every type of value that users or plugin authors can name."""

TEXT = 'Line one,\nline "two"\twith\r\n\x00\x1b[31m control characters, ¿señales? and 🙂. ' * 200
MANY = 40


def largest(kind: Any, depth: int = 0) -> Any:  # noqa: ANN401, C901, PLR0911 - one case for each type
    """Return a value of a type that is as long to print as it may get."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        candidates = [argument for argument in arguments if argument is not type(None)]
        return largest(candidates[-1], depth)
    if origin is Literal:
        return max(arguments, key=lambda option: len(str(option)))
    if origin is tuple and arguments[-1] is Ellipsis:
        return tuple(largest(arguments[0], depth + 1) for _ in range(MANY)) if depth < 3 else ()
    if origin is tuple:
        return tuple(largest(argument, depth) for argument in arguments)
    if origin is frozenset:
        return frozenset(f"feature {number}" for number in range(MANY))
    if origin is not None and issubclass(origin, Mapping):
        return {f"key {number}": largest(arguments[1], depth + 1) for number in range(MANY)}
    if kind is str:
        return TEXT
    if kind is bool:
        return True
    if kind is int:
        return 2**53
    if kind is float:
        return math.pi / 3e-7
    if kind is bytes:
        return bytes(range(256)) * 100
    if inspect.isclass(kind) and issubclass(kind, msgspec.Struct):
        return largest_of(kind, depth)
    raise AssertionError(f"how is a {kind} made?")


CHECKED: dict[type[Any], dict[str, Any]] = {
    ProbeReport: {"preference": 99},
    SamplingParams: {
        "temperature": 2 / 3,
        "top_p": 2 / 3,
        "top_k": 2**31 - 1,
        "min_p": 2 / 3,
        "repeat_penalty": 2 / 3,
        "seed": 2**32 - 1,
    },
    Message: {"content": (*(Text(text=TEXT) for _ in range(MANY)), Image(data=b"P" * 9999, media_type=TEXT))},
}
"""Fields that are checked on construction."""


def largest_of(kind: type[Any], depth: int = 0) -> Any:  # noqa: ANN401 - of any of the types
    fields = typing.get_type_hints(kind)
    return kind(
        **{
            field.name: CHECKED.get(kind, {}).get(field.name) or largest(fields[field.name], depth + 1)
            for field in msgspec.structs.fields(kind)
        }
    )


@pytest.fixture(params=list(KINDS.values()), ids=list(KINDS))
def value(request: pytest.FixtureRequest) -> Public:
    made = largest_of(request.param)
    assert isinstance(made, request.param)
    return typing.cast("Public", made)


def parts(plain: object) -> Iterator[object]:
    """Yield everything inside of plain data, keys too."""
    yield plain
    if isinstance(plain, dict):
        for key, item in plain.items():
            yield key
            yield from parts(item)
    elif isinstance(plain, list):
        for item in plain:
            yield from parts(item)


# ---- every value ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_type_of_value_that_has_a_public_name_is_a_public_value(kind: type[msgspec.Struct]) -> None:
    assert issubclass(kind, Public)
    assert kind.__struct_config__.frozen
    assert kind.__doc__


def test_a_value_becomes_a_dictionary_of_plain_things_with_every_field(value: Public) -> None:
    plain = value.to_dict()
    assert tuple(plain) == value.__struct_fields__
    assert {type(part) for part in parts(plain)} <= {dict, list, str, int, float, bool, type(None)}
    assert dict(value) == plain


def test_a_value_becomes_json_on_one_line_that_reads_back_as_its_dictionary(value: Public) -> None:
    text = value.to_json()
    assert "\n" not in text
    assert json.loads(text) == value.to_dict()
    text.encode()


def test_a_value_prints_on_one_short_line(value: Public) -> None:
    for shown in (repr(value), f"{value!r}"):
        assert shown.startswith(type(value).__name__)
        assert len(shown) <= 250
        assert shown.isprintable(), "it could move the cursor or begin a new line"
    assert len(str(value)) <= 250 or isinstance(value, ModelRef), "a model's reference is its name, whole"


def test_who_logs_a_value_pays_for_one_line_and_not_for_all_that_is_in_it() -> None:
    class Costly(TokenLogprob, frozen=True, kw_only=True):
        def __repr__(self) -> str:
            raise AssertionError("it was printed to be left out")

    many = (Costly(token_id=1, text="a", logprob=-0.5),) * 1000
    assert "<1000 items>" in repr(TextDelta(text="a", logprobs=many))


def test_defaults_are_left_out_of_what_is_printed() -> None:
    assert repr(Usage(prompt_tokens=3, completion_tokens=4)) == "Usage(prompt_tokens=3, completion_tokens=4)"
    assert repr(Timings()) == "Timings()"
    assert repr(Message(role="user", content="Hi")) == "Message(role='user', content='Hi')"


def test_a_long_text_is_cut_with_a_mark() -> None:
    shown = repr(TextDelta(text="a" * 1000))
    assert "…" in shown
    assert shown.count("a") < 100


# ---- particular ones -----------------------------------------------------------------------------

MODEL = ModelRef.parse("/models/phi-2.gguf")
COMPLETION = Completion(
    text="Four.\nOr so.",
    finish_reason="stop",
    usage=Usage(prompt_tokens=7, completion_tokens=4),
    timings=Timings(ttft_s=0.25),
    backend="alpha",
    model=MODEL,
    device="cpu",
    degraded=False,
    decision=Decision(
        model="phi",
        candidates=(
            Candidate(
                backend="alpha",
                model=MODEL,
                report=ProbeReport(available=True, features=frozenset({"seed", "chat"})),
                reasons=("preference 50",),
            ),
        ),
        rejected=(),
    ),
    attempts=(
        Attempt(
            backend="beta",
            model=MODEL,
            stage="load",
            duration_s=0.5,
            failure=Failure(kind="LoadFailed", message="torn", hint="mend it"),
        ),
        Attempt(backend="alpha", model=MODEL, stage="done", duration_s=1.5),
    ),
)


def test_a_completion_as_a_dictionary_has_names_for_models_and_lists_for_what_is_several() -> None:
    plain = COMPLETION.to_dict()
    assert (plain["text"], plain["model"], plain["tool_calls"]) == ("Four.\nOr so.", "/models/phi-2.gguf", [])
    assert plain["usage"] == {"prompt_tokens": 7, "completion_tokens": 4, "reasoning_tokens": 0}
    assert plain["attempts"][0]["failure"]["hint"] == "mend it"
    assert plain["attempts"][1]["failure"] is None
    assert plain["decision"]["candidates"][0]["report"]["features"] == ["chat", "seed"]
    assert dict(COMPLETION) == plain
    assert {**dict(COMPLETION), "id": 1}["id"] == 1


def test_a_completion_prints_what_a_reader_of_logs_wants() -> None:
    shown = repr(COMPLETION)
    for word in (r"'Four.\nOr so.'", "alpha", "phi-2.gguf", "stop", "7+4"):
        assert word in shown


def test_bytes_become_base64_and_numbers_that_json_has_no_word_for_become_null() -> None:
    embeddings = Embeddings(
        data=b"\x00\x00\x80?", count=1, dimensions=1, usage=Usage(prompt_tokens=1, completion_tokens=0)
    )
    assert embeddings.to_dict()["data"] == "AACAPw=="
    never = TokenLogprob(token_id=1, text="a", logprob=-math.inf)
    assert json.loads(never.to_json(), parse_constant=pytest.fail)["logprob"] is None


def test_values_of_a_real_request_are_plain_through_and_through(make_engine: MakeEngine) -> None:
    engine = make_engine(alpha=BackendScript(generate=(Say("one\n"), Say("two"), Finish())))
    events = list(engine.stream("hi"))
    others = (engine.plan(), *engine.loaded(), *engine.backends(), *engine.models(), *events)
    for some in others:
        assert json.loads(some.to_json()) == some.to_dict() == dict(some)
        assert len(repr(some)) <= 250
        assert "\n" not in repr(some)
    assert events[-1].to_dict()["completion"]["text"] == "one\ntwo"


# ---- FastAPI -------------------------------------------------------------------------------------


class Response(NamedTuple):
    status_code: int
    body: bytes

    def json(self) -> Any:  # noqa: ANN401 - whatever the route returned
        return json.loads(self.body)


class Client:
    """Asks an ASGI application, as a server would."""

    def __init__(self, app: fastapi.FastAPI) -> None:
        self._app = app

    def get(self, path: str) -> Response:
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"host", b"test")],
            "server": ("test", 80),
            "client": ("test", 1),
        }
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:  # noqa: ANN401 - a mapping of ASGI's
            sent.append(dict(message))

        asyncio.run(self._app(scope, receive, send))
        return Response(sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:]))


@pytest.fixture
def client(make_engine: MakeEngine) -> Client:
    engine = make_engine(alpha=BackendScript(generate=(Say("Four.\n"), Say("¿Sí?"), Finish())))
    app = fastapi.FastAPI()

    @app.get("/sync")
    def answer() -> Completion:
        return engine.complete("hi")

    @app.get("/sync/bare")
    def answer_bare():  # type: ignore[no-untyped-def]  # noqa: ANN202 - as many people write it
        return engine.complete("hi")

    @app.get("/async")
    async def answer_async() -> Completion:
        return await engine.acomplete("hi")

    @app.get("/async/bare")
    async def answer_async_bare():  # type: ignore[no-untyped-def]  # noqa: ANN202
        return await engine.acomplete("hi")

    @app.get("/inside")
    def answer_inside():  # type: ignore[no-untyped-def]  # noqa: ANN202
        return {"answer": engine.complete("hi"), "models": engine.loaded()}

    @app.get("/several")
    def loaded() -> tuple[LoadedStatus, ...]:
        engine.load()
        return engine.loaded()

    @app.get("/maybe")
    def maybe() -> Completion | None:
        return engine.complete("hi")

    return Client(app)


@pytest.mark.parametrize("path", ["/sync", "/sync/bare", "/async", "/async/bare", "/maybe"])
def test_a_completion_can_be_returned_from_a_route(client: Client, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 200
    body = response.json()
    assert list(body) == list(Completion.__struct_fields__)
    assert (body["text"], body["backend"], body["usage"]["completion_tokens"]) == ("Four.\n¿Sí?", "alpha", 2)
    assert body["model"].startswith("fake:")
    assert body["decision"]["candidates"][0]["backend"] == "alpha"


def test_values_inside_of_what_a_route_returns_are_written_too(client: Client) -> None:
    body = client.get("/inside").json()
    assert body["answer"]["text"] == "Four.\n¿Sí?"
    assert body["models"][0]["backend"] == "alpha"
    (status,) = client.get("/several").json()
    assert status["pid"] == body["models"][0]["pid"]


def test_the_documentation_of_such_routes_is_written(client: Client) -> None:
    schema = client.get("/openapi.json").json()
    answer = schema["paths"]["/sync"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert (answer["type"], "Completion" in answer["description"]) == ("object", True)
    assert client.get("/docs").status_code == 200


# ---- pydantic ------------------------------------------------------------------------------------


class Reply(pydantic.BaseModel):
    completion: Completion
    earlier: list[Completion] = []
    delta: TextDelta | None = None
    names: dict[str, ModelRef] = {}


def test_a_pydantic_model_may_hold_values() -> None:
    reply = Reply(completion=COMPLETION, earlier=[COMPLETION], delta=TextDelta(text="a"), names={"phi": MODEL})
    assert reply.completion is COMPLETION
    dumped = reply.model_dump()
    assert dumped["completion"] == dumped["earlier"][0] == COMPLETION.to_dict()
    assert dumped["delta"]["text"] == "a"
    written = json.loads(reply.model_dump_json())
    assert written["completion"] == COMPLETION.to_dict()
    assert reply.model_copy() == reply


def test_a_models_reference_is_its_name_wherever_it_is_written() -> None:
    reply = Reply(completion=COMPLETION, names={"phi": MODEL})
    assert reply.model_dump()["names"] == {"phi": "/models/phi-2.gguf"}
    assert json.loads(reply.model_dump_json())["names"] == {"phi": "/models/phi-2.gguf"}


def test_a_pydantic_model_refuses_what_is_no_such_value() -> None:
    with pytest.raises(pydantic.ValidationError, match="Completion"):
        Reply(completion=typing.cast("Completion", {"text": "a"}))


def test_a_pydantic_model_that_holds_values_has_a_schema() -> None:
    schema = Reply.model_json_schema()
    assert set(schema["properties"]) == {"completion", "earlier", "delta", "names"}
    assert "Completion" in json.dumps(schema)
    assert "Completion" in json.dumps(Reply.model_json_schema(mode="serialization"))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_pydantic_takes_and_writes_every_type_of_value(kind: type[Public]) -> None:
    adapter = pydantic.TypeAdapter(kind)
    made = largest_of(kind)
    assert adapter.validate_python(made) is made
    written = adapter.dump_python(made)
    assert written == (str(made) if kind is ModelRef else made.to_dict())
    assert json.loads(adapter.dump_json(made)) == written
    assert adapter.json_schema()


def test_a_dataclass_of_pydantics_may_hold_a_completion() -> None:
    @dataclasses.dataclass
    class Held:
        completion: Completion

    held = Held(completion=COMPLETION)
    adapter = pydantic.TypeAdapter(Held)
    assert adapter.validate_python(held).completion is COMPLETION
    assert adapter.dump_python(held)["completion"] == COMPLETION.to_dict()
