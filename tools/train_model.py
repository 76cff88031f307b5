"""Train the bundled model: a small Llama that solves the tasks of `tools.model_tasks`.

Theory. Conversations of several turns are packed into rows and the loss is taken on the
assistant's tokens only. Hidden matrices follow Muon, embeddings and norms AdamW; the learning
rate warms up, stays, then falls linearly. The tokenizer is a byte-level BPE in which spaces,
punctuation and digits are tokens of their own, so that a word is the same token wherever it
stands: copying, reversing and sorting become operations on whole tokens.

Everything is drawn from the seed and the step number, so a run that is stopped and resumed sees
the same data as one that was not. The published weights are rounded to bfloat16.

    python -m tools.train_model models/tiny-tasks --state-dir build/train
    python -m tools.train_model models/tiny-tasks --state-dir build/train --resume
    python -m tools.train_model build/smoke --state-dir build/smoke-state --smoke
"""

import argparse
import json
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from tools.model_tasks import TASKS, Task, generate, generate_mixed, system_message

PAD, BOS, END = "<|pad|>", "<|bos|>", "<|end|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (PAD, BOS, END, SYSTEM, USER, ASSISTANT, "<|tool|>", "<|think|>")

CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- set role = 'system' if message['role'] == 'developer' else message['role'] -%}"
    "{{- '<|' + role + '|>' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- elif message['content'] -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)

MODEL_CONFIG: Mapping[str, Any] = MappingProxyType(
    {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 256,
        "initializer_range": 0.02,
        "intermediate_size": 512,
        "max_position_embeddings": 4096,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 8,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 1024,
    }
)

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
ROW_LENGTHS_EARLY: Mapping[int, float] = MappingProxyType({128: 60.0, 256: 40.0})
ROW_LENGTHS_LATE: Mapping[int, float] = MappingProxyType(
    {128: 45.0, 256: 35.0, 512: 12.0, 1024: 6.0, 2048: 2.0}
)
EARLY_FRACTION = 0.5
SYSTEM_MESSAGE_FRACTION = 0.25

CORPUS_SENTENCES = (
    "Hello, how are you today? I am fine, thank you.",
    "The quick brown fox jumps over the lazy dog while the children are playing in the sun.",
    "Please write a short answer about this question, then explain what you have done.",
    "It was the first time that they had seen such a large number of people in one place.",
    "Which of these things would you like to know more about, and when should we start?",
    "There is nothing new here, but some other information could be found below.",
    "about above across action after again against almost along always among another answered "
    "around asked because become before began behind being better between beyond both brought "
    "called change clear coming common company complete consider country course current "
    "development different during early either enough every example experience family father "
    "finally following general given government great group happened having himself however "
    "human important including increase individual interest itself knowledge language later "
    "learn letter light little looking making matter member million minute moment money mother "
    "national nature never nothing often only order others outside particular perhaps point "
    "possible power present problem process program public rather really reason result return "
    "school second several simple since small social something sometimes special state still "
    "story student support system taken themselves thing thought through together toward "
    "turned understand university until usually value water while within without woman world",
)


class TrainOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What decides a training run: equal options and seed give the same data and schedule."""

    num_steps: int
    seed: int
    batch_tokens: int = 2048
    muon_lr: float = 0.005
    adamw_lr: float = 3e-3
    num_warmup_steps: int = 60
    constant_fraction: float = 0.05
    final_lr_fraction: float = 0.02
    evaluate_every_steps: int = 200
    checkpoint_seconds: float = 120.0
    num_eval_tasks: int = 40


class Progress(msgspec.Struct, kw_only=True):
    """How far a run has come, kept next to its checkpoint."""

    step: int = 0
    tokens: int = 0
    cpu_seconds: float = 0.0


class Batch(msgspec.Struct, frozen=True):
    """`tokens` int64 [rows, length]; `is_target` bool of the same shape, true on answer tokens."""

    tokens: torch.Tensor
    is_target: torch.Tensor


def build_tokenizer(*, seed: int, vocab_size: int) -> Tokenizer:
    """Train the byte-level BPE on prompts and answers of every task (about a second)."""
    rng = random.Random(seed)

    def corpus() -> Iterator[str]:
        for name in TASKS:
            for _ in range(2000):
                task = generate(name, rng)
                yield task.prompt
                yield task.answer
        for _ in range(500):
            yield system_message(rng)
        for _ in range(5):
            yield from CORPUS_SENTENCES

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(Regex(r"[^A-Za-z0-9]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def kept_or_new_tokenizer(out: Path, *, seed: int) -> Tokenizer:
    """The tokenizer already in `out` (token ids outlive a retraining), else a new one."""
    path = out / "tokenizer.json"
    if path.exists():
        return Tokenizer.from_file(str(path))
    return build_tokenizer(seed=seed, vocab_size=MODEL_CONFIG["vocab_size"])


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".part")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    _write_text(path, json.dumps(dict(value), indent=2, ensure_ascii=False) + "\n")


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    partial = path.with_name(path.name + ".part")
    save_file(dict(tensors), partial, metadata={"format": "pt"})
    partial.chmod(0o644)
    os.replace(partial, path)


def write_static_files(out: Path, tokenizer: Tokenizer) -> None:
    """Write configuration and tokenizer of the published model into `out`."""
    _write_json(out / "config.json", MODEL_CONFIG)
    _write_json(
        out / "generation_config.json",
        {"bos_token_id": 1, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0},
    )
    _write_text(out / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")
    _write_json(
        out / "tokenizer_config.json",
        {
            "added_tokens_decoder": {
                str(tokenizer.token_to_id(token)): {
                    "content": token,
                    "lstrip": False,
                    "normalized": False,
                    "rstrip": False,
                    "single_word": False,
                    "special": True,
                }
                for token in SPECIAL_TOKENS
            },
            "bos_token": BOS,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": END,
            "model_max_length": MODEL_CONFIG["max_position_embeddings"],
            "pad_token": PAD,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )


class BatchMaker:
    """Draws training batches; batch `step` depends on the seed and `step` alone."""

    def __init__(self, tokenizer: Tokenizer, options: TrainOptions) -> None:
        self._tokenizer = tokenizer
        self._options = options
        self._ids = {token: tokenizer.encode(token).ids[0] for token in SPECIAL_TOKENS}

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, nothing added."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_turn(self, task: Task) -> tuple[list[int], list[int]]:
        """Token ids of one turn: up to and with the assistant's role token, then its answer."""
        ids = self._ids
        prompt = [ids[USER], *self.encode(task.prompt), ids[END], ids[ASSISTANT]]
        return prompt, [*self.encode(task.answer), ids[END]]

    def opening(self, rng: random.Random, *, system_fraction: float) -> list[int]:
        """Start of a conversation: the first token and sometimes a system message."""
        if rng.random() >= system_fraction:
            return [self._ids[BOS]]
        message = self.encode(system_message(rng))
        return [self._ids[BOS], self._ids[SYSTEM], *message, self._ids[END]]

    def _row(self, rng: random.Random, length: int) -> tuple[list[int], list[bool]]:
        tokens = self.opening(rng, system_fraction=SYSTEM_MESSAGE_FRACTION)
        is_target = [False] * len(tokens)
        while len(tokens) < length:
            for task in generate_mixed(TASK_WEIGHTS, rng, num_tasks=1, split="train"):
                prompt, answer = self.encode_turn(task)
                tokens += prompt + answer
                is_target += [False] * len(prompt) + [True] * len(answer)
        return tokens[:length], is_target[:length]

    def batch(self, step: int) -> Batch:
        """The batch of `step`: about `batch_tokens` tokens in rows of one length."""
        rng = random.Random(f"{self._options.seed}:{step}")
        is_early = step < EARLY_FRACTION * self._options.num_steps
        lengths = ROW_LENGTHS_EARLY if is_early else ROW_LENGTHS_LATE
        (length,) = rng.choices(list(lengths), weights=list(lengths.values()))
        length = min(length, self._options.batch_tokens)
        num_rows = self._options.batch_tokens // length
        rows = [self._row(rng, length) for _ in range(num_rows)]
        return Batch(
            tokens=torch.tensor([tokens for tokens, _ in rows]),
            is_target=torch.tensor([is_target for _, is_target in rows]),
        )


