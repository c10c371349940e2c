"""Chat templates: what they see, how they are bounded, where they come from."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from server.api import chat_template
from server.api.chat_template import ChatTemplate, load_chat_template
from server.errors import CheckpointError, InvalidRequestError, SettingsError

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ message['content'].strip() + eos_token }}{% endif %}{% endfor %}"
)
PARTS = (
    "{% for message in messages %}{{ message.role }}:{% for part in message.content %}"
    "{% if part.type == 'text' %}[{{ part.text }}]{% endif %}{% endfor %};{% endfor %}"
)
EITHER = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}[{{ part['text'] }}]{% endfor %}{% endif %};{% endfor %}"
)
THINKING = """
{%- macro shown(content) %}{{ content | trim }}{%- endmacro %}
{%- set ns = namespace(last=messages|length - 1, open=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.open and message.role == 'user' and not (message.content.startswith('<tool>')) %}
        {%- set ns.open = false %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- if messages[0]['role'] == 'system' %}
    {{- '<|sys|>' ~ messages[0].content }}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- set content = message.content if message.content is not none else '' %}
    {%- if '</think>' in content %}
        {%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- if loop.last or loop.index0 % 2 == 0 %}{{ '<think>%s</think>' % thought }}{% endif %}
    {%- endif %}
    {{- '<|' + message.role|upper + '|>' }}
    {{ shown(content) }}{{ [message.role, ns.last] | tojson }}
    {%- if not loop.last %}{{ '\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt is defined and add_generation_prompt %}{{- '<|ASSISTANT|>\n' }}{% endif %}"""
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def turns(*contents: Any) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def test_messages_become_a_prompt() -> None:
    template = ChatTemplate(CHATML, TOKENS)
    assert template.render(turns("Hi", "Hello", "Bye")) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert template.render(turns("Hi"), add_generation_prompt=False) == "<|im_start|>user\nHi<|im_end|>\n"


def test_special_tokens_stand_where_the_template_puts_them() -> None:
    assert (
        ChatTemplate(MISTRAL, TOKENS).render(turns(" Hi", "Yes ", "No"))
        == "<s>[INST] Hi [/INST]Yes</s>[INST] No [/INST]"
    )


@pytest.mark.parametrize("source", [CHATML, MISTRAL])
@pytest.mark.parametrize("last", ["Once upon a ", " time\n", "", "Hi", parts("a", "b "), "{{ bos_token }}"])
def test_a_message_to_continue_ends_the_prompt(source: str, last: Any) -> None:
    template = ChatTemplate(source, TOKENS)
    rendered = template.render(turns("Hi", last), add_generation_prompt=False, continue_final_message=True)
    text = last if isinstance(last, str) else "\n".join(part["text"] for part in last)
    before = template.render(turns("Hi", "~"), add_generation_prompt=False).partition("~")[0]
    assert rendered in (before + text, before + text.lstrip())
    assert not rendered.endswith(("</s>", "<|im_end|>\n"))


def test_a_message_that_the_template_drops_cannot_be_continued() -> None:
    template = ChatTemplate("{{ messages[0].content }}", {})
    with pytest.raises(InvalidRequestError) as caught:
        template.render(turns("a", "b"), continue_final_message=True)
    assert caught.value.param == "continue_final_message"


@pytest.mark.parametrize(
    ("source", "content", "rendered"),
    [
        (CHATML, parts("a", "b"), "<|im_start|>user\na\nb<|im_end|>\n"),
        (PARTS, parts("a", "b"), "user:[a][b];"),
        (PARTS, "ab", "user:[ab];"),
        (EITHER, "ab", "ab;"),
        (EITHER, parts("a", "b"), "[a][b];"),
    ],
)
def test_contents_have_the_form_that_the_template_expects(source: str, content: Any, rendered: str) -> None:
    assert ChatTemplate(source, {}).render(turns(content), add_generation_prompt=False) == rendered


def test_what_templates_use() -> None:
    source = """
    {%- generation %}{% set seen = namespace(count=0) %}{% endgeneration %}
    {%- for message in messages %}
        {%- if loop.index == 2 %}{% continue %}{% endif %}
        {%- if loop.index == 4 %}{% break %}{% endif %}
        {{- loop.index ~ '=' ~ message.content|tojson }}
        {% if tools is none and documents is none %}~{% endif %}
    {% endfor %}
    {{- strftime_now('%Y')|length }}{{ {'b': 1, 'a': '<ü>'}|tojson(sort_keys=true, indent=1) }}"""
    rendered = ChatTemplate(source, {}).render(turns("<a>", "b", "c", "d"))
    assert rendered == '1="<a>"\n~3="c"\n~4{\n "a": "<ü>",\n "b": 1\n}'


def test_documents() -> None:
    template = ChatTemplate("{% for d in documents or [] %}{{ d.title }};{% endfor %}{{ messages[0].content }}", {})
    assert template.reads_documents
    assert template.render(turns("a"), documents=[{"title": "A"}, {"title": "B"}]) == "A;B;a"
    assert template.render(turns("a")) == "a"
    assert not ChatTemplate(CHATML, {}).reads_documents
    assert template.variables == frozenset()


def test_variables_that_the_template_reads() -> None:
    source = "{% set own = 1 %}{% for m in messages %}{{ m.content }}{{ own }}{% endfor %}{{ style }}"
    template = ChatTemplate(source + "{% if enable_thinking is defined and enable_thinking %}T{% endif %}", TOKENS)
    assert template.variables == {"style", "enable_thinking"}
    assert template.render(turns("a"), variables={"style": "x", "enable_thinking": True}) == "a1xT"
    assert template.render(turns("a")) == "a1"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "seconds"),
        (
            "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
            "seconds",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ messages[0].content * 10**9 }}", "characters"),
        ("{{ 10**9 * messages }}", "characters"),
        ("{% for i in range(9999) %}{{ 'x' * 99999 }}{% endfor %}", "characters"),
        ("{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "characters"),
        ("{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}", "characters"),
        ("{{ '%99999999d' % 1 }}", "width"),
        ("{{ (9**999)**999 }}", "bits"),
        ("{% set n = namespace(x=9) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}", "bits"),
        ("{{ range(10**9)|list }}", "range"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages[0].update(role='x') }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{{ gale_budget.__init__.__globals__ }}", "unsafe"),
        ("{% include 'x' %}", "loader"),
        ("{{ nothing.role }}", "undefined"),
        (r"{{ '\ud800' }}", "surrogate"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ raise_exception('No system messages.') }}", "No system messages."),
    ],
)
def test_what_templates_cannot_do(source: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.2)
    monkeypatch.setattr(chat_template, "MAX_CHARACTERS", 1 << 20)
    with pytest.raises(InvalidRequestError) as caught:
        ChatTemplate(source, {}).render(turns("a"))
    assert caught.value.param == "messages"
    assert reason in caught.value.message
    assert len(caught.value.message) < 500


