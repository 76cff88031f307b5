"""What a key of the configuration may be, in the words of somebody who fills it in."""

from msgspec import inspect


def expected_words(kind: inspect.Type) -> str:
    """`an integer from 0 to 65535`, `one of: a, b`, `true or false`; empty for what has no short
    words."""
    match kind:
        case inspect.Metadata(type=inner, extra={"unit": "bytes"}):
            return f'{expected_words(inner)} (bytes), or a size such as "256MiB"'
        case inspect.Metadata(type=inner):
            return expected_words(inner)
        case inspect.BoolType():
            return "true or false"
        case inspect.IntType():
            return "an integer" + _range(kind)
        case inspect.FloatType():
            return "a number" + _range(kind)
        case inspect.StrType(pattern=None):
            return "a text in quotes"
        case inspect.StrType(pattern=pattern):
            return f"a text that matches {pattern}"
        case inspect.LiteralType(values=values) if len(values) == 1:
            return f'"{values[0]}"'
        case inspect.LiteralType(values=values):
            return "one of: " + ", ".join(str(value) for value in values)
        case inspect.UnionType(types=types):
            words = [expected_words(one) for one in types]
            return " or ".join(words) if all(words) else ""
        case inspect.VarTupleType(item_type=item) | inspect.ListType(item_type=item):
            return f"a list, each {each}" if (each := expected_words(item)) else ""
        case _:
            return ""


def _range(kind: inspect.IntType | inspect.FloatType) -> str:
    if kind.ge is not None and kind.le is not None:
        return f" from {kind.ge} to {kind.le}"
    bounds = [(" of at least", kind.ge), (" above", kind.gt), (" of at most", kind.le)]
    return " and".join(f"{words} {bound}" for words, bound in bounds if bound is not None)