def batch_loss(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Mean cross entropy over the answer tokens of `batch` (bfloat16 matrix products)."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=batch.tokens, use_cache=False).last_hidden_state
        is_target = batch.is_target[:, 1:]
        logits = model.lm_head(hidden[:, :-1][is_target])
    return functional.cross_entropy(logits.float(), batch.tokens[:, 1:][is_target])


@torch.no_grad()
def teacher_forced_accuracy(
    model: LlamaForCausalLM, maker: BatchMaker, *, num_tasks: int, seed: int
) -> dict[str, float]:
    """Per task, the share of held-out answers whose every token is the most likely one.

    Equal to the share of exact greedy answers, at the price of one forward pass per answer.
    """
    accuracy = {}
    for name in TASKS:
        rng = random.Random(f"{seed}:{name}")
        num_right = 0
        for _ in range(num_tasks):
            prompt, answer = maker.encode_turn(generate(name, rng, split="held_out"))
            tokens = maker.opening(rng, system_fraction=SYSTEM_MESSAGE_FRACTION) + prompt + answer
            logits = model(
                torch.tensor([tokens]), use_cache=False, logits_to_keep=len(answer) + 1
            ).logits[0, :-1]
            num_right += int(logits.argmax(-1).tolist() == answer)
        accuracy[name] = num_right / num_tasks
    return accuracy


def lr_factor(step: int, options: TrainOptions) -> float:
    """Share of the base learning rate at `step`: warm-up, constant, linear decay."""
    warm = min(1.0, (step + 1) / options.num_warmup_steps)
    left = (options.num_steps - step) / (options.num_steps * (1 - options.constant_fraction))
    return warm * max(options.final_lr_fraction, min(1.0, left))


class Trainer:
    """One training run: model, optimizers, progress, checkpoint."""

    def __init__(self, tokenizer: Tokenizer, options: TrainOptions, state_dir: Path) -> None:
        torch.manual_seed(options.seed)
        self.options = options
        self.progress = Progress()
        self.maker = BatchMaker(tokenizer, options)
        self.model = LlamaForCausalLM(LlamaConfig(**MODEL_CONFIG))
        self._state_dir = state_dir
        named = list(self.model.named_parameters())
        matrices = [p for n, p in named if p.ndim == 2 and "embed_tokens" not in n]
        others = [p for n, p in named if p.ndim != 2 or "embed_tokens" in n]
        self._optimizers: dict[str, torch.optim.Optimizer] = {
            "muon": torch.optim.Muon(matrices, lr=options.muon_lr, weight_decay=0.1),
            "adamw": torch.optim.AdamW(
                others, lr=options.adamw_lr, betas=(0.9, 0.98), weight_decay=0.0
            ),
        }

    def step(self) -> float:
        """Take one optimizer step; return the loss."""
        started = time.process_time()
        batch = self.maker.batch(self.progress.step)
        factor = lr_factor(self.progress.step, self.options)
        base_lrs = {"muon": self.options.muon_lr, "adamw": self.options.adamw_lr}
        for name, optimizer in self._optimizers.items():
            optimizer.param_groups[0]["lr"] = base_lrs[name] * factor
            optimizer.zero_grad(set_to_none=True)
        loss = batch_loss(self.model, batch)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self._optimizers.values():
            optimizer.step()
        self.progress.step += 1
        self.progress.tokens += batch.tokens.numel()
        self.progress.cpu_seconds += time.process_time() - started
        return float(loss.item())

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors = {f"model.{n}": p.detach() for n, p in self.model.named_parameters()}
        for name, optimizer in self._optimizers.items():
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"{name}.{index}.{key}": value for key, value in state.items()}
        return tensors

    def save(self) -> None:
        """Write the state needed by `load`; the progress record is written last."""
        self._state_dir.mkdir(parents=True, exist_ok=True)
        _write_tensors(self._state_dir / "state.safetensors", self._tensors())
        _write_json(self._state_dir / "progress.json", msgspec.to_builtins(self.progress))

    def load(self) -> None:
        """Continue from the state that `save` wrote."""
        tensors = load_file(self._state_dir / "state.safetensors")
        progress = (self._state_dir / "progress.json").read_bytes()
        self.progress = msgspec.json.decode(progress, type=Progress)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[f"model.{name}"])
        for name, optimizer in self._optimizers.items():
            states: dict[int, dict[str, torch.Tensor]] = {}
            for path, tensor in tensors.items():
                owner, _, rest = path.partition(".")
                if owner == name:
                    index, _, key = rest.partition(".")
                    states.setdefault(int(index), {})[key] = tensor
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": states, "param_groups": groups})

    def publish(self, out: Path) -> None:
        """Write the weights, rounded to bfloat16, in the layout of the Hugging Face Llama."""
        weights = {n: p.detach().bfloat16() for n, p in self.model.named_parameters()}
        _write_tensors(out / "model.safetensors", weights)


