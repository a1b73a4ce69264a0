"""Chat templates: what a prompt looks like, and what a template may not do."""

from __future__ import annotations

import datetime as dt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tars_core.kit.templates import ChatTemplate, render_plain
from tars_core.types.errors import GenerationFailed, RequestError
from tars_core.types.messages import Message, Role

BOS, EOS = "<s>", "</s>"
CHATML = """\
{% for message in messages %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
  {% if add_generation_prompt %}
<|im_start|>assistant
  {% endif %}
"""
NO_SYSTEM = """\
{{ bos_token }}{% for message in messages %}
{% if message.role == 'system' %}
{{ raise_exception('System role not supported') }}
{% endif %}
{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate') }}
{% endif %}
[{{ message.role }}]{{ message.content | trim }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}
[assistant]{% endif %}
"""


def said(role: Role, content: str) -> Message:
    return Message(role=role, content=content)


HI = (said("user", "hi"),)


def render(source: str, *messages: Message, bos_token: str = "", adds_bos: bool = False) -> str:
    template = ChatTemplate(source, bos_token=bos_token, eos_token=EOS, adds_bos=adds_bos)
    return template.render(messages or HI)


# ---- what is rendered --------------------------------------------------------------------------


def test_blocks_are_trimmed_the_way_published_templates_expect() -> None:
    prompt = render(CHATML, said("system", "be brief"), said("user", "hi"))
    assert prompt == ("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


def test_messages_read_as_attributes_and_as_items() -> None:
    assert render("{{ messages[0]['role'] }}={{ messages[0].content }}") == "user=hi"


def test_the_end_token_is_known_to_the_template() -> None:
    assert render("{{ messages[0].content }}{{ eos_token }}") == "hi</s>"


def test_loops_can_be_left_early() -> None:
    source = "{% for m in messages %}{{ m.content }}{% if loop.first %}{% break %}{% endif %}{% endfor %}"
    assert render(source, said("user", "a"), said("assistant", "b"), said("user", "c")) == "a"


def test_what_a_template_asks_for_and_nobody_gives_is_undefined() -> None:
    assert render("{% if tools is defined %}tools{% else %}none{% endif %}{{ tools }}") == "none"


def test_content_is_never_taken_for_a_template() -> None:
    assert "{{ 7 * 7 }}" in render(CHATML, said("user", "{{ 7 * 7 }}"))


@pytest.mark.parametrize(
    ("filtered", "text"),
    [
        ("tojson", '{"role": "user", "content": "<ñ & \'漢\'>"}'),
        ("tojson(indent=1)", '{\n "role": "user",\n "content": "<ñ & \'漢\'>"\n}'),
        ("tojson(ensure_ascii=True)", '{"role": "user", "content": "<\\u00f1 & \'\\u6f22\'>"}'),
        ("tojson(separators=(',', ':'))", '{"role":"user","content":"<ñ & \'漢\'>"}'),
        ("tojson(sort_keys=True)", '{"content": "<ñ & \'漢\'>", "role": "user"}'),
    ],
)
def test_tojson_escapes_nothing_for_html_and_takes_the_usual_options(filtered: str, text: str) -> None:
    assert render(f"{{{{ messages[0] | {filtered} }}}}", said("user", "<ñ & '漢'>")) == text


def test_strftime_now_is_the_users_clock() -> None:
    before = dt.datetime.now().astimezone().date()
    written = dt.date.fromisoformat(render("{{ strftime_now('%Y-%m-%d') }}"))
    assert before <= written <= dt.datetime.now().astimezone().date()


def test_a_model_without_a_template_gets_the_contents_with_a_blank_line_between() -> None:
    assert render_plain([said("system", "be brief"), said("user", "hi")]) == "be brief\n\nhi"


# ---- the system text ---------------------------------------------------------------------------


def test_a_system_text_the_template_refuses_goes_to_the_head_of_the_first_user_turn() -> None:
    prompt = render(NO_SYSTEM, said("system", "be brief"), said("user", "hi"))
    assert prompt == "[user]be brief\n\nhi</s>\n[assistant]"


def test_all_system_texts_are_merged_in_order() -> None:
    prompt = render(
        NO_SYSTEM,
        said("system", "one"),
        said("system", "two"),
        said("user", "hi"),
        said("assistant", "yes?"),
        said("user", "bye"),
    )
    assert prompt == "[user]one\n\ntwo\n\nhi</s>\n[assistant]yes?</s>\n[user]bye</s>\n[assistant]"


def test_a_template_that_takes_a_system_text_keeps_it_where_it_is() -> None:
    assert render(CHATML, said("system", "be brief"), said("user", "hi")).startswith("<|im_start|>system\nbe brief")


def test_what_a_template_refuses_for_another_reason_is_the_callers_mistake_with_the_templates_words() -> None:
    with pytest.raises(RequestError, match="refuses these messages: Roles must alternate"):
        render(NO_SYSTEM, said("user", "one"), said("user", "two"))


@pytest.mark.parametrize(
    "messages",
    [
        (said("system", "alone"),),
        (said("system", "be brief"), said("assistant", "hello"), said("user", "hi")),
        (said("system", "be brief"), said("assistant", "hello")),
        (said("system", "be brief"), said("user", "one"), said("user", "two")),
    ],
    ids=["no user turn", "the assistant speaks first", "only the assistant speaks", "another rule is broken too"],
)
def test_a_refusal_that_merging_cannot_mend_is_told_as_it_was_first_said(messages: tuple[Message, ...]) -> None:
    with pytest.raises(RequestError, match="System role not supported"):
        render(NO_SYSTEM, *messages)


# ---- continuing an answer ----------------------------------------------------------------------


def test_a_conversation_that_ends_with_the_assistant_is_continued_from_that_text() -> None:
    prompt = render(CHATML, said("user", "count"), said("assistant", "one, two, "))
    assert prompt == "<|im_start|>user\ncount<|im_end|>\n<|im_start|>assistant\none, two, "


def test_a_template_that_trims_contents_does_not_trim_the_text_to_continue() -> None:
    assert render(NO_SYSTEM, said("user", "count"), said("assistant", " one, ")).endswith("[assistant] one, ")


def test_an_answer_begun_with_nothing_opens_the_assistants_turn() -> None:
    assert render(CHATML, said("user", "hi"), said("assistant", "")).endswith("<|im_start|>assistant\n")


def test_a_system_text_is_merged_also_where_an_answer_is_continued() -> None:
    prompt = render(NO_SYSTEM, said("system", "s"), said("user", "u"), said("assistant", "and then"))
    assert prompt == "[user]s\n\nu</s>\n[assistant]and then"


def test_a_template_that_drops_the_text_to_continue_is_at_fault() -> None:
    source = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(GenerationFailed, match="drops a trailing assistant message"):
        render(source, said("user", "hi"), said("assistant", "one"))


def test_no_text_of_a_user_cuts_the_prompt_short() -> None:
    # While the template runs, a mark stands for the text to continue; this template spells the mark out.
    spelled = render("{{ messages[-1].content | join(' ') }} {{ messages[-1].content }}", said("assistant", "X"))
    mark = spelled.removesuffix("X").replace(" ", "")
    assert mark
    prompt = render(CHATML, said("user", f"before {mark} after"), said("assistant", "one"))
    assert prompt.endswith(f"before {mark} after<|im_end|>\n<|im_start|>assistant\none")


@given(st.text("a<|>\n ñ🚀{%", max_size=12), st.text("a<|>\n ñ🚀{%", max_size=12))
def test_every_text_to_continue_stands_unchanged_at_the_end(question: str, begun: str) -> None:
    prompt = render(CHATML, said("user", question), said("assistant", begun))
    assert prompt == f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{begun}"


# ---- the token at the beginning ----------------------------------------------------------------


def test_a_leading_bos_is_taken_out_where_the_tokenizer_adds_its_own() -> None:
    assert render(NO_SYSTEM, bos_token=BOS, adds_bos=True).startswith("[user]")


def test_a_leading_bos_stays_where_the_tokenizer_adds_none() -> None:
    assert render(NO_SYSTEM, bos_token=BOS, adds_bos=False).startswith("<s>[user]")


def test_only_one_bos_at_the_very_beginning_is_taken_out() -> None:
    source = "{{ bos_token }}{{ bos_token }}{{ messages[0].content }}{{ bos_token }}"
    assert render(source, bos_token=BOS, adds_bos=True) == "<s>hi<s>"


def test_without_a_bos_nothing_is_taken_out() -> None:
    assert render("{{ messages[0].content }}", bos_token="", adds_bos=True) == "hi"


# ---- templates that are at fault ---------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}",
        "{{ ''['__class__'] }}",
        "{{ '' | attr('__class__') }}",
        "{{ [''] | map(attribute='__class__') | list }}",
        "{{ '{0.__class__}'.format('') }}",
        "{{ '{0[__class__]}'.format('') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__ }}",
        "{{ messages[0].__init__.__globals__ }}",
        "{{ raise_exception.__globals__['dt'] }}",
        "{{ strftime_now.__code__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id') }}",
        "{{ namespace.__init__ }}",
        "{{ self.__dict__ }}",
        "{{ self._TemplateReference__context }}",
        "{{ (lipsum | attr('__globals__'))['os'] }}",
        "{% set x = ''.__class__ %}",
        "{% for m in messages %}{% if m.content.__class__ %}{% endif %}{% endfor %}",
    ],
)
def test_20_a_template_that_reaches_for_attributes_is_refused(source: str) -> None:
    with pytest.raises(GenerationFailed, match="chat template fails") as refused:
        render(source)
    assert "unsafe template" in (refused.value.hint or "")


