"""What an answer must look like: `response_format`, and the `guided_*` fields and
`structured_outputs` that other servers made common.

At most one of them may be given. An answer under a grammar ends where the grammar says so, so what
would keep it from ending there, or let it go on, is refused beside it.
"""

from collections.abc import Sequence

import msgspec

from appliance.api.conversation import Conversation
from appliance.api.errors import ApiError, shown
from appliance.api.grammars import GrammarDesk, Wanted
from appliance.api.schemas import GenerationBody, ResponseFormat
from appliance.api.speech import Speech
from appliance.api.validate import Plan, invalid
from appliance.core.types import Record

ANY_OBJECT = '{"type":"object"}'


class Constrained(Record, frozen=True, kw_only=True):
    """A plan whose answers follow the grammar that was asked for, and what of the schema it does
    not enforce (names for the header of ignored fields)."""

    plan: Plan
    ignored: tuple[str, ...] = ()


async def constrained(desk: GrammarDesk, body: GenerationBody, plan: Plan) -> Constrained:
    """The plan with its grammar, if one was asked for. Raises `ApiError`."""
    wanted = wanted_of(body)
    if wanted is None:
        return Constrained(plan=plan)
    check_end(body, wanted.param)
    known = await desk.compiled(wanted)
    sampling = msgspec.structs.replace(plan.sampling, grammar=known.grammar)
    return Constrained(
        plan=msgspec.structs.replace(plan, sampling=sampling),
        ignored=(wanted.param,) if known.ignored else (),
    )


def check_end(body: GenerationBody, param: str) -> None:
    """Raise `ApiError` for what would keep an answer from ending where `param` says."""
    for name, given in (("ignore_eos", body.ignore_eos), ("min_tokens", body.min_tokens)):
        if given:
            raise ApiError(
                f"'{name}' cannot be combined with '{param}', which says where the answer "
                "ends; leave one of them out.",
                code="unsupported_parameter",
                param=name,
            )


def spoken_plainly(conversation: Conversation, plan: Plan, speech: Speech) -> Conversation:
    """The conversation without thoughts, where the answer follows a grammar from its first token
    on. Raises `ApiError` when the model cannot but think, or when tools are offered too."""
    if not plan.sampling.grammar:
        return conversation
    if conversation.use.active:
        raise ApiError(
            "'tools' cannot be combined with an answer of a fixed form ('response_format', "
            "'guided_...'); leave one out, or set 'tool_choice' to 'none'.",
            code="unsupported_parameter",
            param="tools",
        )
    variables = {**conversation.variables, **speech.quiet("response_format")}
    return msgspec.structs.replace(conversation, variables=variables)


def wanted_of(body: GenerationBody) -> Wanted | None:
    """The one grammar that the body asks for. Raises `ApiError` for several, or for a bad shape."""
    found = [
        wanted
        for wanted in (
            _of_format(body.response_format),
            _of_json("guided_json", body.guided_json),
            _of_regex("guided_regex", body.guided_regex),
            _of_choice("guided_choice", body.guided_choice),
            *_of_outputs(body),
        )
        if wanted is not None
    ]
    if len(found) > 1:
        names = " and ".join(f"'{wanted.param}'" for wanted in found[:2])
        raise ApiError(
            f"{names} both say what the answer must be; give one of them.",
            code="invalid_value",
            param=found[1].param,
        )
    return found[0] if found else None


def _of_format(given: ResponseFormat | None) -> Wanted | None:
    match given:
        case None | ResponseFormat(type="text"):
            return None
        case ResponseFormat(type="json_object"):
            return Wanted(param="response_format", kind="json_schema", text=ANY_OBJECT)
        case ResponseFormat(type="json_schema", json_schema=schema):
            if schema is None:
                raise invalid("response_format.json_schema", "is missing; it is required.")
            param = "response_format.json_schema.schema"
            wanted = _of_json(param, schema.schema)
            if wanted is None:
                raise invalid(param, "is missing; give a JSON schema.")
            return msgspec.structs.replace(wanted, lenient=not schema.strict)
        case _:
            raise ApiError(
                f"'response_format.type' is {shown(given.type)}; served are 'text', 'json_object' "
                "and 'json_schema'.",
                code="unsupported_value",
                param="response_format.type",
            )


def _of_json(param: str, given: msgspec.Raw) -> Wanted | None:
    """A schema, written out or as a string that holds one."""
    raw = bytes(given)
    if raw in (b"", b"null"):
        return None
    text = msgspec.json.decode(raw, type=str) if raw.startswith(b'"') else raw.decode()
    if not text.lstrip().startswith("{"):
        raise invalid(param, "must be a JSON schema: an object, or a string that holds one.")
    return Wanted(param=param, kind="json_schema", text=text)


def _of_regex(param: str, given: str | None) -> Wanted | None:
    if given is None:
        return None
    if not given:
        raise invalid(param, "is empty; leave it out or give a regular expression.")
    return Wanted(param=param, kind="regex", text=given)


def _of_choice(param: str, given: Sequence[str] | None) -> Wanted | None:
    if given is None:
        return None
    if not given or "" in given:
        raise invalid(param, "must have at least one choice, and none that is empty.")
    return Wanted(param=param, kind="choice", text=msgspec.json.encode(given).decode())


def _of_outputs(body: GenerationBody) -> Sequence[Wanted | None]:
    outputs = body.structured_outputs
    if outputs is None:
        return ()
    any_object = None
    if outputs.json_object:
        param = "structured_outputs.json_object"
        any_object = Wanted(param=param, kind="json_schema", text=ANY_OBJECT)
    return (
        _of_json("structured_outputs.json", outputs.json),
        _of_regex("structured_outputs.regex", outputs.regex),
        _of_choice("structured_outputs.choice", outputs.choice),
        any_object,
    )