def run(trainer: Trainer, out: Path) -> None:
    """Train to the last step, logging to `out`, with checkpoints and weights on the way."""
    options, progress = trainer.options, trainer.progress
    last_save = time.monotonic()
    smooth_loss: float | None = None
    with (out / "training_log.jsonl").open("a", encoding="utf-8") as log:

        def write(record: Mapping[str, Any]) -> None:
            text = json.dumps({**msgspec.to_builtins(progress), **record})
            print(text, file=log, flush=True)
            print(text, flush=True)

        while progress.step < options.num_steps:
            loss = trainer.step()
            smooth_loss = loss if smooth_loss is None else 0.97 * smooth_loss + 0.03 * loss
            is_last = progress.step == options.num_steps
            if progress.step % 50 == 0 or is_last:
                factor = lr_factor(progress.step, options)
                write({"loss": round(smooth_loss, 4), "lr_factor": round(factor, 3)})
            if progress.step % options.evaluate_every_steps == 0 or is_last:
                accuracy = teacher_forced_accuracy(
                    trainer.model, trainer.maker, num_tasks=options.num_eval_tasks, seed=999
                )
                write({"held_out_accuracy": accuracy})
            if is_last or time.monotonic() - last_save > options.checkpoint_seconds:
                trainer.save()
                trainer.publish(out)
                last_save = time.monotonic()


def _cut_log(path: Path, step: int) -> None:
    """Drop the records after `step`, which a resumed run writes again."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    _write_text(path, "".join(line for line in lines if json.loads(line)["step"] <= step))


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the bundled model.")
    parser.add_argument("out", type=Path, help="directory of the published model")
    parser.add_argument("--state-dir", type=Path, required=True, help="directory of checkpoints")
    parser.add_argument("--steps", type=int, default=4200)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint")
    parser.add_argument("--smoke", action="store_true", help="a run of a few steps")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; see the module's docstring for the commands."""
    parsed = _parse_arguments(arguments)
    torch.set_num_threads(parsed.threads)
    options = TrainOptions(num_steps=parsed.steps, seed=parsed.seed)
    if parsed.smoke:
        options = TrainOptions(
            num_steps=6, seed=parsed.seed, evaluate_every_steps=3, num_eval_tasks=2
        )
    parsed.out.mkdir(parents=True, exist_ok=True)
    tokenizer = kept_or_new_tokenizer(parsed.out, seed=parsed.seed)
    write_static_files(parsed.out, tokenizer)
    trainer = Trainer(tokenizer, options, parsed.state_dir)
    if parsed.resume:
        trainer.load()
    _cut_log(parsed.out / "training_log.jsonl", trainer.progress.step)
    run(trainer, parsed.out)


if __name__ == "__main__":
    main()
