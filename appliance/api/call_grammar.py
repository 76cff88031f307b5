"""The grammar of answers that must, or may, call tools: calls in the model's own form, each with
arguments that follow the tool's schema.

Three kinds of answers:

    calls               one or several, nothing else (a call is required)
    calls or a document one of both (a call may come in place of the JSON that was asked for)
    prose with calls    whatever the model says, but what looks like a call is one

Written in the notation of the llguidance library (Lark with lexemes and `%json`).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from appliance.api.tool_parsers import FORMATS
from appliance.core.types import Record

Styled = Callable[[dict[str, Any], bool], str]
"""A schema that was checked and styled, as JSON; with True what cannot be enforced is left out."""
NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "additionalProperties": False}


class CallTool(Record, frozen=True, kw_only=True):
    """A tool that may be called. Without `strict`, what of its schema cannot be enforced is left
    out."""

    name: str
    parameters: dict[str, Any] | None = None
    strict: bool = False


class CallSpec(Record, frozen=True, kw_only=True):
    """What answers there may be."""

    format: str
    """A name of `tool_parsers.FORMATS`."""
    tools: tuple[CallTool, ...]
    parallel: bool = True
    prose: bool = False
    """Calls may come, or not, and prose around them."""
    document: str = ""
    """A schema that the answer may follow instead; empty for none."""
    lenient: bool = False
    """Of the document's schema: what cannot be enforced is left out."""
    special: tuple[str, ...] = ()
    """Tags that are single tokens of markup."""


def lark_of(spec: CallSpec, styled: Styled) -> str:
    """The grammar. Raises what `styled` raises, and `ValueError` in words."""
    words = FORMATS[spec.format].words
    trigger, between = _literal(words.trigger, spec.special), _literal(words.between, spec.special)
    body = f"{_literal(words.before, spec.special)} fn {_literal(words.after, spec.special)}"
    rules = [f"body: {body}"]
    call = f"{trigger} body".strip()
    calls = f"{call} ({between} {call})*" if spec.parallel else call
    if not spec.prose:
        rules.insert(0, f"start: {calls}{' | document' if spec.document else ''}")
    elif not words.trigger:
        rules.insert(0, f"start: {calls} | PROSE")
        rules.append(r"PROSE: /([^{ \t\r\n<](.|\n)*)?/")
    elif words.trigger in spec.special:
        repeat = "*" if spec.parallel else "?"
        rules.insert(0, f"start: (PROSE {trigger} body){repeat} PROSE")
        rules.append(r"PROSE: /(.|\n)*/")
    else:
        repeat = "(before body)* PROSE" if spec.parallel else "before body | PROSE"
        rules.insert(0, f"start: {repeat}")
        rules.append(rf"before[lazy]: /(.|\n)*{words.trigger}/")
        rules.append(rf"PROSE: /(.|\n)*/ & ~/(.|\n)*{words.trigger}(.|\n)*/")
    rules += _functions(spec, key=words.key, styled=styled)
    if spec.document:
        try:
            document = styled(json.loads(spec.document), spec.lenient)
        except Exception as error:
            error.add_note("in the schema of the answer")
            raise
        rules.append(f"document: %json {document}")
    return "\n".join(rules) + "\n"


def _functions(spec: CallSpec, *, key: str, styled: Styled) -> list[str]:
    """A rule for each tool: its name and its arguments."""
    names, rules = [], []
    for index, tool in enumerate(spec.tools):
        schema = dict(NO_ARGUMENTS if tool.parameters is None else tool.parameters)
        if schema.setdefault("type", "object") != "object":
            raise ValueError(f"the parameters of {tool.name!r} are no object")
        try:
            arguments = styled(schema, not tool.strict)
        except Exception as error:
            error.add_note(f"in the parameters of {tool.name!r}")
            raise
        begin = f"{json.dumps(tool.name)}, {json.dumps(key)}: "
        rules.append(f"fn_{index}: {json.dumps(begin)} %json {arguments}")
        names.append(f"fn_{index}")
    return [f"fn: {' | '.join(names)}", *rules]


def _literal(text: str, special: Sequence[str]) -> str:
    """A text in the notation; tags of markup stand for their tokens."""
    for tag in special:
        if tag in text:
            before, _, after = text.partition(tag)
            return f"{_literal(before, special)} {tag} {_literal(after, special)}".strip()
    return json.dumps(text) if text else ""
