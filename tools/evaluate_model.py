"""Measure a bundled model: exact greedy answers on contents that training never saw.

Each answer is generated greedily with transformers, one prompt at a time, from the stored weights
computed in float32, and judged by `tools.model_tasks.check`. Sums and differences are measured
twice, as trained and with two-digit numbers only. Four settings per task of `TASKS`:

* `single`: the prompt alone;
* `system`: a system message, then the prompt;
* `multi_turn`: the prompt after five right answers to other tasks;
* `long`: the prompt after about 2,500 tokens of such a conversation (fewer prompts).

Tasks of `CHAT_TASKS` are measured as drawn (`single`), the secret in a long text also at fixed
lengths. With `--against`, the agreement with another model of the same tokenizer is measured: the
share of tokens of the other model's greedy answers that this one finds most likely too, given the
same tokens before.

    python -m tools.evaluate_model models/tiny-tasks
    python -m tools.evaluate_model models/tiny-tasks-draft --against models/tiny-tasks
"""

import argparse
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import torch
from tokenizers import Tokenizer
from transformers import DynamicCache, LlamaForCausalLM

from tools.model_data import Encoder, assistant_message
from tools.model_tasks import CHAT_TASKS, TASKS, Task, check, generate, generate_mixed
from tools.model_tasks import system_message as draw_system_message
from tools.needle_task import needle
from tools.task_record import Message, user_message

MAX_NEW_TOKENS = 128
LONG_CONTEXT_TOKENS = 2500
NEEDLE_TOKENS = (500, 1000, 2000, 3500)
DEMO_THRESHOLD = 0.90
END_ID = 2


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """How a prompt is embedded; `prompts_divisor` divides the number of prompts.

    `needle_tokens` is the length of the text that hides a secret; 0 leaves it to chance.
    """

    has_system_message: bool = False
    num_earlier_turns: int = 0
    min_context_tokens: int = 0
    needle_tokens: int = 0
    prompts_divisor: int = 1


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """What is measured: a task, for sums also with operands of at least `min_operand` only."""

    task: str
    settings: Mapping[str, Setting]
    min_operand: int = 0

    def draw(self, rng: random.Random, setting: Setting) -> Task:
        """A held-out task of this case."""
        if setting.needle_tokens:
            return needle(rng, num_tokens=setting.needle_tokens, split="held_out")
        while True:
            task = generate(self.task, rng, split="held_out")
            if self.min_operand == 0 or min(map(int, task.key.split())) >= self.min_operand:
                return task


SETTINGS: Mapping[str, Setting] = MappingProxyType(
    {
        "single": Setting(),
        "system": Setting(has_system_message=True),
        "multi_turn": Setting(num_earlier_turns=5),
        "long": Setting(min_context_tokens=LONG_CONTEXT_TOKENS, prompts_divisor=10),
    }
)
ONLY_SINGLE: Mapping[str, Setting] = MappingProxyType({"single": Setting()})
NEEDLE_SETTINGS: Mapping[str, Setting] = MappingProxyType(
    {
        "single": Setting(),
        **{f"{n}_tokens": Setting(needle_tokens=n, prompts_divisor=8) for n in NEEDLE_TOKENS},
    }
)
CASES: Mapping[str, Case] = MappingProxyType(
    {
        **{name: Case(task=name, settings=SETTINGS) for name in TASKS},
        "add_two_digit": Case(task="add", settings=SETTINGS, min_operand=10),
        "subtract_two_digit": Case(task="subtract", settings=SETTINGS, min_operand=10),
        **{name: Case(task=name, settings=ONLY_SINGLE) for name in CHAT_TASKS},
        "needle": Case(task="needle", settings=NEEDLE_SETTINGS),
    }
)


def conversation(
    encoder: Encoder, task: Task, setting: Setting, *, rng: random.Random
) -> tuple[Message, ...]:
    """The messages of a conversation under `setting` that ends with those of `task`."""
    messages: list[Message] = []
    if setting.has_system_message:
        messages.append({"role": "system", "content": draw_system_message(rng)})
    weights = dict.fromkeys(TASKS, 1.0)
    num_turns, num_tokens = 0, len(encoder.opening(messages))
    while num_turns < setting.num_earlier_turns or num_tokens < setting.min_context_tokens:
        (turn,) = generate_mixed(weights, rng, num_tasks=1)
        added = (user_message(turn.prompt), assistant_message(turn.answer))
        messages += added
        num_tokens += len(encoder.turns(added))
        num_turns += 1
    return (*messages, *task.messages)


