"""Train the bundled models: small Llamas that solve the tasks of `tools.model_tasks`.

Theory. Training goes through stages. A stage has its own mixture of rows (`tools.model_data`),
its own learning rate, a budget of steps and a gate: the held-out accuracy at which it ends early.
Hidden matrices follow Muon, embeddings and norms AdamW. The log says of every stage whether its
gate was met or its budget spent. The published weights are rounded to bfloat16.

Everything is drawn from the seed and the step number, so a run that is stopped and resumed sees
the same data as one that was not.

    python -m tools.train_model models/tiny-tasks --state-dir build/train
    python -m tools.train_model models/tiny-tasks --state-dir build/train --resume
    python -m tools.train_model build/more --state-dir build/train --init models/tiny-tasks \
        --from-stage tools
    python -m tools.train_model models/tiny-tasks-draft --state-dir build/draft --plan draft \
        --tokenizer models/tiny-tasks
    python -m tools.train_model build/smoke --state-dir build/smoke-state --plan smoke
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import msgspec
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from tools.model_data import BatchMaker, batch_loss, teacher_forced_accuracy
from tools.model_files import (
    kept_or_new_tokenizer,
    write_json,
    write_static_files,
    write_tensors,
    write_text,
)
from tools.training_plans import PLANS, Plan, Stage

EVALUATION_SEED = 999


class TrainOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What decides a training run: equal options and seed give the same data and schedule."""

    plan: Plan
    seed: int
    muon_lr: float = 0.005
    adamw_lr: float = 3e-3
    checkpoint_seconds: float = 120.0


class Progress(msgspec.Struct, kw_only=True):
    """How far a run has come, kept next to its checkpoint."""

    step: int = 0
    tokens: int = 0
    cpu_seconds: float = 0.0
    stage: str = ""
    stage_step: int = 0


class Trainer:
    """One training run: model, optimizers, progress, checkpoint."""

    def __init__(self, tokenizer: Tokenizer, options: TrainOptions, state_dir: Path) -> None:
        torch.manual_seed(options.seed)
        self.options = options
        self.progress = Progress(stage=options.plan.stages[0].name)
        self.maker = BatchMaker(tokenizer, seed=options.seed)
        self.model = LlamaForCausalLM(LlamaConfig(**options.plan.config))
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

    @property
    def stage(self) -> Stage:
        """The stage that the next step belongs to."""
        return self.options.plan.stage(self.progress.stage)

    def enter(self, stage: str) -> None:
        """Begin the stage named `stage`."""
        self.progress.stage, self.progress.stage_step = stage, 0

    def step(self) -> float:
        """Take one optimizer step; return the loss."""
        started = time.process_time()
        batch = self.maker.batch(self.stage.mixture, self.progress.step)
        factor = self.stage.lr_factor(self.progress.stage_step)
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
        self.progress.stage_step += 1
        self.progress.tokens += batch.tokens.numel()
        self.progress.cpu_seconds += time.process_time() - started
        return float(loss.item())

    def accuracy(self) -> dict[str, float]:
        """Held-out accuracy of what the stage watches."""
        started = time.process_time()
        accuracy = teacher_forced_accuracy(
            self.model,
            self.maker.encoder,
            names=self.stage.watched,
            num_tasks=self.stage.num_eval_tasks,
            seed=EVALUATION_SEED,
        )
        self.progress.cpu_seconds += time.process_time() - started
        return accuracy

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors = {f"model.{n}": p.detach() for n, p in self.model.named_parameters()}
        for name, optimizer in self._optimizers.items():
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"{name}.{index}.{key}": value for key, value in state.items()}
        return tensors

    def save(self) -> None:
        """Write the state needed by `load`; the progress record is written last."""
        self._state_dir.mkdir(parents=True, exist_ok=True)
        write_tensors(self._state_dir / "state.safetensors", self._tensors())
        write_json(self._state_dir / "progress.json", msgspec.to_builtins(self.progress))

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

    def start_from(self, model_dir: Path, stage: str) -> None:
        """Begin `stage` with the published weights of `model_dir`, counting on from its log."""
        weights = load_file(model_dir / "model.safetensors")
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(weights[name])
        last = json.loads(_log_of(model_dir).splitlines()[-1])
        self.progress.step = last["step"]
        self.progress.tokens = last["tokens"]
        self.progress.cpu_seconds = last["cpu_seconds"]
        self.enter(stage)

    def publish(self, out: Path) -> None:
        """Write the weights, rounded to bfloat16, in the layout of the Hugging Face Llama."""
        weights = {n: p.detach().bfloat16() for n, p in self.model.named_parameters()}
        write_tensors(out / "model.safetensors", weights)


