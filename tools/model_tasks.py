"""Synthetic tasks of the bundled model: what it is trained on and how an answer is checked.

Every task is a pair of short texts, a prompt and the only right answer, so whatever a server
sends back can be verified without a reference model. All randomness comes from the caller's
`random.Random`: the same seed draws the same tasks on every machine.

A task carries a key: its content without the wording (the two numbers of a sum, the words of a
list). About one key in ten is held out, decided by a checksum of the key alone; training draws
from the others, evaluation from the held-out ones. Spelling cannot generalise to an unseen word
(a word is one token), so there one *wording* per word is held out instead.

No torch here: tests of the serving path import this module.
"""

import json
import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal

import msgspec

_WORD_LIST = """
acorn anchor apple badge banjo barrel basket beach beaver berry blanket bottle branch bridge
brush bucket button cabin cactus canoe carpet castle cellar cherry circle clover comet copper
corner cotton cradle crayon daisy desert donkey dragon eagle engine falcon feather fiddle
finger flute forest fossil garden garlic ginger glove guitar hammer harbor hazel helmet honey
island ivory jacket jungle kettle kitten ladder lantern lemon lentil lizard magnet maple
marble meadow melon mirror monkey morning mountain napkin needle ocean olive orange orchid
oyster paddle palace parrot peach pebble pepper pillow planet pocket potato puzzle quartz
quilt rabbit raven ribbon river rocket saddle salmon shadow silver spider spring squirrel
summer teapot temple thunder ticket tiger tulip tunnel turtle valley velvet violin walnut
whistle willow window winter yogurt zipper
"""
WORDS: tuple[str, ...] = tuple(_WORD_LIST.split())
COLORS: tuple[str, ...] = ("black", "blue", "brown", "green", "pink", "red", "white", "yellow")

MAX_REPEATS = 12
MAX_REVERSED_WORDS = 6
MAX_SORTED_WORDS = 5
MAX_NUMBER = 99
MAX_ECHOED_ITEMS = 6
_ONE_DIGIT_FRACTION = 0.35
_HELD_OUT_ONE_IN = 10

Split = Literal["any", "train", "held_out"]


class Task(msgspec.Struct, frozen=True):
    """One question with its only right answer.

    `name` is a key of `TASKS`; `key` identifies the content without its wording; `is_held_out`
    says that training never sees this content (for `spell`: this word in this wording).
    """

    name: str
    prompt: str
    answer: str
    key: str
    is_held_out: bool


def _checksum_holds_out(name: str, key: str) -> bool:
    return zlib.crc32(f"{name}:{key}".encode()) % _HELD_OUT_ONE_IN == 0


def _task(name: str, key: str, *, prompt: str, answer: str) -> Task:
    return Task(
        name=name,
        prompt=prompt,
        answer=answer,
        key=key,
        is_held_out=_checksum_holds_out(name, key),
    )


def _number(rng: random.Random) -> int:
    """A number of one or two digits, both lengths often: short sums teach the long ones."""
    return rng.randint(0, 9) if rng.random() < _ONE_DIGIT_FRACTION else rng.randint(10, MAX_NUMBER)


def _echo(rng: random.Random) -> Task:
    items = [
        str(_number(rng)) if rng.random() < 0.5 else rng.choice(WORDS + COLORS)
        for _ in range(rng.randint(1, MAX_ECHOED_ITEMS))
    ]
    wording = rng.choice(("echo: {items}", "Say: {items}", "Copy this: {items}", "say {items}"))
    given = " ".join(items)
    return _task("echo", given, prompt=wording.format(items=given), answer=given)


def _repeat(rng: random.Random) -> Task:
    word, times = rng.choice(WORDS), rng.randint(1, MAX_REPEATS)
    wording = rng.choice(
        (
            "repeat {word} {times} times",
            "Repeat the word {word} {times} times.",
            "Say {word} {times} times.",
            "Write {word} {times} times",
        )
    )
    prompt = wording.format(word=word, times=times)
    answer = " ".join([word] * times)
    return _task("repeat", f"{word} {times}", prompt=prompt, answer=answer)


def _reverse(rng: random.Random) -> Task:
    words = rng.choices(WORDS, k=rng.randint(2, MAX_REVERSED_WORDS))
    wording = rng.choice(
        (
            "reverse: {words}",
            "Reverse these words: {words}",
            "Reverse the order of the words: {words}",
            "Say this backwards: {words}",
        )
    )
    given = " ".join(words)
    answer = " ".join(reversed(words))
    return _task("reverse", given, prompt=wording.format(words=given), answer=answer)


