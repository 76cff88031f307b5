"""Random JSON schemas of the kinds that public suites have, every answer to them of bounded length.

One seed, one schema. Bounds are such that an answer fits into `max_tokens` of `bound_of`.
"""

import random
from collections.abc import Callable, Mapping
from typing import Any

Schema = dict[str, Any]
WORDS = ("name", "color", "count", "size", "tags", "owner", "items", "note", "id", "kind")
ANIMALS = ("cat", "dog", "red fox", "owl", "größer", "日本", 'quo"te', "back\\slash", "a/b")
PATTERNS = (
    "^[a-z]{1,6}$",
    "^[A-Z]{2}-[0-9]{3}$",
    "^(red|green|blue)$",
    "^\\d{4}-\\d{2}$",
    "^[^\\s]{2,5}$",
    "^#[0-9a-f]{6}$",
    "^(ab?){1,3}c$",
)
FORMATS = ("date", "time", "uuid", "ipv4")


class Writer:
    """Writes one schema; `kinds` counts what went into it."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(f"schema {seed}")
        self._defs: Schema = {}
        self.kinds: dict[str, int] = {}

    def write(self) -> Schema:
        """A whole schema: an object, or now and then an array or a union."""
        root = self._random.choice((self.object, self.object, self.object, self.array, self.any_of))
        schema = root(0)
        if self._defs:
            schema["$defs"] = self._defs
        return schema

    def value(self, depth: int) -> Schema:
        """Anything; only leaves from a depth of 3 on."""
        leaves: tuple[Callable[[int], Schema], ...] = (
            self.text, self.pattern, self.format, self.integer, self.number, self.enum, self.const,
            self.boolean, self.null, self.types,
        )  # fmt: skip
        branches = (self.object, self.array, self.tuple, self.any_of, self.all_of, self.ref)
        among = leaves if depth >= 3 else (*leaves, *branches, *branches)
        return self._random.choice(among)(depth)

    def _note(self, kind: str) -> None:
        self.kinds[kind] = self.kinds.get(kind, 0) + 1

    def object(self, depth: int) -> Schema:
        self._note("object")
        names = self._random.sample(WORDS, self._random.randint(1, 4 - min(depth, 2)))
        required = [name for name in names if self._random.random() < 0.6]
        if len(required) < len(names):
            self._note("optional")
        schema: Schema = {
            "type": "object",
            "properties": {name: self.value(depth + 1) for name in names},
            "additionalProperties": False,
        }
        if required:
            schema["required"] = required
        return schema

    def array(self, depth: int) -> Schema:
        self._note("array")
        low = self._random.randint(0, 2)
        return {
            "type": "array",
            "items": self.value(depth + 1),
            "minItems": low,
            "maxItems": low + self._random.randint(0, 2),
        }

    def tuple(self, depth: int) -> Schema:
        self._note("tuple")
        items = [self.value(depth + 1) for _ in range(self._random.randint(1, 3))]
        size = len(items)
        return {
            "type": "array",
            "prefixItems": items,
            "items": False,
            "minItems": size,
            "maxItems": size,
        }

    def any_of(self, depth: int) -> Schema:
        self._note("anyOf")
        return {"anyOf": [self.value(depth + 1) for _ in range(self._random.randint(2, 3))]}

    def all_of(self, depth: int) -> Schema:
        self._note("allOf")
        low = self._random.randint(0, 50)
        return {"allOf": [{"type": "integer", "minimum": low}, {"maximum": low + 30}]}

    def ref(self, depth: int) -> Schema:
        self._note("$ref")
        if not self._defs or self._random.random() < 0.5:
            name = f"d{len(self._defs)}"
            self._defs[name] = {}  # named before it is written: no definition refers to itself
            self._defs[name] = self.object(max(depth + 1, 2))
        filled = [name for name, schema in self._defs.items() if schema]
        return {"$ref": f"#/$defs/{self._random.choice(filled)}"}

    def text(self, depth: int) -> Schema:
        self._note("string")
        low = self._random.choice((0, 0, 1, 3))
        return {"type": "string", "minLength": low, "maxLength": low + self._random.randint(1, 8)}

    def pattern(self, depth: int) -> Schema:
        self._note("pattern")
        return {"type": "string", "pattern": self._random.choice(PATTERNS)}

    def format(self, depth: int) -> Schema:
        self._note("format")
        return {"type": "string", "format": self._random.choice(FORMATS)}

    def integer(self, depth: int) -> Schema:
        self._note("integer")
        low = self._random.randint(-1000, 1000)
        schema: Schema = {"type": "integer"}
        schema[self._random.choice(("minimum", "exclusiveMinimum"))] = low
        schema[self._random.choice(("maximum", "exclusiveMaximum"))] = low + 60
        if self._random.random() < 0.3:
            schema["multipleOf"] = self._random.choice((2, 5, 7))
        return schema

    def number(self, depth: int) -> Schema:
        self._note("number")
        low = round(self._random.uniform(-50, 50), 2)
        return {"type": "number", "minimum": low, "maximum": round(low + 10, 2)}

    def enum(self, depth: int) -> Schema:
        self._note("enum")
        values: list[Any] = [*ANIMALS, 1, -2.5, True, None]
        return {"enum": self._random.sample(values, 3)}

    def const(self, depth: int) -> Schema:
        self._note("const")
        return {"const": self._random.choice((*ANIMALS, 7, False, None, [1, "x"], {"a": 1}))}

    def boolean(self, depth: int) -> Schema:
        self._note("boolean")
        return {"type": "boolean"}

    def null(self, depth: int) -> Schema:
        self._note("null")
        return {"type": "null"}

    def types(self, depth: int) -> Schema:
        self._note("types")
        low = self._random.randint(0, 9)
        return {"type": ["integer", "null"], "minimum": low, "maximum": low + 9}


def random_schema(seed: int) -> tuple[Schema, Mapping[str, int]]:
    """The schema of this seed, and how often each kind is in it."""
    writer = Writer(seed)
    return writer.write(), writer.kinds
