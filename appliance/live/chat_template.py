"""Chat templates as Hugging Face checkpoints carry them, rendered in a sandbox.

The environment is the one that template authors write for: immutable sandbox, `trim_blocks` and
`lstrip_blocks`, loop controls, `tojson` without HTML escapes, `raise_exception`, `strftime_now`,
the special tokens as variables, and the `{% generation %}` block, which marks text for training
and renders to its body.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from appliance.live.checkpoint import read_json

SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


class TemplateMissing(Exception):
    """The checkpoint has no chat template; the client can use completions instead."""


class TemplateFailed(ValueError):
    """The template refused or broke on these messages; the message is meant for the client."""


class GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` renders to what it encloses."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplates:
    """The templates of one checkpoint by name; `default` is used unless tools ask for
    `tool_use`."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        """Raises `TemplateFailed` when a template does not parse."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._templates = {
                name: environment.from_string(text) for name, text in sources.items()
            }
        except TemplateSyntaxError as error:
            raise TemplateFailed(f"the chat template does not parse: {error}") from error
        self._special_tokens = dict(special_tokens)
        self._sources = dict(sources)
        self._variables = {
            name: frozenset(meta.find_undeclared_variables(environment.parse(text)))
            for name, text in sources.items()
        }

    def source(self, *, tools: bool) -> str:
        """The template that is used with tools, or without; empty when there is none."""
        return self._sources.get(self._name(tools=tools), "")

    def variables(self, *, tools: bool) -> frozenset[str]:
        """Names that this template looks up and does not set itself."""
        return self._variables.get(self._name(tools=tools), frozenset())

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the templates; empty when the checkpoint has none."""
        return tuple(self._templates)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text. Raises `TemplateMissing` or `TemplateFailed`."""
        template = self._templates.get(self._name(tools=bool(tools)))
        if template is None:
            raise TemplateMissing(
                "this model has no chat template; use /v1/completions, or add chat_template.jinja "
                "to the model directory"
            )
        context: dict[str, Any] = {
            **self._special_tokens,
            **(variables or {}),
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return template.render(context)
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise TemplateFailed(f"the chat template refuses these messages: {error}") from error
        except (ArithmeticError, LookupError, RecursionError, OverflowError) as error:
            raise TemplateFailed(f"the chat template fails on these messages: {error}") from error

    def _name(self, *, tools: bool) -> str:
        return "tool_use" if tools and "tool_use" in self._templates else "default"


def load_templates(directory: Path) -> ChatTemplates:
    """Read `tokenizer_config.json`, `special_tokens_map.json` and `*.jinja` of a model
    directory."""
    config = read_json(directory / "tokenizer_config.json") or {}
    tokens = read_json(directory / "special_tokens_map.json") or {}
    special = {
        name: text
        for name in SPECIAL_TOKENS
        if (text := _token_text(config.get(name, tokens.get(name)))) is not None
    }
    return ChatTemplates(_sources(directory, config.get("chat_template")), special)


def _sources(directory: Path, configured: object) -> dict[str, str]:
    sources: dict[str, str] = {}
    if isinstance(configured, str):
        sources["default"] = configured
    elif isinstance(configured, list):
        sources |= {entry["name"]: entry["template"] for entry in configured}
    elif isinstance(configured, dict):
        sources |= configured
    file = directory / "chat_template.jinja"
    if file.is_file():
        sources["default"] = file.read_text(encoding="utf-8")
    for extra in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        sources[extra.stem] = extra.read_text(encoding="utf-8")
    return sources


def _token_text(value: object) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _raise(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
