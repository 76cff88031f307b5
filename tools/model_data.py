"""Rows the bundled models are trained on, and held-out answers to watch while training.

A row is one conversation of a fixed number of tokens; the loss is taken on the assistant's
tokens only. There are three kinds: `plain` (turns of `TASKS`), `tools` (functions are listed and
called, or not needed) and `needle` (a long text, questions about it, then plain
turns). Text is written by the chat template itself, so training sees what a server sends. A batch
depends on the seed, the stage and the step alone.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import msgspec
import torch
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import LlamaForCausalLM

from appliance.live.chat_template import ChatTemplates
from tools.model_files import ASSISTANT, BOS, CHAT_TEMPLATE, END
from tools.model_tasks import CHAT_TASKS, TASKS, Task, generate, generate_mixed, system_message
from tools.needle_task import SECRETS, needle, needle_text, secret_question
from tools.task_record import Message, user_message
from tools.tool_tasks import (
    MAX_TOOLS,
    Offer,
    draw_exchange_in,
    draw_offers,
    system_messages,
)

RowKind = Literal["plain", "tools", "needle"]
TASK_WEIGHTS: Mapping[str, float] = MappingProxyType(
    {
        "add": 26.0,
        "subtract": 22.0,
        "sort": 18.0,
        "reverse": 10.0,
        "echo": 10.0,
        "repeat": 8.0,
        "json": 8.0,
        "spell": 7.0,
    }
)
SYSTEM_MESSAGE_FRACTION = 0.25
NEEDLE_LENGTHS: Mapping[str, int] = MappingProxyType(
    {"needle_300": 300, "needle_1500": 1500, "needle_3400": 3400}
)
WATCHED = (*TASKS, *(name for name in CHAT_TASKS if name != "needle"), *NEEDLE_LENGTHS)
_TOOL_TURNS: Mapping[str, float] = MappingProxyType({"call": 0.65, "none": 0.35})
_MIN_NEEDLE_TOKENS = 80
_ROW_TOKENS_PER_TOOL = 160
_NEEDLE_QUESTIONS_TOKENS = 100


class Mixture(msgspec.Struct, frozen=True, kw_only=True):
    """What the rows of a stage are: relative weights of lengths and of kinds.

    Lists of functions are long: rows shorter than `min_tools_length` hold no tools, and a row
    lists at most one function per 160 of its tokens. `tasks` weighs the tasks of `plain` rows.
    """

    batch_tokens: int
    lengths: Mapping[int, float]
    kinds: Mapping[RowKind, float]
    tasks: Mapping[str, float] = TASK_WEIGHTS
    min_tools_length: int = 256


class Batch(msgspec.Struct, frozen=True):
    """`tokens` int64 [rows, length]; `is_target` bool of the same shape, true on answer tokens."""

    tokens: torch.Tensor
    is_target: torch.Tensor


def assistant_message(text: str) -> Message:
    """`text` as a message of the assistant."""
    return {"role": "assistant", "content": text}


class Encoder:
    """Writes conversations with the chat template and turns them into token ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._templates = ChatTemplates({"default": CHAT_TEMPLATE}, {"bos_token": BOS})
        self._assistant = tokenizer.token_to_id(ASSISTANT)
        self._end = tokenizer.token_to_id(END)

    def opening(self, messages: Sequence[Message], tools: Sequence[Message] = ()) -> list[int]:
        """Start of a conversation: its first token, then `messages`."""
        return self._encode(
            self._templates.render(messages, tools=tools or None, add_generation_prompt=False)
        )

    def turns(self, messages: Sequence[Message]) -> list[int]:
        """More messages of a conversation that has begun."""
        text = self._templates.render(messages, add_generation_prompt=False)
        return self._encode(text.removeprefix(BOS))

    def question(self, messages: Sequence[Message], tools: Sequence[Message] = ()) -> list[int]:
        """A whole conversation that ends where the assistant's answer starts."""
        return self._encode(self._templates.render(messages, tools=tools or None))

    def answer(self, text: str) -> list[int]:
        """An answer with the token that ends it."""
        return [*self._encode(text), *self._encode(END)]

    def target_mask(self, tokens: Sequence[int]) -> list[bool]:
        """Which of `tokens` the assistant says, the end of its turns included."""
        mask, is_answer = [], False
        for token in tokens:
            mask.append(is_answer)
            is_answer = token == self._assistant or (is_answer and token != self._end)
        return mask

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)


