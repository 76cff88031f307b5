"""What a task is, and the material every task draws from: words, colors, numbers, the split."""

import random
import zlib
from collections.abc import Mapping
from typing import Any, Literal

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
MAX_NUMBER = 99
_ONE_DIGIT_FRACTION = 0.35
_HELD_OUT_ONE_IN = 10

Split = Literal["any", "train", "held_out"]
Message = Mapping[str, Any]


class Task(msgspec.Struct, frozen=True):
    """One question with its only right answer.

    `name` is a key of `TASKS` or `CHAT_TASKS`; `key` identifies the content without its wording;
    `is_held_out` says that training never sees this content (for `spell`: this word in this
    wording). `messages` is the conversation to send, in the form of the chat completions API, and
    `tools` what goes with it; `prompt` is the text of its last user message. For a name of
    `TASKS` the prompt alone is the conversation.
    """

    name: str
    prompt: str
    answer: str
    key: str
    is_held_out: bool
    messages: tuple[Message, ...] = ()
    tools: tuple[Message, ...] = ()

    def __post_init__(self) -> None:
        """A task without messages of its own is asked with its prompt alone."""
        if not self.messages:
            msgspec.structs.force_setattr(self, "messages", (user_message(self.prompt),))


def user_message(text: str) -> Message:
    """`text` as a message of the user."""
    return {"role": "user", "content": text}


def checksum_holds_out(name: str, key: str) -> bool:
    """Whether the content `key` of the kind `name` is kept from training (one in ten is)."""
    return zlib.crc32(f"{name}:{key}".encode()) % _HELD_OUT_ONE_IN == 0


def draw_number(rng: random.Random) -> int:
    """A number of one or two digits, both lengths often: short sums teach the long ones."""
    return rng.randint(0, 9) if rng.random() < _ONE_DIGIT_FRACTION else rng.randint(10, MAX_NUMBER)


def fits(task: Task, split: Split) -> bool:
    """Whether `task` belongs to `split`."""
    return split == "any" or task.is_held_out == (split == "held_out")