class Run:
    """Takes a trainer through its stages, logging to `out`, with checkpoints on the way."""

    def __init__(self, trainer: Trainer, out: Path, log: TextIO) -> None:
        self._trainer = trainer
        self._out = out
        self._log = log
        self._smooth_loss: float | None = None
        self._last_save = time.monotonic()

    def run(self) -> None:
        """Train to the end of the last stage."""
        plan = self._trainer.options.plan
        names = [stage.name for stage in plan.stages]
        first = names.index(self._trainer.progress.stage)
        for index, name in enumerate(names[first:]):
            if index > 0:
                self._trainer.enter(name)
            self._run_stage()
        self._checkpoint()

    def _run_stage(self) -> None:
        trainer, stage = self._trainer, self._trainer.stage
        while trainer.progress.stage_step < stage.num_steps:
            self._step()
            is_last = trainer.progress.stage_step == stage.num_steps
            if is_last or trainer.progress.stage_step % stage.evaluate_every_steps == 0:
                accuracy = trainer.accuracy()
                is_met = all(accuracy[name] >= bar for name, bar in stage.gate.items())
                record: dict[str, Any] = {"held_out_accuracy": accuracy}
                if is_last or (is_met and stage.may_end_early):
                    reason = "gate met" if is_met else "budget spent"
                    self._write({**record, "stage_ended": reason})
                    return
                self._write(record)

    def _step(self) -> None:
        trainer = self._trainer
        factor = trainer.stage.lr_factor(trainer.progress.stage_step)
        loss = trainer.step()
        kept = self._smooth_loss
        self._smooth_loss = loss if kept is None else 0.95 * kept + 0.05 * loss
        if trainer.progress.step % 50 == 0:
            self._write({"loss": round(self._smooth_loss, 4), "lr_factor": round(factor, 3)})
        if time.monotonic() - self._last_save > trainer.options.checkpoint_seconds:
            self._checkpoint()

    def _checkpoint(self) -> None:
        self._trainer.save()
        self._trainer.publish(self._out)
        self._last_save = time.monotonic()

    def _write(self, record: Mapping[str, Any]) -> None:
        text = json.dumps({**msgspec.to_builtins(self._trainer.progress), **record})
        print(text, file=self._log, flush=True)
        print(text, flush=True)


def _log_of(directory: Path) -> str:
    path = directory / "training_log.jsonl"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a bundled model.")
    parser.add_argument("out", type=Path, help="directory of the published model")
    parser.add_argument("--state-dir", type=Path, required=True, help="directory of checkpoints")
    parser.add_argument("--plan", choices=list(PLANS), default="main")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokenizer", type=Path, help="directory of the tokenizer to use")
    parser.add_argument("--init", type=Path, help="directory of the weights to start from")
    parser.add_argument("--from-stage", help="the stage to start with; needs --init")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; see the module's docstring for the commands."""
    parsed = _parse_arguments(arguments)
    torch.set_num_threads(parsed.threads)
    options = TrainOptions(plan=PLANS[parsed.plan], seed=parsed.seed)
    parsed.out.mkdir(parents=True, exist_ok=True)
    sources = [path for path in (parsed.tokenizer, parsed.init, parsed.out) if path]
    tokenizer = kept_or_new_tokenizer(*sources, seed=parsed.seed)
    write_static_files(parsed.out, tokenizer, options.plan.config)
    trainer = Trainer(tokenizer, options, parsed.state_dir)
    earlier = _log_of(parsed.out)
    if parsed.resume:
        trainer.load()
    elif parsed.init:
        trainer.start_from(parsed.init, parsed.from_stage or trainer.progress.stage)
        earlier = _log_of(parsed.init)
    # Records after the checkpoint are dropped: the resumed run writes them again.
    lines = earlier.splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= trainer.progress.step]
    write_text(parsed.out / "training_log.jsonl", "".join(kept))
    with (parsed.out / "training_log.jsonl").open("a", encoding="utf-8") as log:
        Run(trainer, parsed.out, log).run()


if __name__ == "__main__":
    main()