@pytest.mark.parametrize(
    "source", ["{{ messages.append(1) }}", "{{ messages[0].update(role='x') }}", "{{ messages.clear() }}"]
)
def test_20_a_template_cannot_change_the_messages(source: str) -> None:
    messages = [said("user", "hi")]
    with pytest.raises(GenerationFailed):
        render(source, *messages)
    assert messages == [said("user", "hi")]


@pytest.mark.parametrize(
    "source",
    [
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{% extends 'base' %}",
        "{{ open('/etc/passwd') }}",
        "{{ range(10 ** 9) | list }}",
        "{{ 'x' * 10 ** 18 }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content.no_such.thing }}",
        "{{ no_such_function() }}",
        "{{ messages | no_such_filter }}",
        "{{ raise_exception() }}",
        "{{ strftime_now(5) }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    ],
)
def test_20_a_template_that_fails_in_any_other_way_is_at_fault_too(source: str) -> None:
    with pytest.raises(GenerationFailed, match="chat template fails"):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% if %}",
        "{% for m in messages %}",
        "{{ messages ",
        "{% endfor %}",
        "{% no_such_tag %}",
        "{{ 'open }}",
        "{% for a in b %}" * 25 + "{% endfor %}" * 25,
        "{{ " + "(" * 1000 + "1" + ")" * 1000 + " }}",
        "{{ " + "9" * 5000 + " }}",
        "{{ " + "not " * 5000 + "1 }}",
    ],
    ids=["if", "for", "print", "endfor", "tag", "string", "25 loops", "1000 brackets", "5000 digits", "5000 nots"],
)
def test_20_a_template_that_does_not_compile_is_at_fault_before_any_message_comes(source: str) -> None:
    with pytest.raises(GenerationFailed, match="chat template fails"):
        ChatTemplate(source)


WORDS = (
    "{{",
    "}}",
    "{%",
    "%}",
    "{#",
    "#}",
    "for",
    "if",
    "in",
    "end",
    "set",
    "m",
    ".",
    "[",
    "]",
    "(",
    ")",
    "|",
    "'",
    "1",
    "__class__",
)


@given(st.lists(st.sampled_from(WORDS), max_size=12))
def test_20_whatever_a_template_says_the_outcome_is_text_or_an_error_of_ours(words: list[str]) -> None:
    try:
        prompt = render(" ".join(words))
    except (GenerationFailed, RequestError):
        return
    assert isinstance(prompt, str)