def conversations(
    encoder: Encoder, name: str, setting_name: str, *, num_prompts: int, seed: int
) -> Iterator[tuple[Task, tuple[Message, ...]]]:
    """The conversations of a case under a setting, each with the task that it ends with."""
    case = CASES[name]
    setting = case.settings[setting_name]
    rng = random.Random(f"{seed}:{name}:{setting_name}")
    for _ in range(max(1, num_prompts // setting.prompts_divisor)):
        task = case.draw(rng, setting)
        yield task, conversation(encoder, task, setting, rng=rng)


@torch.inference_mode()
def answer_ids(model: LlamaForCausalLM, prompt: Sequence[int]) -> list[int]:
    """The greedy answer to `prompt`, with its end token if it has one."""
    cache = DynamicCache(config=model.config)
    ids, answer = list(prompt), list[int]()
    while len(answer) < MAX_NEW_TOKENS:
        output: Any = model(
            torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        ids = [int(output.logits[0, -1].argmax())]
        answer += ids
        if ids == [END_ID]:
            break
    return answer


@torch.inference_mode()
def num_agreeing(model: LlamaForCausalLM, prompt: Sequence[int], answer: Sequence[int]) -> int:
    """How many tokens of `answer` are the most likely ones to `model` too."""
    output: Any = model(
        torch.tensor([[*prompt, *answer]]), use_cache=False, logits_to_keep=len(answer) + 1
    )
    likely = output.logits[0, :-1].argmax(-1).tolist()
    return sum(left == right for left, right in zip(likely, answer, strict=True))


class Measurement(msgspec.Struct, frozen=True):
    """A model directory, opened; `seed` fixes the prompts."""

    tokenizer: Tokenizer
    encoder: Encoder
    model: LlamaForCausalLM
    seed: int

    @classmethod
    def of(cls, model_dir: Path, *, seed: int) -> "Measurement":
        """Open the model in `model_dir`."""
        tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
        model = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        return cls(tokenizer, Encoder(tokenizer), model, seed)

    def prompts(
        self, name: str, setting_name: str, *, num_prompts: int
    ) -> Iterator[tuple[Task, Sequence[int]]]:
        """The prompts of a case under a setting: token ids up to where the answer starts."""
        for task, messages in conversations(
            self.encoder, name, setting_name, num_prompts=num_prompts, seed=self.seed
        ):
            yield task, self.encoder.question(messages, task.tools)

    def accuracy(self, name: str, setting_name: str, *, num_prompts: int) -> dict[str, Any]:
        """Share of right answers of a case under a setting."""
        right: list[bool] = []
        for task, prompt in self.prompts(name, setting_name, num_prompts=num_prompts):
            ids = answer_ids(self.model, prompt)
            right.append(check(task, self.tokenizer.decode(ids, skip_special_tokens=True)))
        return {"count": len(right), "accuracy": round(sum(right) / len(right), 4)}

    def agreement(self, other: "Measurement", name: str, *, num_prompts: int) -> dict[str, Any]:
        """Share of the tokens of `other`'s answers that this model finds most likely too."""
        num_tokens, num_equal = 0, 0
        for _, prompt in self.prompts(name, "single", num_prompts=num_prompts):
            answer = answer_ids(other.model, prompt)
            num_tokens += len(answer)
            num_equal += num_agreeing(self.model, prompt, answer)
        return {"tokens": num_tokens, "agreement": round(num_equal / num_tokens, 4)}


def evaluate(measured: Measurement, *, names: Sequence[str], num_prompts: int) -> dict[str, Any]:
    """Accuracy per case and setting."""
    cases: dict[str, Any] = {}
    for name in names:
        cases[name] = {
            setting: measured.accuracy(name, setting, num_prompts=num_prompts)
            for setting in CASES[name].settings
        }
        print(name, {key: value["accuracy"] for key, value in cases[name].items()}, flush=True)
    return cases


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate a model directory and write `eval.json` into it."""
    parser = argparse.ArgumentParser(description="Measure a bundled model.")
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--against", type=Path, help="a model to measure the agreement with")
    parser.add_argument("--num-prompts", type=int, default=200)
    parser.add_argument("--seed", type=int, default=30_000)
    parser.add_argument("--threads", type=int, default=1)
    parsed = parser.parse_args(arguments)
    torch.set_num_threads(parsed.threads)
    measured = Measurement.of(parsed.model_dir, seed=parsed.seed)
    cases = evaluate(measured, names=list(CASES), num_prompts=parsed.num_prompts)

    def at_threshold(names: Sequence[str]) -> list[str]:
        return [name for name in names if cases[name]["single"]["accuracy"] >= DEMO_THRESHOLD]

    command = f"python -m tools.evaluate_model models/{parsed.model_dir.name}"
    if parsed.against:
        command += f" --against models/{parsed.against.name}"
    result = {
        "command": f"{command} --num-prompts {parsed.num_prompts} --seed {parsed.seed}",
        "method": "greedy generation, one prompt at a time, stored bfloat16 weights in float32",
        "split": "held_out",
        "seed": parsed.seed,
        "demo_threshold": DEMO_THRESHOLD,
        "demo_tasks": at_threshold(list(TASKS)),
        "chat_demo_tasks": at_threshold(list(CHAT_TASKS)),
        "cases": cases,
    }
    if parsed.against:
        other = Measurement.of(parsed.against, seed=parsed.seed)
        result["agreement_with"] = parsed.against.name
        result["agreement"] = {
            name: measured.agreement(other, name, num_prompts=parsed.num_prompts // 2)
            for name in CASES
        }
    text = json.dumps(result, indent=2) + "\n"
    (parsed.model_dir / "eval.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
