"""The comparison reads answers and reckons ratios rightly."""

from collections.abc import Sequence

import pytest

from tools.bench_peers import Load, Turn, run, spread, table
from tools.peers import Answers, Prompt, read_stream, read_whole

LOAD = Load(prompt_tokens=2, max_tokens=4, rounds=2, repeats=2)


class Fixed:
    """A contestant that needs `seconds` for each request and says the same to all."""

    def __init__(self, name: str, *, seconds: float, missing: int = 0) -> None:
        self.name, self.precision = name, "f32"
        self._seconds, self._missing = seconds, missing

    def ask(self, prompts: Sequence[Prompt], *, max_tokens: int, concurrency: int) -> Answers:
        del concurrency
        seconds = self._seconds * len(prompts)
        return Answers(
            texts=[prompt.text for prompt in prompts],
            tokens=max_tokens * len(prompts) - self._missing,
            prompt_tokens=sum(len(prompt.ids) for prompt in prompts),
            wall=2 * seconds,
            cpu=seconds,
            cpu_front=seconds / 4,
        )

    def stop(self) -> None:
        """Nothing runs."""


class Counted:
    """Prompts that name their turn."""

    def draw(self, seed: str, count: int) -> list[Prompt]:
        return [Prompt(f"{seed} {number}", [1, 2]) for number in range(count)]


def turns_of(*contestants: Fixed) -> list[Turn]:
    return list(run(contestants, Counted(), LOAD, concurrencies=(1, 8), tell=lambda _: None))


def test_contestants_take_turns_on_equal_prompts() -> None:
    turns = turns_of(Fixed("appliance", seconds=0.5), Fixed("other", seconds=1.0))
    assert [turn.name for turn in turns] == ["appliance", "other"] * 4
    assert {turn.same_answers for turn in turns} == {1.0}
    assert [turn.requests for turn in turns] == [8] * 4 + [16] * 4


def test_ratio_is_ours_over_theirs() -> None:
    turns = turns_of(Fixed("appliance", seconds=0.5), Fixed("other", seconds=1.0))
    lines = table(turns, concurrencies=(1, 8), what="per_cpu")
    assert lines[2] == "| appliance f32 | 8 (8 to 8) | 8 (8 to 8) |  |  |"
    assert lines[3] == (
        "| other f32 | 4 (4 to 4) | 4 (4 to 4) | 2.00 (2.00 to 2.00) | 2.00 (2.00 to 2.00) |"
    )


def test_a_short_answer_fails_the_run() -> None:
    with pytest.raises(RuntimeError, match="other gave 31 tokens instead of 8 x 4"):
        turns_of(Fixed("appliance", seconds=0.5), Fixed("other", seconds=1.0, missing=1))


def test_median_is_shown_with_its_range() -> None:
    assert spread([3.0], "{:.0f}".format) == "3"
    assert spread([3.0, 9.0, 4.0], "{:.0f}".format) == "4 (3 to 9)"


def test_whole_and_streamed_answers_read_alike() -> None:
    usage = b'{"prompt_tokens": 1, "completion_tokens": 2}'
    whole = b'{"choices": [{"text": "ab"}], "usage": ' + usage + b"}"
    events = [
        b'{"choices": [{"text": "a"}]}',
        b'{"choices": [{"text": "b"}], "usage": null}',
        b'{"choices": [], "usage": ' + usage + b"}",
    ]
    stream = b"".join(b"data: " + event + b"\n\n" for event in events) + b"data: [DONE]\n\n"
    assert read_stream(stream) == read_whole(whole)