class BatchMaker:
    """Draws training batches and held-out questions."""

    def __init__(self, tokenizer: Tokenizer, *, seed: int) -> None:
        self.encoder = Encoder(tokenizer)
        self._seed = seed

    def batch(self, mixture: Mixture, step: int) -> Batch:
        """The batch of `step`: about `mixture.batch_tokens` tokens in rows of one length."""
        rng = random.Random(f"{self._seed}:{step}")
        (length,) = rng.choices(list(mixture.lengths), weights=list(mixture.lengths.values()))
        kinds = {
            kind: weight
            for kind, weight in mixture.kinds.items()
            if kind != "tools" or length >= mixture.min_tools_length
        } or {"plain": 1.0}
        num_rows = max(1, mixture.batch_tokens // length)
        drawn = rng.choices(list(kinds), weights=list(kinds.values()), k=num_rows)
        rows = [self.row(kind, rng, length=length, tasks=mixture.tasks) for kind in drawn]
        return Batch(
            tokens=torch.tensor(rows),
            is_target=torch.tensor([self.encoder.target_mask(row) for row in rows]),
        )

    def row(
        self,
        kind: str,
        rng: random.Random,
        *,
        length: int,
        tasks: Mapping[str, float] = TASK_WEIGHTS,
    ) -> list[int]:
        """The first `length` tokens of one conversation of this kind."""
        match kind:
            case "tools":
                pieces = self._tool_pieces(rng, length)
            case "needle":
                pieces = self._needle_pieces(rng, length)
            case _:
                pieces = self._plain_pieces(rng, tasks)
        row: list[int] = []
        while len(row) < length:
            row += next(pieces)
        return row[:length]

    def _plain_turn(
        self, rng: random.Random, tasks: Mapping[str, float] = TASK_WEIGHTS
    ) -> list[int]:
        (task,) = generate_mixed(tasks, rng, num_tasks=1, split="train")
        return self.encoder.turns((user_message(task.prompt), assistant_message(task.answer)))

    def _plain_opening(self, rng: random.Random) -> list[int]:
        has_system = rng.random() < SYSTEM_MESSAGE_FRACTION
        message = {"role": "system", "content": system_message(rng)}
        return self.encoder.opening((message,) if has_system else ())

    def _plain_pieces(self, rng: random.Random, tasks: Mapping[str, float]) -> Iterator[list[int]]:
        yield self._plain_opening(rng)
        while True:
            yield self._plain_turn(rng, tasks)

    def _tool_pieces(self, rng: random.Random, length: int) -> Iterator[list[int]]:
        max_tools = max(1, min(MAX_TOOLS, length // _ROW_TOKENS_PER_TOOL))
        offers = draw_offers(rng, max_tools=max_tools)
        schemas = [offer.schema for offer in offers]
        yield self.encoder.opening(system_messages(rng, system_message), schemas)
        while True:
            yield self._tool_turn(offers, rng)

    def _tool_turn(self, offers: Sequence[Offer], rng: random.Random) -> list[int]:
        (kind,) = rng.choices(list(_TOOL_TURNS), weights=list(_TOOL_TURNS.values()))
        if kind == "call":
            exchange = draw_exchange_in(offers, rng, split="train")
            return self.encoder.turns((*exchange.messages(), assistant_message(exchange.reply)))
        return self._plain_turn(rng)

    def _needle_pieces(self, rng: random.Random, length: int) -> Iterator[list[int]]:
        room = max(_MIN_NEEDLE_TOKENS, length - _NEEDLE_QUESTIONS_TOKENS)
        num_tokens = rng.randint(_MIN_NEEDLE_TOKENS, room)
        opening = self._plain_opening(rng)
        yield opening
        num_before = len(opening)
        while rng.random() < 0.7 and num_before + num_tokens < room:
            turn = self._plain_turn(rng)
            num_before += len(turn)
            yield turn
        text, values = needle_text(rng, num_tokens=num_tokens)
        for index, kind in enumerate(rng.sample(SECRETS, len(SECRETS))):
            question = secret_question(kind)
            prompt = f"{text}\n{question}" if index == 0 else question
            yield self.encoder.turns((user_message(prompt), assistant_message(values[kind])))
        while True:
            yield self._plain_turn(rng)


def held_out_task(name: str, rng: random.Random) -> Task:
    """A held-out task of the kind `name`, a member of `WATCHED`."""
    if name in NEEDLE_LENGTHS:
        return needle(rng, num_tokens=NEEDLE_LENGTHS[name], split="held_out")
    return generate(name, rng, split="held_out")


def batch_loss(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Mean cross entropy over the answer tokens of `batch` (bfloat16 matrix products)."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=batch.tokens, use_cache=False).last_hidden_state
        is_target = batch.is_target[:, 1:]
        logits = model.lm_head(hidden[:, :-1][is_target])
    return functional.cross_entropy(logits.float(), batch.tokens[:, 1:][is_target])


@torch.no_grad()
def teacher_forced_accuracy(
    model: LlamaForCausalLM, encoder: Encoder, *, names: Sequence[str], num_tasks: int, seed: int
) -> dict[str, float]:
    """Per name, the share of held-out answers whose every token is the most likely one.

    Equal to the share of exact greedy answers, at the price of one forward pass per answer.
    """
    accuracy = {}
    for name in names:
        rng = random.Random(f"{seed}:{name}")
        num_right = 0
        for _ in range(num_tasks):
            task = held_out_task(name, rng)
            answer = encoder.answer(task.answer)
            tokens = encoder.question(task.messages, task.tools) + answer
            output: Any = model(
                torch.tensor([tokens]), use_cache=False, logits_to_keep=len(answer) + 1
            )
            num_right += int(output.logits[0, :-1].argmax(-1).tolist() == answer)
        accuracy[name] = round(num_right / num_tasks, 4)
    return accuracy
