"""What a chat template says of tools and thoughts, and what the operator says instead."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from appliance.api.answer import AnswerParser
from appliance.api.errors import ApiError
from appliance.api.settings import ApiSettings
from appliance.api.speech import Reading, Speech, begins_inside, speech_of
from appliance.api.tool_parsers import FORMATS
from appliance.api.tools import Choice, Tool, tool_use
from appliance.live.tokenise import TextService, TextSettings

HERMES = "{% if tools %}{{ tools }} in <tool_call></tool_call>{% endif %}{{ messages }}"
LLAMA = '{% if tools %}{"name": n, "parameters": dictionary of argument name}{% endif %}'
THINKING = "{{ messages }}{% if '</think>' in x %}{% endif %}"
SETTINGS = TextSettings(max_model_len=64, vocab_size=1024, block_tokens=4, hash_key=b"k" * 16)


@pytest.fixture
def speech(tiny_model: Path, tmp_path: Path) -> Iterator[Callable[..., Speech]]:
    """The speech of the bundled tokenizer with another template."""
    services = []

    def make(template: str, **configured: Any) -> Speech:
        shutil.copy(tiny_model / "tokenizer.json", tmp_path)
        config = {"chat_template": template}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        services.append(TextService(tmp_path, SETTINGS))
        return speech_of(services[-1], ApiSettings(**configured))

    yield make
    for service in services:
        service.close()


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (HERMES, "hermes"),
        (LLAMA, "llama3_json"),
        ("{% if not tools is defined %}{% set tools = none %}{% endif %}<|python_tag|>",
         "llama3_json"),
        ("{{ tools }}<tool_call><function=x></tool_call>", None),
        ("{{ tools }}[TOOL_CALLS]", None),
        ("<tool_call>{{ messages }}", None),
        ("{{ messages }}", None),
    ],
)  # fmt: skip
def test_the_form_of_calls_is_read_off_the_template(speech, template, name):
    found = speech(template)
    assert (found.tool_format.name if found.tool_format else None) == name
    assert bool(found.no_tools) is (name is None)


def test_the_operator_knows_better(speech):
    unknown = "{{ tools }} somehow"
    assert speech(unknown, tool_format="llama3_json").tool_format is FORMATS["llama3_json"]
    assert speech(HERMES, tool_format="llama3_json").tool_format is FORMATS["llama3_json"]
    off = speech(HERMES, tool_format="none")
    assert (off.tool_format, "model.tool_format" in off.no_tools) == (None, True)
    assert speech("{{ messages }}", tool_format="hermes").tool_format is None
    assert speech(THINKING).reasons
    assert not speech(THINKING, reasoning="none").reasons
    assert speech(HERMES, reasoning="think").reasons
    assert not speech(HERMES).reasons


def test_thoughts_are_switched_off_where_there_is_a_switch(speech):
    assert speech(HERMES).quiet("effort") == {}
    assert speech(THINKING + "{{ enable_thinking }}").quiet("effort") == {"enable_thinking": False}
    with pytest.raises(ApiError) as caught:
        speech(THINKING).quiet("effort")
    assert caught.value.body.param == "effort"


def test_several_calls_only_where_the_template_takes_them_back(speech):
    tools = (Tool(name="f"),)
    refusing = (
        LLAMA + "{{ raise_exception('This model only supports single tool-calls at once!') }}"
    )
    for template, several in ((LLAMA, True), (refusing, False)):
        found = speech(template)
        assert tool_use(tools, Choice(), parallel=None, speech=found).parallel is several
        assert not tool_use(tools, Choice(), parallel=False, speech=found).parallel


async def test_a_prompt_that_ends_within_thoughts_is_known(tiny_model):
    service = TextService(tiny_model, SETTINGS)
    try:
        for text, inside in (("go <think>\n", True), ("<think> go", False), ("x</think>", False)):
            prompt = await service.encode(text, add_special_tokens=False)
            assert await begins_inside(service, prompt) is inside
    finally:
        service.close()


def test_what_has_nothing_to_be_read_is_plain():
    assert Reading().plain
    assert not Reading(reasons=True).plain
    assert not Reading(stops=("x",)).plain
    reading = Reading(tool_format=FORMATS["hermes"], names={"f"})
    assert not reading.plain
    assert isinstance(reading.parser(eager=True), AnswerParser)
