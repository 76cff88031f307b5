"""Tools that a request offers, and whether the model may, must or must not call them."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypeVar

from appliance.api.errors import ApiError, shown
from appliance.api.schemas import ToolBody
from appliance.api.speech import Speech
from appliance.api.validate import invalid
from appliance.core.types import Record

B = TypeVar("B")
Mode: TypeAlias = Literal["none", "auto", "required"]
_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,128}")


class Tool(Record, frozen=True, kw_only=True):
    """A function that the model may call. `parameters` is a JSON schema, None for none."""

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    strict: bool = False
    """Arguments shall follow the schema, whatever the model would write."""

    def for_template(self) -> dict[str, Any]:
        """The form in which chat templates list tools."""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        if self.parameters is not None:
            function["parameters"] = self.parameters
        return {"type": "function", "function": function}


class Choice(Record, frozen=True, kw_only=True):
    """May the model call? `name`: the one tool that it must call."""

    mode: Mode = "auto"
    name: str | None = None


class ToolUse(Record, frozen=True, kw_only=True):
    """What a request says of tools."""

    tools: tuple[Tool, ...] = ()
    choice: Choice = Choice()
    parallel: bool = True
    """More than one call in one answer."""

    @property
    def active(self) -> bool:
        """Whether the prompt lists tools and the answer is searched for calls."""
        return bool(self.tools) and self.choice.mode != "none"

    @property
    def names(self) -> frozenset[str]:
        """Tools that may be called."""
        if self.choice.name is not None:
            return frozenset({self.choice.name})
        return frozenset(tool.name for tool in self.tools)


NO_TOOLS = ToolUse()


def tools_of(bodies: Sequence[ToolBody] | None) -> tuple[Tool, ...]:
    """The tools of a chat request. Raises `ApiError`."""
    return gathered(bodies, _function, name_at="tools[{}].function.name")


def gathered(
    bodies: Sequence[B] | None, read: Callable[[B, str], Tool], *, name_at: str
) -> tuple[Tool, ...]:
    """The tools that a body lists under `tools`; `read` makes one of an entry and the entry's
    place, `name_at` is the place of a name, with one for the index. Raises `ApiError`."""
    tools = tuple(read(body, f"tools[{index}]") for index, body in enumerate(bodies or ()))
    check_names([tool.name for tool in tools], name_at)
    return tools


def _function(body: ToolBody, at: str) -> Tool:
    check_kind(body.type, at)
    function = body.function
    if function is None:
        raise invalid(f"{at}.function", "is missing; give its name and parameters.")
    return Tool(
        name=function.name,
        description=function.description,
        parameters=function.parameters,
        strict=bool(function.strict),
    )


def check_kind(kind: str, at: str) -> None:
    """Raise `ApiError` for tools that a server would have to run itself."""
    if kind != "function":
        raise ApiError(
            f"'{at}.type' is {shown(kind)}; only tools of type 'function' are served.",
            code="unsupported_value",
            param=f"{at}.type",
        )


def check_names(names: Sequence[str], at: str) -> None:
    """Raise `ApiError` unless names can be told apart. `at` has a place for the index."""
    seen: set[str] = set()
    for index, name in enumerate(names):
        if not _NAME.fullmatch(name):
            raise invalid(
                at.format(index),
                f"is {shown(name)}; use 1 to 128 letters, digits, '_', '-' and '.'.",
            )
        if name in seen:
            raise invalid(at.format(index), f"is {shown(name)}, which an earlier tool has.")
        seen.add(name)


def choice_of(value: str | Mapping[str, Any] | None, *, flat: bool = False) -> Choice:
    """`tool_choice` of a chat request; `flat`: of a response, which names a function without an
    object of its own. Raises `ApiError`."""
    match value:
        case None | "auto":
            return Choice()
        case "none":
            return Choice(mode="none")
        case "required":
            return Choice(mode="required")
        case {"type": "function", "function": {"name": str(name)}} if not flat:
            return Choice(mode="required", name=name)
        case {"type": "function", "name": str(name)} if flat:
            return Choice(mode="required", name=name)
    named = '"name": ...' if flat else '"function": {"name": ...}'
    raise ApiError(
        f"'tool_choice' is {shown(value)}; give 'none', 'auto', 'required' or "
        f'{{"type": "function", {named}}}.',
        code="unsupported_value",
        param="tool_choice",
    )


def tool_use(
    tools: tuple[Tool, ...], choice: Choice, *, parallel: bool | None, speech: Speech
) -> ToolUse:
    """Everything a request says of tools, checked against what the model can do. Raises
    `ApiError`."""
    if choice.mode == "required" and not tools:
        raise invalid("tool_choice", "needs 'tools'.")
    if choice.name is not None and choice.name not in {tool.name for tool in tools}:
        raise invalid("tool_choice", f"names {shown(choice.name)}, which is not among 'tools'.")
    several = parallel is not False and not speech.single_call
    use = ToolUse(tools=tools, choice=choice, parallel=several)
    if not use.active:
        return use
    if speech.tool_format is None:
        raise ApiError(
            f"'tools' is not supported: {speech.no_tools}; leave it out.",
            code="unsupported_parameter",
            param="tools",
        )
    return use