def checkpoint(folder: Path, **files: Any) -> Path:
    """A tokenizer folder; names have ``_dot_`` for the dot."""
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("_dot_", ".")).write_text(text)
    return folder


def source_of(given: str | None, folder: Path) -> str | None:
    template = load_chat_template(given, folder, {})
    return None if template is None else template.source


def test_where_the_checkpoint_keeps_it(tmp_path: Path) -> None:
    assert source_of(None, tmp_path) is None
    checkpoint(tmp_path, tokenizer_config_dot_json={"bos_token": "<s>"})
    assert source_of(None, tmp_path) is None
    checkpoint(tmp_path, chat_template_dot_json={"chat_template": "third"})
    assert source_of(None, tmp_path) == "third"
    checkpoint(tmp_path, tokenizer_config_dot_json={"chat_template": "second"})
    assert source_of(None, tmp_path) == "second"
    checkpoint(tmp_path, chat_template_dot_jinja="first")
    assert source_of(None, tmp_path) == "first"


def test_several_templates_have_names(tmp_path: Path) -> None:
    named = [{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}]
    checkpoint(tmp_path, tokenizer_config_dot_json={"chat_template": named})
    assert source_of(None, tmp_path) == "D"
    assert source_of("rag", tmp_path) == "R"
    checkpoint(tmp_path, tokenizer_config_dot_json={"chat_template": named[:1]})
    assert source_of(None, tmp_path) is None
    with pytest.raises(SettingsError, match="'rag'"):
        load_chat_template("tool_use", tmp_path, {})


def test_a_given_template_is_a_file_or_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tmp_path, chat_template_dot_jinja="own", other_dot_jinja="{{ messages }}")
    monkeypatch.chdir(tmp_path)
    assert source_of("other.jinja", tmp_path) == "{{ messages }}"
    assert source_of(str(tmp_path / "other.jinja"), tmp_path) == "{{ messages }}"
    assert source_of("{{ bos_token }}", tmp_path) == "{{ bos_token }}"
    with pytest.raises(SettingsError, match=r"--chat-template: 'none\.jinja'"):
        load_chat_template("none.jinja", tmp_path, {})
    with pytest.raises(SettingsError, match="--chat-template: line 1"):
        load_chat_template("{% for %}", tmp_path, {})


@pytest.mark.parametrize("value", [5, ["a"], [{"name": "default"}], {"default": "x"}, "{% for %}", "{% unknown %}"])
def test_a_broken_template_is_named(value: Any, tmp_path: Path) -> None:
    checkpoint(tmp_path, tokenizer_config_dot_json={"chat_template": value})
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "tokenizer_config.json"))):
        load_chat_template(None, tmp_path, {})


def test_transformers_renders_the_same() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    for source in (CHATML, MISTRAL, PARTS, EITHER, THINKING):
        template = ChatTemplate(source, TOKENS)
        takes_parts = source in (PARTS, EITHER)
        for messages in (turns("Hi"), turns("Hi  ", "<think>\nhm\n</think>\n <b>Hello</b> ", "ünï\n\n")):
            if source == THINKING:
                messages = [{"role": "system", "content": "Be brief."}, *messages]
            if takes_parts:
                messages = [message | {"content": parts(message["content"])} for message in messages]
            for begin in (False, True):
                (expected,), _ = render_jinja_template(
                    [messages], chat_template=source, add_generation_prompt=begin, **TOKENS
                )
                assert template.render(messages, add_generation_prompt=begin) == expected
