"""Step times are predicted well on every kind of device, and sanely before anything is known."""

import random
from collections.abc import Callable
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.core.profiles import device_profile
from appliance.core.step_model import StepCoefficients, StepModel

PROFILES = ["h200-8b", "h100-8b", "cpu", "fixed-20ms"]


class Step(NamedTuple):
    """Counts of a step."""

    n: int
    prefix: int
    decodes: int
    context: int

    @property
    def pairs(self) -> int:
        return self.n * self.prefix + self.n * (self.n + 1) // 2


def truth(profile: str) -> Callable[[Step], float]:
    device = device_profile(profile)

    def seconds(step: Step) -> float:
        return device.step_seconds(
            num_tokens=step.n + step.decodes,
            num_samples=step.decodes + (step.n > 0),
            num_pairs=step.pairs + step.context,
            num_kv_tokens=step.context + (step.prefix + step.n if step.n else 0),
        )

    return seconds


def draw(rng: random.Random) -> Step:
    """Steps of all kinds and sizes: a third without prefill, a fifth without decodes."""
    kind = rng.random()
    decodes = 0 if kind < 0.2 else int(2 ** rng.uniform(0, 8))
    n = 0 if kind > 0.65 else int(2 ** rng.uniform(0, 11))
    prefix = int(2 ** rng.uniform(0, 12)) if n and rng.random() < 0.5 else 0
    return Step(n, prefix, decodes, decodes * int(2 ** rng.uniform(4, 12.5)))


def see(model: StepModel, step: Step, seconds: float) -> None:
    model.observe(
        prefill_tokens=step.n,
        prefill_pairs=step.pairs,
        decodes=step.decodes,
        context_tokens=step.context,
        elapsed=seconds,
    )


def ask(model: StepModel, step: Step) -> float:
    return model.seconds(
        prefill_tokens=step.n,
        prefix_tokens=step.prefix,
        decodes=step.decodes,
        context_tokens=step.context,
    )


def tail(model: StepModel, step: Step) -> float:
    return model.tail_seconds(
        prefill_tokens=step.n,
        prefix_tokens=step.prefix,
        decodes=step.decodes,
        context_tokens=step.context,
    )


def taught(profile: str, *, num: int, noise: float = 0.0, seed: int = 1) -> StepModel:
    model, rng, seconds = StepModel(), random.Random(seed), truth(profile)
    for _ in range(num):
        step = draw(rng)
        see(model, step, seconds(step) * rng.lognormvariate(0.0, noise))
    return model


def errors(model: StepModel, profile: str, *, seed: int = 9, slower: float = 1.0) -> list[float]:
    """Relative errors over fresh steps, in order of size."""
    rng, seconds = random.Random(seed), truth(profile)
    steps = [draw(rng) for _ in range(400)]
    return sorted(abs(ask(model, step) / (slower * seconds(step)) - 1.0) for step in steps)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("noise", [0.0, 0.15])
def test_nine_of_ten_predictions_are_within_five_percent(profile: str, noise: float) -> None:
    found = errors(taught(profile, num=2500, noise=noise), profile)
    assert found[360] < 0.05, found[360]


@pytest.mark.parametrize("profile", PROFILES)
def test_one_step_says_how_fast_the_device_is(profile: str) -> None:
    model, step, seconds = StepModel(), Step(0, 0, 16, 8192), truth(profile)
    see(model, step, seconds(step))
    assert ask(model, step) == pytest.approx(seconds(step), rel=1e-6)
    assert 0.0 < ask(model, Step(1, 0, 0, 0)) < ask(model, Step(2048, 0, 0, 0))


def test_before_any_step_there_is_an_order() -> None:
    model = StepModel()
    assert 0.0 < ask(model, Step(0, 0, 1, 10)) < ask(model, Step(512, 0, 1, 10))
    assert model.error.num_steps == 0
    assert model.tail >= 1.0
    assert model.tokens_within(10.0) > 0 == model.tokens_within(1e-9)


@pytest.mark.parametrize("num", [0, 1, 2, 3])
def test_a_few_odd_steps_break_nothing(num: int) -> None:
    model = StepModel()
    for index in range(num):
        see(model, Step(7 if index == 1 else 0, 0, 1, 5), 10.0**-index)
        see(model, Step(0, 0, 0, 0), 1.0)  # nothing in it: not a step
        see(model, Step(0, 0, 4, 5), 0.0)  # a clock that stood still
    for n in (0, 1, 100, 10_000):
        assert 0.0 < ask(model, Step(n, 0, 4, 100)) < 1e6


@pytest.mark.parametrize("profile", ["h200-8b", "cpu"])
@pytest.mark.parametrize("slower", [2.0, 0.5])
def test_a_device_that_becomes_slower_or_faster_is_followed(profile: str, slower: float) -> None:
    model, rng, seconds = taught(profile, num=1500, noise=0.05), random.Random(5), truth(profile)
    for _ in range(300):
        step = draw(rng)
        see(model, step, slower * seconds(step) * rng.lognormvariate(0.0, 0.05))
    found = errors(model, profile, slower=slower)
    assert found[200] < 0.12, found[200]
    assert found[360] < 0.2, found[360]


@pytest.mark.parametrize("noise", [0.05, 0.25])
def test_the_tail_covers_nine_of_ten_steps(noise: float) -> None:
    model, rng, seconds = StepModel(), random.Random(3), truth("h200-8b")
    covered = []
    for index in range(4000):
        step = draw(rng)
        elapsed = seconds(step) * rng.lognormvariate(0.0, noise)
        if index >= 1000:
            covered.append(elapsed <= tail(model, step))
        see(model, step, elapsed)
    assert 0.87 < sum(covered) / len(covered) < 0.94


