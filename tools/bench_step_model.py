"""What the model of step times costs, and how good it is on devices whose truth is known.

    python -m tools.bench_step_model [--json OUT]

Time: microseconds of each call (mean, median, 99th percentile over some thousand calls with steps
of all sizes). Accuracy: per device profile and noise (standard deviation of the logarithm of the
step times), relative error of the predicted mean against the noiseless truth over the second half
of 5,000 random steps of all kinds, and the share of steps that stay within the tail.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from appliance.core.profiles import Profile, device_profile
from appliance.core.step_model import StepModel

PROFILES = ("h200-8b", "h100-8b", "cpu", "fixed-20ms")
NUM_STEPS = 5000


class Counts(NamedTuple):
    """Of a step."""

    n: int
    prefix: int
    decodes: int
    context: int

    def asked(self) -> dict[str, int]:
        """As a model is asked."""
        return {
            "prefill_tokens": self.n,
            "prefix_tokens": self.prefix,
            "decodes": self.decodes,
            "context_tokens": self.context,
        }


def draw(rng: random.Random) -> Counts:
    """A fifth without decodes, a third without prefill; sizes even on a logarithmic scale."""
    kind = rng.random()
    decodes = 0 if kind < 0.2 else int(2 ** rng.uniform(0, 8))
    n = 0 if kind > 0.65 else int(2 ** rng.uniform(0, 11))
    prefix = int(2 ** rng.uniform(0, 12)) if n and rng.random() < 0.5 else 0
    return Counts(n, prefix, decodes, decodes * int(2 ** rng.uniform(4, 12.5)))


def true_seconds(profile: Profile, step: Counts) -> float:
    """By the profile."""
    pairs = step.n * step.prefix + step.n * (step.n + 1) // 2
    return profile.step_seconds(
        num_tokens=step.n + step.decodes,
        num_samples=step.decodes + (step.n > 0),
        num_pairs=pairs + step.context,
        num_kv_tokens=step.context + (step.prefix + step.n if step.n else 0),
    )


def learn(model: StepModel, step: Counts, elapsed: float) -> None:
    """One observation."""
    model.observe(
        prefill_tokens=step.n,
        prefill_pairs=step.n * step.prefix + step.n * (step.n + 1) // 2,
        decodes=step.decodes,
        context_tokens=step.context,
        elapsed=elapsed,
    )


def accuracy(name: str, noise: float) -> dict[str, float]:
    """Errors and coverage."""
    profile, rng, model = device_profile(name), random.Random(1), StepModel()
    errors: list[float] = []
    covered = 0
    for index in range(NUM_STEPS):
        step = draw(rng)
        truth = true_seconds(profile, step)
        elapsed = truth * rng.lognormvariate(0.0, noise)
        if index >= NUM_STEPS // 2:
            errors.append(abs(model.seconds(**step.asked()) / truth - 1.0))
            covered += elapsed <= model.tail_seconds(**step.asked())
        learn(model, step, elapsed)
    errors.sort()
    return {
        "mean": round(sum(errors) / len(errors), 4),
        "p90": round(errors[len(errors) * 9 // 10], 4),
        "most": round(errors[-1], 4),
        "within_tail": round(covered / len(errors), 4),
    }


def costs() -> dict[str, dict[str, float]]:
    """Microseconds of each call."""
    profile, rng, model = device_profile("h200-8b"), random.Random(1), StepModel()
    steps = [draw(rng) for _ in range(NUM_STEPS)]
    result = {
        "observe": _timed(lambda s: learn(model, s, true_seconds(profile, s)), steps),
        "seconds": _timed(lambda s: model.seconds(**s.asked()), steps),
        "tail_seconds": _timed(lambda s: model.tail_seconds(**s.asked()), steps),
        "tokens_within": _timed(
            lambda s: model.tokens_within(
                0.02,
                prefix_tokens=s.prefix,
                decodes=s.decodes,
                context_tokens=s.context,
            ),
            steps,
        ),
        "prompt_seconds": _timed(
            lambda s: model.prompt_seconds(
                8 * s.n,
                prefix_tokens=s.prefix,
                chunk=512,
                decodes=s.decodes,
                context_tokens=s.context,
            ),
            steps,
        ),
    }
    nothing = _timed(lambda s: s.asked(), steps)["p50"]
    print(f"{'(of which the question)':24} {nothing:6.1f} us")
    return result


def _timed(call: Callable[[Counts], Any], steps: Sequence[Counts]) -> dict[str, float]:
    seconds = []
    for step in steps:
        began = time.perf_counter()
        call(step)
        seconds.append(time.perf_counter() - began)
    seconds.sort()
    return {
        "mean": round(1e6 * sum(seconds) / len(seconds), 2),
        "p50": round(1e6 * seconds[len(seconds) // 2], 2),
        "p99": round(1e6 * seconds[len(seconds) * 99 // 100], 2),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    document: dict[str, Any] = {"microseconds": costs(), "accuracy": {}}
    for name, row in document["microseconds"].items():
        print(f"{name:24} mean {row['mean']:6.1f}  p50 {row['p50']:6.1f}  p99 {row['p99']:6.1f} us")
    for profile in PROFILES:
        for noise in (0.0, 0.1, 0.3):
            found = accuracy(profile, noise)
            document["accuracy"][f"{profile} noise {noise:g}"] = found
            print(
                f"{profile:12} noise {noise:3g}  mean {found['mean']:6.2%}  p90 {found['p90']:6.2%}"
                f"  most {found['most']:6.2%}  within tail {found['within_tail']:.1%}"
            )
    if args.json:
        args.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
