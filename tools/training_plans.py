"""Plans by which the bundled models are trained: stages with mixtures, gates and budgets."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from tools.model_data import NEEDLE_LENGTHS, TASK_WEIGHTS, WATCHED, Mixture
from tools.model_files import DRAFT_CONFIG, MODEL_CONFIG
from tools.model_tasks import CHAT_TASKS, TASKS

TOOL_TASKS = tuple(name for name in CHAT_TASKS if name != "needle")


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """One part of a training run.

    It lasts `num_steps` optimizer steps, or, when `may_end_early`, until every accuracy in `gate`
    is reached. The learning rate is `lr_from` at its start and `lr_to` after `num_steps`, as
    shares of the base rate, with a warm-up of `num_warmup_steps`.
    """

    name: str
    num_steps: int
    mixture: Mixture
    lr_from: float
    lr_to: float
    watched: tuple[str, ...]
    gate: Mapping[str, float]
    may_end_early: bool = True
    num_warmup_steps: int = 0
    evaluate_every_steps: int = 100
    num_eval_tasks: int = 24

    def lr_factor(self, stage_step: int) -> float:
        """Share of the base learning rate at a step of this stage."""
        warm = min(1.0, (stage_step + 1) / self.num_warmup_steps) if self.num_warmup_steps else 1.0
        return warm * (
            self.lr_from + (self.lr_to - self.lr_from) * min(1.0, stage_step / self.num_steps)
        )


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of a model and the stages that train it."""

    config: Mapping[str, Any]
    stages: tuple[Stage, ...]

    def stage(self, name: str) -> Stage:
        """The stage named `name`. Raises `ValueError` when there is none."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        names = ", ".join(stage.name for stage in self.stages)
        raise ValueError(f"stage: {name!r} is not in this plan; use one of {names}")


def _bars(names: tuple[str, ...], bar: float) -> dict[str, float]:
    return dict.fromkeys(names, bar)


_PLAIN = tuple(TASKS)
_MAIN_STAGES = (
    Stage(
        name="words",
        num_steps=2100,
        mixture=Mixture(batch_tokens=2048, lengths={128: 60, 256: 40}, kinds={"plain": 1}),
        lr_from=1.0,
        lr_to=0.5,
        num_warmup_steps=60,
        watched=_PLAIN,
        gate=_bars(_PLAIN, 0.98),
        may_end_early=False,
        evaluate_every_steps=200,
    ),
    Stage(
        name="turns",
        num_steps=2100,
        mixture=Mixture(
            batch_tokens=2048,
            lengths={128: 45, 256: 35, 512: 12, 1024: 6, 2048: 2},
            kinds={"plain": 1},
        ),
        lr_from=0.5,
        lr_to=0.02,
        watched=_PLAIN,
        gate=_bars(_PLAIN, 0.98),
        may_end_early=False,
        evaluate_every_steps=200,
    ),
    Stage(
        name="tools",
        num_steps=280,
        mixture=Mixture(
            batch_tokens=4096,
            lengths={256: 30, 384: 25, 512: 20, 768: 15, 1024: 10},
            kinds={"plain": 25, "tools": 60, "needle": 15},
        ),
        lr_from=0.5,
        lr_to=0.35,
        num_warmup_steps=40,
        watched=(*_PLAIN, *TOOL_TASKS, "needle_300"),
        gate={
            **_bars(_PLAIN, 0.9),
            **_bars(TOOL_TASKS, 0.95),
            "needle_300": 0.95,
        },
    ),
    Stage(
        name="long",
        num_steps=170,
        mixture=Mixture(
            batch_tokens=4096,
            lengths={384: 15, 512: 15, 1024: 20, 2048: 20, 4096: 30},
            kinds={"plain": 35, "tools": 30, "needle": 35},
        ),
        lr_from=0.35,
        lr_to=0.25,
        watched=WATCHED,
        gate={
            **_bars(_PLAIN, 0.9),
            **_bars(TOOL_TASKS, 0.95),
            **_bars(tuple(NEEDLE_LENGTHS), 0.95),
        },
        num_eval_tasks=12,
    ),
    Stage(
        name="settle",
        num_steps=200,
        mixture=Mixture(
            batch_tokens=4096,
            lengths={128: 15, 256: 20, 384: 15, 512: 20, 1024: 16, 2048: 6, 4096: 8},
            kinds={"plain": 60, "tools": 20, "needle": 20},
        ),
        lr_from=0.3,
        lr_to=0.01,
        watched=WATCHED,
        gate={**_bars(_PLAIN, 0.98), **_bars((*TOOL_TASKS, *NEEDLE_LENGTHS), 0.95)},
        may_end_early=False,
        num_eval_tasks=20,
        evaluate_every_steps=200,
    ),
    Stage(
        name="far",
        num_steps=90,
        mixture=Mixture(
            batch_tokens=4096,
            lengths={256: 15, 512: 15, 4096: 70},
            kinds={"plain": 25, "tools": 15, "needle": 60},
        ),
        lr_from=0.3,
        lr_to=0.25,
        num_warmup_steps=10,
        watched=WATCHED,
        gate={**_bars(_PLAIN, 0.9), **_bars((*TOOL_TASKS, *NEEDLE_LENGTHS), 0.95)},
        may_end_early=False,
        num_eval_tasks=20,
        evaluate_every_steps=90,
    ),
    Stage(
        name="polish",
        num_steps=180,
        mixture=Mixture(
            batch_tokens=4096,
            lengths={128: 35, 256: 20, 512: 15, 1024: 10, 4096: 20},
            kinds={"plain": 60, "tools": 20, "needle": 20},
            tasks={**TASK_WEIGHTS, "sort": 60.0},
        ),
        lr_from=0.25,
        lr_to=0.01,
        watched=WATCHED,
        gate={**_bars(_PLAIN, 0.98), **_bars((*TOOL_TASKS, *NEEDLE_LENGTHS), 0.95)},
        may_end_early=False,
        num_eval_tasks=40,
        evaluate_every_steps=180,
    ),
)
_DRAFT_STAGES = (
    Stage(
        name="words",
        num_steps=1200,
        mixture=Mixture(batch_tokens=2048, lengths={128: 60, 256: 40}, kinds={"plain": 1}),
        lr_from=2.0,
        lr_to=1.0,
        num_warmup_steps=60,
        watched=_PLAIN,
        gate={},
        may_end_early=False,
        evaluate_every_steps=400,
    ),
    Stage(
        name="all",
        num_steps=2400,
        mixture=Mixture(
            batch_tokens=4096,
            lengths={128: 25, 256: 20, 512: 25, 1024: 20, 2048: 10},
            kinds={"plain": 45, "tools": 40, "needle": 15},
        ),
        lr_from=1.0,
        lr_to=0.01,
        watched=WATCHED,
        gate={},
        may_end_early=False,
        evaluate_every_steps=400,
    ),
)
_SMOKE_STAGES = tuple(
    Stage(
        name=name,
        num_steps=3,
        mixture=Mixture(
            batch_tokens=1024,
            lengths={128: 1, 512: 1},
            kinds={"plain": 1, "tools": 1, "needle": 1},
        ),
        lr_from=1.0,
        lr_to=0.5,
        num_warmup_steps=2,
        watched=("add", "tool_call", "needle_300"),
        gate=gate,
        evaluate_every_steps=2,
        num_eval_tasks=1,
    )
    for name, gate in (("gated", {"add": 0.0}), ("whole", {"add": 1.0}))
)
PLANS: Mapping[str, Plan] = MappingProxyType(
    {
        "main": Plan(config=MODEL_CONFIG, stages=_MAIN_STAGES),
        "draft": Plan(config=DRAFT_CONFIG, stages=_DRAFT_STAGES),
        "smoke": Plan(config=DRAFT_CONFIG, stages=_SMOKE_STAGES),
    }
)
