"""Thoughts are split off at the beginning of an answer and nowhere else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.api.answer import AnswerParser
from appliance.api.parts import Call, joined
from appliance.api.reasoning import ThoughtSplitter
from appliance.api.tool_parsers.hermes import HermesCalls


def split(text: str, *, inside: bool = False) -> tuple[str, str]:
    """Thoughts and prose, the same whether the text comes whole or letter by letter."""
    found = []
    for pieces in ([text], list(text)):
        splitter = ThoughtSplitter(inside=inside)
        told = [splitter.push(piece) for piece in pieces] + [splitter.flush()]
        found.append(("".join(a for a, _ in told), "".join(b for _, b in told)))
    assert found[0] == found[1]
    return found[0]


@pytest.mark.parametrize(
    ("text", "thoughts", "prose"),
    [
        ("<think>\nhm\n</think>\n\nYes.", "hm", "Yes."),
        ("\n<think>a\n\nb</think>c", "a\n\nb", "c"),
        ("<think>\n\n</think>\n\nYes.", "", "Yes."),
        ("Yes.", "", "Yes."),
        (" Yes <think>no</think>", "", " Yes <think>no</think>"),
        ("<thin air", "", "<thin air"),
        ("<think>for ever ", "for ever", ""),
        ("<think>a < b </thin", "a < b </thin", ""),
        ("<think>", "", ""),
        ("<think>a</think>", "a", ""),
        ("<think>a</think>\n", "a", ""),
        ("<", "", "<"),
        ("", "", ""),
        ("  ", "", "  "),
    ],
)
def test_thoughts_that_the_model_opens(text, thoughts, prose):
    assert split(text) == (thoughts, prose)


@pytest.mark.parametrize(
    ("text", "thoughts", "prose"),
    [
        ("hm\n</think>\n\nYes.", "hm", "Yes."),
        ("<think>hm</think>Yes.", "hm", "Yes."),
        ("no end", "no end", ""),
        ("</think>Yes.", "", "Yes."),
        ("  ", "", ""),
        ("\n\nhm ", "hm", ""),
    ],
)
def test_thoughts_that_the_prompt_opened(text, thoughts, prose):
    assert split(text, inside=True) == (thoughts, prose)


@given(st.text("ab <>/\n") | st.lists(st.sampled_from(["<think>", "</think>", "a", " "])).map(
    "".join), st.booleans())  # fmt: skip
def test_how_the_text_is_divided_does_not_matter(text, inside):
    thoughts, prose = split(text, inside=inside)
    assert thoughts == thoughts.strip()
    assert len(thoughts) + len(prose) <= len(text)


def test_only_what_may_be_a_tag_is_kept_back():
    splitter = ThoughtSplitter(inside=True)
    assert splitter.push("one") == ("one", "")
    assert splitter.push(" <") == ("", "")
    assert splitter.push("two") == (" <two", "")
    assert splitter.thinking
    assert splitter.push("</think>") == ("", "")
    assert not splitter.thinking
    assert splitter.push("three") == ("", "three")


def test_thoughts_then_prose_then_a_call():
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    text = f"<think>{call}</think>\nSo: {call}"
    for pieces in ([text], list(text)):
        parser = AnswerParser(
            ThoughtSplitter(inside=False), HermesCalls({"f"}, eager=False, max_calls=None)
        )
        parts = [part for piece in pieces for part in parser.push(piece)] + parser.flush()
        assert joined(parts) == ("So:", call, [Call(name="f", arguments="{}")])
        assert parser.finish_reason("stop") == "tool_calls"
        assert parser.finish_reason("length") == "length"


def test_without_parsers_a_text_is_itself():
    parser = AnswerParser()
    assert joined([*parser.push("a "), *parser.push(""), *parser.push("b"), *parser.flush()]) == (
        "a b",
        "",
        [],
    )
    assert parser.finish_reason("stop") == "stop"


def test_the_stop_string_that_was_hit_is_cut_off_and_named():
    parser = AnswerParser(stops=("END", "THE END"))
    assert joined([*parser.push("an END"), *parser.push(""), *parser.push(" of")])[0] == "an END of"
    parser = AnswerParser(stops=("END", "THE END"))
    parts = [*parser.push("say "), *parser.push("it THE END"), *parser.flush()]
    assert joined(parts)[0] == "say it "
    assert parser.stopped_by == "THE END"
