"""Reading a policy's settings: a typed record, and words for what does not fit."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TypeVar

import msgspec

S = TypeVar("S", bound=msgspec.Struct)


class PolicySettingsError(ValueError):
    """An unknown policy, an unknown setting, or a value of the wrong kind; names the nearest
    known."""


def read_settings(kind: type[S], settings: Mapping[str, object], *, policy: str) -> S:
    """`settings` as the record `kind`. Raises `PolicySettingsError` naming the setting."""
    known = [field.name for field in msgspec.structs.fields(kind)]
    for name in settings:
        if name not in known:
            words = f"policy {policy!r} has no setting {name!r}"
            raise PolicySettingsError(f"{words}; {nearest(name, known)}")
    try:
        return msgspec.convert(dict(settings), kind)
    except msgspec.ValidationError as error:
        raise PolicySettingsError(f"settings of policy {policy!r}: {error}") from error


def nearest(name: str, known: Iterable[str]) -> str:
    """Words that offer the nearest of `known`, or all of them."""
    names = sorted(known)
    close = get_close_matches(name, names, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(names)}" if names else "it has none"