def test_a_stall_now_and_then_changes_little() -> None:
    """One step in fifty lasts twenty times as long: the mean forgets them, the tail stays."""
    model, rng, seconds = StepModel(), random.Random(3), truth("cpu")
    for _ in range(2500):
        step = draw(rng)
        see(model, step, seconds(step) * (20.0 if rng.random() < 0.02 else 1.0))
    assert errors(model, "cpu")[200] < 0.15
    assert model.tail < 1.3


def test_a_thousand_decode_steps_do_not_wash_a_prompt_away() -> None:
    model, seconds = taught("h200-8b", num=1500), truth("h200-8b")
    for index in range(3000):
        step = Step(0, 0, 32, 32 * (500 + index % 50))
        see(model, step, seconds(step))
    for step in (Step(1024, 0, 0, 0), Step(512, 2048, 32, 16000)):
        assert ask(model, step) == pytest.approx(seconds(step), rel=0.08)


counts = st.integers(0, 4096)
models = st.sampled_from(
    [StepModel(), *(taught(profile, num=600, noise=0.1) for profile in PROFILES)]
)


@given(models, counts, counts, st.integers(0, 256), st.integers(0, 300_000), st.integers(1, 999))
@settings(deadline=None)
def test_more_of_anything_never_takes_less(
    model: StepModel, n: int, prefix: int, decodes: int, context: int, more: int
) -> None:
    step = Step(n, prefix, decodes, context)
    for each in (
        step._replace(n=n + more),
        step._replace(prefix=prefix + more),
        step._replace(decodes=decodes + more),
        step._replace(context=context + more),
    ):
        assert ask(model, each) >= ask(model, step) > 0.0
        assert tail(model, each) >= tail(model, step) >= ask(model, step)


@given(
    models,
    st.floats(0.0, 3.0),
    counts,
    st.integers(0, 256),
    st.integers(0, 300_000),
    st.sampled_from([0, 1, 512, 1 << 20]),
)
@settings(deadline=None)
def test_tokens_within_is_the_largest_number_that_fits(
    model: StepModel, seconds: float, prefix: int, decodes: int, context: int, most: int
) -> None:
    n = model.tokens_within(
        seconds, prefix_tokens=prefix, decodes=decodes, context_tokens=context, most=most
    )
    assert 0 <= n <= most
    if n:
        assert tail(model, Step(n, prefix, decodes, context)) <= seconds
    if n < most:
        assert tail(model, Step(n + 1, prefix, decodes, context)) > seconds


@given(models, st.integers(0, 5000), st.integers(1, 700), counts, st.integers(0, 64))
@settings(deadline=None)
def test_a_prompt_in_chunks_takes_the_sum_of_its_chunks(
    model: StepModel, num_tokens: int, chunk: int, prefix: int, decodes: int
) -> None:
    total, done = 0.0, 0
    while done < num_tokens:
        n = min(chunk, num_tokens - done)
        total += ask(model, Step(n, prefix + done, decodes, 100 * decodes))
        done += n
    whole = model.prompt_seconds(
        num_tokens,
        prefix_tokens=prefix,
        chunk=chunk,
        decodes=decodes,
        context_tokens=100 * decodes,
    )
    assert whole == pytest.approx(total, rel=1e-9)


def test_what_was_learnt_starts_another_model() -> None:
    first = taught("h200-8b", num=2500)
    second = StepModel(first.coefficients)
    assert errors(second, "h200-8b")[360] < 0.05
    seconds, step = truth("h200-8b"), Step(0, 0, 8, 4000)
    see(second, step, seconds(step))  # one step is no reason to doubt all of it
    assert errors(second, "h200-8b")[360] < 0.05


def test_equal_steps_give_equal_models() -> None:
    assert taught("cpu", num=500, noise=0.2) is not taught("cpu", num=500, noise=0.2)
    first, second = taught("cpu", num=500, noise=0.2), taught("cpu", num=500, noise=0.2)
    assert first.coefficients == second.coefficients
    assert first.error == second.error


def test_the_error_is_that_of_predictions_made_before_the_step() -> None:
    model, step = StepModel(StepCoefficients(planes=((1.0, 0, 0, 0, 0), (0, 0, 0, 0, 0)))), 0
    for _ in range(3):
        see(model, Step(0, 0, 1, 10), 2.0)
        step += 1
    assert model.error.num_steps == step
    assert model.error.mean_relative > 0.2
    assert model.error.p90_relative == pytest.approx(0.5)


def test_seen_tells_what_was_learnt_from() -> None:
    model = StepModel()
    for _ in range(5):
        see(model, Step(0, 0, 8, 800), 0.01)
    (seen,) = model.seen()
    assert (seen.decodes, seen.kv_tokens, seen.prefill_tokens) == (8, 800, 0)
    assert seen.seconds == pytest.approx(0.01)
    assert seen.num_steps == 5
    model.settle()
    assert ask(model, Step(0, 0, 8, 800)) == pytest.approx(0.01, rel=0.02)


def test_added_seconds_leave_out_what_every_step_costs() -> None:
    model, profile = taught("cpu", num=2500), device_profile("cpu")
    base = truth("cpu")(Step(0, 0, 1, 1))
    assert model.added_seconds(1) < 0.5 * base
    marginal = truth("cpu")(Step(1024, 0, 8, 800)) - truth("cpu")(Step(0, 0, 8, 800))
    assert model.added_seconds(1024) == pytest.approx(marginal, rel=0.15), profile.note