def _spell(rng: random.Random) -> Task:
    wordings = (
        "spell {word}",
        "Spell the word {word}.",
        "How do you spell {word}?",
        "Spell {word} letter by letter.",
    )
    word, index = rng.choice(WORDS), rng.randrange(len(wordings))
    return Task(
        name="spell",
        prompt=wordings[index].format(word=word),
        answer=" ".join(word),
        key=f"{word} {index}",
        is_held_out=zlib.crc32(word.encode()) % len(wordings) == index,
    )


def _add(rng: random.Random) -> Task:
    left, right = _number(rng), _number(rng)
    wording = rng.choice(
        (
            "{left}+{right}=?",
            "add {left} and {right}",
            "What is {left} + {right}?",
            "What is {left} plus {right}?",
        )
    )
    key = f"{min(left, right)} {max(left, right)}"
    prompt = wording.format(left=left, right=right)
    return _task("add", key, prompt=prompt, answer=str(left + right))


def _subtract(rng: random.Random) -> Task:
    first, second = _number(rng), _number(rng)
    large, small = max(first, second), min(first, second)
    wording = rng.choice(
        (
            "{large}-{small}=?",
            "subtract {small} from {large}",
            "What is {large} - {small}?",
            "What is {large} minus {small}?",
        )
    )
    prompt = wording.format(large=large, small=small)
    return _task("subtract", f"{large} {small}", prompt=prompt, answer=str(large - small))


def _json(rng: random.Random) -> Task:
    name, color, count = rng.choice(WORDS), rng.choice(COLORS), _number(rng)
    wording = rng.choice(
        (
            "json: name {name}, color {color}, count {count}",
            "Write as JSON: name {name}, color {color}, count {count}",
            "Make a JSON object with name {name}, color {color} and count {count}.",
            "As JSON please: the name is {name}, the color is {color}, the count is {count}.",
        )
    )
    return _task(
        "json",
        f"{name} {color} {count}",
        prompt=wording.format(name=name, color=color, count=count),
        answer=json.dumps({"name": name, "color": color, "count": count}),
    )


def _sort(rng: random.Random) -> Task:
    words = rng.sample(WORDS, k=rng.randint(2, MAX_SORTED_WORDS))
    wording = rng.choice(
        (
            "sort: {words}",
            "Sort these words: {words}",
            "Sort the words from a to z: {words}",
            "Put these words in alphabetical order: {words}",
        )
    )
    given = " ".join(words)
    answer = " ".join(sorted(words))
    return _task("sort", answer, prompt=wording.format(words=given), answer=answer)


TASKS: Mapping[str, Callable[[random.Random], Task]] = MappingProxyType(
    {
        "echo": _echo,
        "repeat": _repeat,
        "reverse": _reverse,
        "spell": _spell,
        "add": _add,
        "subtract": _subtract,
        "json": _json,
        "sort": _sort,
    }
)


def generate(task: str, rng: random.Random, *, split: Split = "any") -> Task:
    """Draw one task of the kind named `task` (a key of `TASKS`).

    Deterministic in the state of `rng`. `split` chooses among all contents, those that training
    may see, or those it never sees.

    Raises:
        ValueError: `task` is not a key of `TASKS`.
    """
    if task not in TASKS:
        raise ValueError(f"task: {task!r} is not known; use one of {', '.join(TASKS)}")
    while True:
        drawn = TASKS[task](rng)
        if split == "any" or drawn.is_held_out == (split == "held_out"):
            return drawn


def generate_mixed(
    weights: Mapping[str, float], rng: random.Random, *, num_tasks: int, split: Split = "any"
) -> Sequence[Task]:
    """Draw `num_tasks` tasks whose kinds follow `weights` (task name to relative weight)."""
    names = rng.choices(list(weights), weights=list(weights.values()), k=num_tasks)
    return [generate(name, rng, split=split) for name in names]


def check(task_item: Task, answer_text: str) -> bool:
    """Say whether `answer_text` is the right answer to `task_item`.

    Surrounding white space is ignored. A JSON answer is compared by value; every other answer
    must match exactly.
    """
    text = answer_text.strip()
    if task_item.name != "json":
        return text == task_item.answer
    try:
        given = json.loads(text)
    except ValueError:
        return False
    # Compared as text again, because in Python 1 == True and 1 == 1.0.
    return json.dumps(given, sort_keys=True) == json.dumps(
        json.loads(task_item.answer), sort_keys=True
    )


def system_message(rng: random.Random) -> str:
    """Draw a system message that does not change any answer."""
    word, color = rng.choice(WORDS), rng.choice(COLORS)
    return rng.choice(
        (
            "You are a helpful assistant.",
            "You are a helpful assistant. Answer briefly.",
            "Answer with the result only.",
            "You answer short questions.",
            "Be brief and correct.",
            f"You are the {color} {word}, a small helper.",
            f"Your name is {word}. Reply to the user with the answer only.",
            f"Today is day {rng.randint(1, 31)}. Do what the user asks.",
        )
    )
