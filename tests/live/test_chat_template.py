"""Chat templates: the dialect of Hugging Face, in a sandbox, with errors a client can read."""

import json
from pathlib import Path
from typing import Any

import pytest

from appliance.live.chat_template import (
    ChatTemplates,
    TemplateFailed,
    TemplateMissing,
    load_templates,
)

USER = [{"role": "user", "content": "hi"}]


def render(source: str, messages: list[dict[str, Any]] | None = None, **options: Any) -> str:
    templates = ChatTemplates({"default": source}, {"bos_token": "<s>", "eos_token": "</s>"})
    return templates.render(messages or USER, **options)


def test_special_tokens_messages_and_the_generation_prompt_are_there() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m['content'] }}{{ eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    assert render(source) == "<s>user:hi</s>assistant:"
    assert render(source, add_generation_prompt=False) == "<s>user:hi</s>"


def test_blocks_are_trimmed_as_template_authors_expect() -> None:
    assert render("  {% if true %}\na\n  {% endif %}\nb") == "a\nb"


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ {'b': 'ä<', 'a': 1} | tojson }}", '{"b": "ä<", "a": 1}'),
        ("{{ [1, 2] | tojson(indent=1) }}", "[\n 1,\n 2\n]"),
        ("{% for i in [1,2,3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1"),
        ("{% generation %}said{% endgeneration %}", "said"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{% set ns = namespace(x=0) %}{% set ns.x = 5 %}{{ ns.x }}", "5"),
        ("{{ documents is none }}{{ tools is none }}", "TrueTrue"),
        ("{{ thinking }}", "on"),
    ],
)
def test_what_templates_use_is_there(source: str, text: str) -> None:
    assert render(source, variables={"thinking": "on"}) == text


def test_a_client_cannot_replace_the_messages_through_the_variables() -> None:
    assert render("{{ messages | length }}", variables={"messages": []}) == "1"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content.missing.deeper }}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ 1 // 0 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ range(1000000) | length }}",
    ],
)
def test_a_template_that_refuses_or_breaks_is_a_typed_error(source: str) -> None:
    with pytest.raises(TemplateFailed, match="the chat template"):
        render(source)


def test_the_words_of_the_template_reach_the_client() -> None:
    with pytest.raises(TemplateFailed, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


def test_r20_a_template_that_does_not_parse_is_refused_at_the_start() -> None:
    with pytest.raises(TemplateFailed, match="does not parse"):
        render("{% if %}")


def test_tools_choose_the_template_made_for_them() -> None:
    templates = ChatTemplates({"default": "plain", "tool_use": "tools"}, {})
    assert templates.render(USER) == "plain"
    assert templates.render(USER, tools=[{"type": "function"}]) == "tools"


def test_a_model_without_a_template_says_what_to_do(tmp_path: Path) -> None:
    templates = load_templates(tmp_path)
    assert templates.names == ()
    with pytest.raises(TemplateMissing, match=r"use /v1/completions, or add chat_template\.jinja"):
        templates.render(USER)


def test_templates_are_found_in_every_place_where_checkpoints_keep_them(tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "one {{ bos_token }}", "bos_token": "B"}))
    assert load_templates(tmp_path).render(USER) == "one B"
    named = [{"name": "default", "template": "two"}, {"name": "tool_use", "template": "x"}]
    config.write_text(json.dumps({"chat_template": named, "bos_token": {"content": "C"}}))
    assert load_templates(tmp_path).render(USER) == "two"
    (tmp_path / "chat_template.jinja").write_text("three {{ bos_token }}")
    assert load_templates(tmp_path).render(USER) == "three C"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("four")
    assert load_templates(tmp_path).names == ("default", "tool_use", "rag")
    config.unlink()
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "D"}))
    assert load_templates(tmp_path).render(USER) == "three D"


def test_templates_say_what_they_are_made_of():
    templates = ChatTemplates(
        {"default": "{% set a = 1 %}{{ messages }}{{ a }}", "tool_use": "{{ tools }}"}, {}
    )
    assert templates.source(tools=True) == "{{ tools }}"
    assert templates.variables(tools=False) == {"messages"}
    assert templates.variables(tools=True) == {"tools"}
    alone = ChatTemplates({"default": "x"}, {})
    assert alone.source(tools=True) == alone.source(tools=False) == "x"
    assert ChatTemplates({}, {}).source(tools=True) == ""
    assert ChatTemplates({}, {}).variables(tools=True) == frozenset()
