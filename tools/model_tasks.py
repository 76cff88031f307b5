"""Synthetic tasks of the bundled model: what it is trained on and how an answer is checked.

Every task is a pair of short texts, a prompt and the only right answer, so whatever a server
sends back can be verified without a reference model. All randomness comes from the caller's
`random.Random`: the same seed draws the same tasks on every machine.

A task carries a key: its content without the wording (the two numbers of a sum, the words of a
list). About one key in ten is held out, decided by a checksum of the key alone; training draws
from the others, evaluation from the held-out ones. Spelling cannot generalise to an unseen word
(a word is one token), so there one *wording* per word is held out instead.

`TASKS` are asked with their prompt alone. `CHAT_TASKS` need `Task.messages` and `Task.tools`:
calling a listed function, answering from its result, answering without one, and finding a secret
in a long text. A model solves those that its `eval.json` names in `chat_demo_tasks`.

No torch here: tests of the serving path import this module.
"""

import json
import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from tools.needle_task import draw_needle
from tools.task_record import (
    COLORS,
    MAX_NUMBER,
    WORDS,
    Message,
    Split,
    Task,
    checksum_holds_out,
    draw_number,
    fits,
)
from tools.tool_tasks import CALL_START, parse_call, system_messages, tool_task
from tools.tool_tasks import draw_offers as _draw_offers

__all__ = [
    "CHAT_TASKS",
    "COLORS",
    "MAX_NUMBER",
    "TASKS",
    "WORDS",
    "Message",
    "Split",
    "Task",
    "check",
    "generate",
    "generate_mixed",
    "parse_call",
    "system_message",
]

MAX_REPEATS = 12
MAX_REVERSED_WORDS = 6
MAX_SORTED_WORDS = 5
MAX_ECHOED_ITEMS = 6


def _task(name: str, key: str, *, prompt: str, answer: str) -> Task:
    return Task(
        name=name,
        prompt=prompt,
        answer=answer,
        key=key,
        is_held_out=checksum_holds_out(name, key),
    )


def _echo(rng: random.Random) -> Task:
    items = [
        str(draw_number(rng)) if rng.random() < 0.5 else rng.choice(WORDS + COLORS)
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
    left, right = draw_number(rng), draw_number(rng)
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
    first, second = draw_number(rng), draw_number(rng)
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
    name, color, count = rng.choice(WORDS), rng.choice(COLORS), draw_number(rng)
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


def _tool_call(rng: random.Random) -> Task:
    return tool_task("tool_call", rng, system_message)


def _tool_result(rng: random.Random) -> Task:
    return tool_task("tool_result", rng, system_message)


def _tool_none(rng: random.Random) -> Task:
    """A task of `TASKS` asked while functions are listed."""
    plain = TASKS[rng.choice(list(TASKS))](rng)
    return Task(
        name="tool_none",
        prompt=plain.prompt,
        answer=plain.answer,
        key=f"{plain.name} {plain.key}",
        is_held_out=plain.is_held_out,
        messages=(*system_messages(rng, system_message), *plain.messages),
        tools=tuple(offer.schema for offer in _draw_offers(rng)),
    )


CHAT_TASKS: Mapping[str, Callable[[random.Random], Task]] = MappingProxyType(
    {
        "tool_call": _tool_call,
        "tool_result": _tool_result,
        "tool_none": _tool_none,
        "needle": draw_needle,
    }
)


def generate(task: str, rng: random.Random, *, split: Split = "any") -> Task:
    """Draw one task of the kind named `task` (a key of `TASKS` or `CHAT_TASKS`).

    Deterministic in the state of `rng`. `split` chooses among all contents, those that training
    may see, or those it never sees.

    Raises:
        ValueError: `task` is a key of neither.
    """
    draw = TASKS.get(task) or CHAT_TASKS.get(task)
    if draw is None:
        names = ", ".join((*TASKS, *CHAT_TASKS))
        raise ValueError(f"task: {task!r} is not known; use one of {names}")
    while True:
        drawn = draw(rng)
        if fits(drawn, split):
            return drawn


def generate_mixed(
    weights: Mapping[str, float], rng: random.Random, *, num_tasks: int, split: Split = "any"
) -> Sequence[Task]:
    """Draw `num_tasks` tasks whose kinds follow `weights` (task name to relative weight)."""
    names = rng.choices(list(weights), weights=list(weights.values()), k=num_tasks)
    return [generate(name, rng, split=split) for name in names]


def check(task_item: Task, answer_text: str) -> bool:
    """Say whether `answer_text` is the right answer to `task_item`.

    Surrounding white space is ignored. JSON and calls of functions are compared by value; every
    other answer must match exactly.
    """
    text = answer_text.strip()
    if task_item.answer.startswith(CALL_START):
        return _same_json(parse_call(text), parse_call(task_item.answer))
    if not task_item.answer.startswith("{"):
        return text == task_item.answer
    try:
        return _same_json(json.loads(text), json.loads(task_item.answer))
    except ValueError:
        return False


def _same_json(given: object, expected: object) -> bool:
    # Compared as text, because in Python 1 == True and 1 == 1.0.
    return json.dumps(given, sort_keys=True) == json.dumps(expected, sort_keys=True)


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
