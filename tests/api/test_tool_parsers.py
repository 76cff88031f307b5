"""Tool calls in text: found however the text is cut into pieces; what is no call stays prose."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.api.parts import (
    Call,
    CallArguments,
    CallBegun,
    CallBroken,
    CallEnded,
    Part,
    Text,
    joined,
)
from appliance.api.tool_parsers import FORMATS
from appliance.api.tool_parsers.hermes import HermesCalls
from appliance.api.tool_parsers.llama import LlamaCalls
from appliance.api.tool_parsers.reader import CallReader, State

NAMES = ("weather", "add", 'say "hi"')


def run(make, pieces, *, eager: bool = False, max_calls: int | None = None) -> list[Part]:
    parser = make(NAMES, eager=eager, max_calls=max_calls)
    parts = [part for piece in pieces for part in parser.push(piece)]
    return parts + parser.flush()


def read(make, text: str, **options) -> tuple[str, list[Call]]:
    """Prose and calls, the same whether the text comes whole or letter by letter."""
    whole = joined(run(make, [text], **options))
    assert joined(run(make, list(text), **options)) == whole
    parts = run(make, list(text), eager=True, **options)
    if not any(isinstance(part, CallBroken) for part in parts):
        assert joined(parts) == whole
    assert whole[1] == ""
    return whole[0], whole[2]


def hermes(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


PARIS = '{"city": "Paris", "n": [1, {"a": "}"}]}'
CALL = Call(name="weather", arguments=PARIS)


# --- Hermes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "prose", "calls"),
    [
        (hermes("weather", PARIS), "", [CALL]),
        ("Let me look.\n\n" + hermes("weather", PARIS), "Let me look.", [CALL]),
        (hermes("weather", PARIS) + "\nDone.", "Done.", [CALL]),
        (hermes("weather", PARIS) + "\n" + hermes("add", "{}") + "\n", "",
         [CALL, Call(name="add", arguments="{}")]),
        (hermes("weather", PARIS) + " and " + hermes("add", "{}"), "and",
         [CALL, Call(name="add", arguments="{}")]),
        ('<tool_call>{"name":"add","arguments":{}}</tool_call>', "",
         [Call(name="add", arguments="{}")]),
        ('<tool_call>\n{"name": "add", "arguments": {"a": 1}}', "",
         [Call(name="add", arguments='{"a": 1}')]),
        ('<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n', "",
         [Call(name="add", arguments='{"a": 1}')]),
        ('<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>', "",
         [Call(name="add", arguments='{"a": 1}')]),
        ('<tool_call>{"name": "add", "parameters": {"a": "\\u00e9\\n"}}</tool_call>', "",
         [Call(name="add", arguments='{"a": "\\u00e9\\n"}')]),
        ('<tool_call>{"type": "function", "name": "add", "arguments": {}}</tool_call>', "",
         [Call(name="add", arguments="{}")]),
        ('<tool_call>{"name": "add"}</tool_call>', "", [Call(name="add", arguments="{}")]),
        ('<tool_call>{"name": "add", "arguments": null}</tool_call>', "",
         [Call(name="add", arguments="{}")]),
        ('<tool_call>{"name": "add", "arguments": "{\\"a\\": 2}"}</tool_call>', "",
         [Call(name="add", arguments='{"a": 2}')]),
        ('<tool_call>{"name": "say \\"hi\\"", "arguments": {"t": "</tool_call>"}}</tool_call>', "",
         [Call(name='say "hi"', arguments='{"t": "</tool_call>"}')]),
    ],
)  # fmt: skip
def test_a_hermes_call_is_found(text, prose, calls):
    assert read(HermesCalls, text) == (prose, calls)
    for call in calls:
        assert isinstance(json.loads(call.arguments), dict)


@pytest.mark.parametrize(
    "text",
    [
        "no call at all",
        " leading and trailing \n",
        "a < b and <tool_ca is nothing",
        "<tool_call>",
        "<tool_call>\n",
        "<tool_call>hello</tool_call>",
        "<tool_call>[1]</tool_call>",
        '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
        '<tool_call>{"arguments": {}, "name": "unknown"}</tool_call>',
        '<tool_call>{"name": "add", "arguments": {"a": 1}',
        '<tool_call>{"name": "add", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "add", "arguments": "nothing"}</tool_call>',
        '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>',
        '<tool_call>{"name": "add", "arguments": {"a": "line\nbreak"}}</tool_call>',
        '<tool_call>{"name": "add", "arguments": {"a": 1]}}</tool_call>',
        '<tool_call>{"name": "add", "arguments": {"a": 1,}}</tool_call>',
        '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
        '<tool_call>{"city": "Paris"}</tool_call>',
        "<tool_call>{}</tool_call>",
        "x </tool_call> y",
    ],
)
def test_what_is_no_hermes_call_stays_prose(text):
    assert read(HermesCalls, text) == (text, [])


def test_a_call_after_a_malformed_one_is_found():
    bad = '<tool_call>\n{"name": "add", "arguments": {"a": }\n</tool_call>\n'
    assert read(HermesCalls, bad + hermes("weather", PARIS)) == (bad.rstrip(), [CALL])
    bad = '<tool_call>\n{"name": "other"}\n</tool_call>\n'
    assert read(HermesCalls, bad + hermes("weather", PARIS)) == (bad.rstrip(), [CALL])


def test_a_stray_bracket_behind_a_call_is_prose():
    text = '<tool_call>{"name": "add", "arguments": {}}}</tool_call>'
    assert read(HermesCalls, text) == ("}</tool_call>", [Call(name="add", arguments="{}")])


def test_an_eager_reader_tells_name_and_arguments_as_they_come():
    text = hermes("weather", '{"city": "Paris"}')
    parser = HermesCalls(NAMES, eager=True, max_calls=None)
    told = {size: parser.push(letter) for size, letter in enumerate(text)}
    parts = [part for step in told.values() for part in step]
    assert parts[0] == CallBegun(name="weather")
    assert parts[-1] == CallEnded()
    pieces = [part.text for part in parts if isinstance(part, CallArguments)]
    assert pieces == list('{"city": "Paris"}')
    assert told[text.index('{"city"')][0] == CallBegun(name="weather")
    assert parser.flush() == []


def test_an_eager_call_that_breaks_off_is_not_ended():
    text = '<tool_call>{"name": "add", "arguments": {"a": 1'
    parts = run(HermesCalls, list(text), eager=True)
    assert isinstance(parts[-1], CallBroken)
    assert CallEnded() not in parts
    assert joined(parts) == ("", "", [])


def test_an_eager_call_that_turns_out_malformed_is_broken_and_the_rest_is_prose():
    parts = run(HermesCalls, ['<tool_call>{"name": "add", "arguments": {"a": ', "1]} and more"],
                eager=True)  # fmt: skip
    assert CallBroken() in parts
    assert CallEnded() not in parts
    assert joined(parts)[0].endswith("1]} and more")


def test_only_what_may_be_a_tag_is_kept_back():
    parser = HermesCalls(NAMES, eager=True, max_calls=None)
    assert parser.push("Hello") == [Text(text="Hello")]
    assert parser.push(" there") == [Text(text=" there")]
    assert parser.push(" ") == []
    assert parser.push("<") == []
    assert parser.push("b") == [Text(text=" <b")]
    assert parser.push(" <tool_") == []
    assert parser.push("box") == [Text(text=" <tool_box")]


def test_no_more_calls_than_allowed():
    text = hermes("add", "{}") + hermes("weather", PARIS) + "and so on"
    assert read(HermesCalls, text, max_calls=1) == ("", [Call(name="add", arguments="{}")])
    text = '{"name": "add"}; {"name": "add"} x'
    assert read(LlamaCalls, text, max_calls=1) == ("", [Call(name="add", arguments="{}")])


def test_a_text_full_of_broken_calls_is_read_in_bounded_time():
    text = '<tool_call>{"id":"' * 20_000
    assert read_once(text) == (text, "", [])
    text = '<tool_call>{"name": "nobody"}' * 5_000
    assert read_once(text) == (text, "", [])


def read_once(text: str) -> tuple[str, str, list[Call]]:
    return joined(run(HermesCalls, [text]))


# --- Llama ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        (f'{{"name": "weather", "parameters": {PARIS}}}', [CALL]),
        (f'<|python_tag|>{{"name": "weather", "parameters": {PARIS}}}', [CALL]),
        (f'\n {{"type": "function", "name": "weather", "parameters": {PARIS}}}\n', [CALL]),
        (f'{{"name": "weather", "parameters": {PARIS}}}; {{"name": "add", "parameters": {{}}}}',
         [CALL, Call(name="add", arguments="{}")]),
        (f'{{"name": "weather", "parameters": {PARIS}}}\n{{"name": "add"}}',
         [CALL, Call(name="add", arguments="{}")]),
    ],
)  # fmt: skip
def test_a_llama_call_is_found(text, calls):
    assert read(LlamaCalls, text) == ("", calls)


@pytest.mark.parametrize(
    "text",
    [
        "prose",
        'prose {"name": "add", "parameters": {}}',
        '{"answer": {"name": "add"}}',
        '{"name": "nobody", "parameters": {}}',
        '<|python_tag|>search.call(query="x")',
        "<|python",
        "{",
        '{"name": "add", "parameters": {"a": 1}',
        '{"name": "add", "parameters": {"a": 1]}',
        "\n",
    ],
)
def test_what_is_no_llama_call_stays_prose(text):
    assert read(LlamaCalls, text) == (text, [])


def test_prose_behind_llama_calls_is_prose():
    text = '{"name": "add", "parameters": {}} Done {"name": "add"}'
    prose, calls = read(LlamaCalls, text)
    assert (prose, len(calls)) == ('Done {"name": "add"}', 1)


# --- properties -----------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.floats(allow_nan=False,
                                                                                allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner,
                                                                max_size=3),
    max_leaves=6,
)  # fmt: skip
OBJECTS = st.dictionaries(st.text(max_size=5), VALUES, max_size=4)
SCRAPS = st.lists(
    st.sampled_from(
        [
            *("<tool_call>", "</tool_call>", "<|python_tag|>", "word", " ", "\n", ";", "<", ","),
            *('{"name": "add", "arguments": {', '{"name": "weather", "parameters": {}}'),
            *('"', "}", "}}", "\\", "[", "]", '"a": 1'),
        ]
    ),
    max_size=12,
).map("".join)


@given(st.lists(st.tuples(st.sampled_from(NAMES[:2]), OBJECTS), max_size=3), st.booleans())
def test_every_written_call_is_read_back(calls, ascii_only):
    texts = [(name, json.dumps(value, ensure_ascii=ascii_only)) for name, value in calls]
    expected = [Call(name=name, arguments=text) for name, text in texts]
    assert read(HermesCalls, "\n".join(hermes(*pair) for pair in texts)) == ("", expected)
    bare = ";".join(f'{{"name": "{name}", "parameters": {text}}}' for name, text in texts)
    assert read(LlamaCalls, bare) == ("", expected)


@pytest.mark.parametrize("make", [fmt.make for fmt in FORMATS.values()])
@given(text=SCRAPS)
def test_no_text_breaks_a_parser_nor_does_its_division_into_pieces_matter(make, text):
    prose, calls = read(make, text)
    assert not set(prose) - set(text)
    for call in calls:
        assert isinstance(json.loads(call.arguments), dict)
        assert call.name in NAMES


@given(SCRAPS)
def test_an_eager_call_that_ended_is_one_and_text_is_never_lost_before_it(text):
    parts = run(HermesCalls, list(text), eager=True)
    open_call = False
    for part in parts:
        match part:
            case CallBegun():
                assert not open_call
                open_call = True
            case CallArguments():
                assert open_call
            case CallEnded() | CallBroken():
                assert open_call
                open_call = False
            case _:
                assert not open_call
    assert not open_call


def test_a_reader_gives_back_what_follows_the_object():
    reader = CallReader(NAMES, eager=False)
    reader.push('{"name": "add"} tail')
    assert (reader.state, reader.rest) == (State.DONE, " tail")
