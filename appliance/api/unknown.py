"""Fields inside the objects of a body that nobody looks at: `stream_options.x`,
`messages.cache_control`. The body has been checked against the schema before."""

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
from msgspec import inspect

MAX_DEPTH = 8


def kinds_of(schema: type[msgspec.Struct]) -> Mapping[str, inspect.Type]:
    """The type of each field of a body, by its name in JSON."""
    kind = inspect.type_info(schema)
    if not isinstance(kind, inspect.StructType):
        raise TypeError(f"{schema} is not a struct")
    return {field.encode_name: field.type for field in kind.fields}


def unknown_fields(
    value: Any, kind: inspect.Type, at: str, *, depth: int = MAX_DEPTH
) -> Iterator[str]:
    """Dotted names below `at` that `kind` has no field for, without the positions in lists. What is
    free in the schema (a table of template variables, a JSON schema) is not looked into."""
    if depth == 0:
        return
    match value:
        case dict():
            struct = _struct_of(kind)
            if struct is None:
                return
            fields = {field.encode_name: field.type for field in struct.fields}
            for name, inner in value.items():
                if name not in fields:
                    if name != struct.tag_field:
                        yield f"{at}.{name}"
                elif isinstance(inner, dict | list):
                    yield from unknown_fields(inner, fields[name], f"{at}.{name}", depth=depth - 1)
        case list():
            item = _item_of(kind)
            if item is not None:
                for inner in value:
                    if isinstance(inner, dict | list):
                        yield from unknown_fields(inner, item, at, depth=depth - 1)


def _struct_of(kind: inspect.Type) -> inspect.StructType | None:
    """The only kind of object that is possible here."""
    found = [each for each in _choices(kind) if isinstance(each, inspect.StructType)]
    return found[0] if len(found) == 1 else None


def _item_of(kind: inspect.Type) -> inspect.Type | None:
    found = [each.item_type for each in _choices(kind) if isinstance(each, inspect.ListType)]
    return found[0] if len(found) == 1 else None


def _choices(kind: inspect.Type) -> tuple[inspect.Type, ...]:
    return kind.types if isinstance(kind, inspect.UnionType) else (kind,)
