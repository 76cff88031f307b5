"""The paced engine: answers depend on the prompt alone, KV marks see every mix-up, time is kept."""

import json
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest

from appliance.api.grammar_check import Check, grammar_of
from appliance.core.payload import Sampling, SequenceState
from appliance.core.profiles import device_profile, paced_kv_slab_bytes
from appliance.core.start import WorkerStart
from appliance.core.types import BatcherConfig, Phase, RequestId, SeqWork, StepPlan, WorkerId
from appliance.worker.engine import EngineError, SampledToken
from appliance.worker.paced_engine import PacedEngine
from appliance.worker.pacing import Pacer
from appliance.worker.text import TokenText

MODEL = Path(__file__).resolve().parents[2] / "models" / "tiny-tasks"
BLOCK = 4
EOS = 2
GREEDY = Sampling(temperature=0.0, eos_token_ids=(EOS,), ignore_eos=True)


class Clock:
    """A clock that stands still unless somebody waits."""

    def __init__(self) -> None:
        self.now = 100.0
        self.waits: list[float] = []

    def __call__(self) -> float:
        return self.now

    def wait_until(self, due: float) -> None:
        self.waits.append(due)
        self.now = max(self.now, due)


@pytest.fixture(scope="module")
def tokens() -> TokenText:
    return TokenText.load(MODEL)


class Rig:
    """An engine, its slab, and the bookkeeping that a Batcher would do for it."""

    def __init__(
        self,
        tokens: TokenText,
        *,
        num_blocks: int = 64,
        max_positions: int = 128,
        validate: bool = True,
    ) -> None:
        self.slab = bytearray(paced_kv_slab_bytes(num_blocks=num_blocks, block_tokens=BLOCK))
        self.clock = Clock()
        self.engine = PacedEngine(
            memoryview(self.slab),
            profile=device_profile("h200-8b"),
            tokens=tokens,
            num_blocks=num_blocks,
            block_tokens=BLOCK,
            max_positions=max_positions,
            tokenizer=MODEL / "tokenizer.json",
            validate=validate,
            clock=self.clock,
        )
        self.engine.wait_with(self.clock.wait_until)
        self._free = list(range(num_blocks))
        random.Random(5).shuffle(self._free)
        self._step = 0
        self._held: dict[int, int] = {}

    def add(
        self, number: int, ids: Sequence[int], sampling: Sampling = GREEDY, **more: object
    ) -> None:
        prompt = np.array(ids, dtype="<i4").tobytes()
        self.engine.add(RequestId(number), SequenceState(prompt=prompt, sampling=sampling, **more))  # type: ignore[arg-type]

    def step(self, *work: SeqWork) -> Sequence[SampledToken]:
        self._step += 1
        return self.engine.execute(StepPlan(step=self._step, work=work))

    def work(
        self,
        number: int,
        start: int,
        count: int,
        *,
        samples: bool = True,
        fresh: bool | None = None,
        blocks: Sequence[int] | None = None,
    ) -> SeqWork:
        """A work item with the blocks it needs from the pool, or these `blocks`."""
        fresh = start == 0 if fresh is None else fresh
        held = 0 if fresh else self._held.get(number, 0)
        needed = -(-(start + count) // BLOCK)
        new = [self._free.pop() for _ in range(needed - held)] if blocks is None else list(blocks)
        self._held[number] = held + len(new)
        return SeqWork(
            id=RequestId(number),
            start=start,
            num_tokens=count,
            phase=Phase.DECODE if start and count == 1 else Phase.PREFILL,
            samples=samples,
            fresh=fresh,
            new_blocks=(tuple(new),),
        )

    def generate(self, number: int, prompt: int, count: int) -> list[int]:
        """Prefill at once, then decode: `count` tokens."""
        first = self.step(self.work(number, 0, prompt))[0].token
        places = range(prompt, prompt + count - 1)
        return [first, *(self.step(self.work(number, at, 1))[0].token for at in places)]


PROMPT = list(range(30, 41))


def test_answer_is_the_same_alone_batched_chunked_and_on_another_worker(tokens: TokenText) -> None:
    alone = Rig(tokens)
    alone.add(1, PROMPT)
    expected = alone.generate(1, len(PROMPT), 70)

    other = Rig(tokens, num_blocks=200)
    for number in (4, 5, 6):
        other.add(number, PROMPT[number:])
    other.add(7, PROMPT)
    got: Mapping[int, list[int]] = {number: [] for number in (4, 5, 6, 7)}
    assert other.step(other.work(7, 0, 6, samples=False)) == []
    first = [other.work(number, 0, len(PROMPT[number:])) for number in (4, 5, 6)]
    for token in other.step(*first, other.work(7, 6, len(PROMPT) - 6)):
        got[token.id].append(token.token)
    for place in range(69):
        lengths = {4: 7, 5: 6, 6: 5, 7: 11}
        for token in other.step(*(other.work(n, lengths[n] + place, 1) for n in (4, 5, 6, 7))):
            got[token.id].append(token.token)
    assert got[7] == expected
    assert got[4] != expected


def test_r5_moved_sequence_goes_on_with_the_same_tokens(tokens: TokenText) -> None:
    sampling = Sampling(temperature=0.8, seed=99, eos_token_ids=(EOS,), ignore_eos=True)
    first = Rig(tokens)
    first.add(1, PROMPT, sampling)
    whole = first.generate(1, len(PROMPT), 12)
    second = Rig(tokens)
    second.add(1, PROMPT, sampling, emitted=np.array(whole[:5], dtype="<i4").tobytes())
    assert second.generate(1, len(PROMPT) + 5, 7) == whole[5:]


def test_seed_counts_only_with_a_temperature(tokens: TokenText) -> None:
    rig = Rig(tokens, num_blocks=200)
    answers = []
    for number, (temperature, seed) in enumerate([(0.0, 1), (0.0, 2), (1.0, 1), (1.0, 2)]):
        rig.add(number, PROMPT, Sampling(temperature=temperature, seed=seed))
        answers.append(rig.generate(number, len(PROMPT), 8))
    assert answers[0] == answers[1]
    assert answers[2] != answers[3]


def test_every_token_is_printable(tokens: TokenText) -> None:
    rig = Rig(tokens)
    rig.add(1, PROMPT)
    stream = tokens.stream()
    text = "".join(stream.push(token) for token in rig.generate(1, len(PROMPT), 100))
    assert text.isprintable()


def answer_length(rig: Rig, number: int, prompt: Sequence[int], sampling: Sampling) -> int:
    rig.add(number, prompt, sampling)
    script = rig.engine._sequences[RequestId(number)].script
    return next(place for place in range(5000) if script.token(place) == EOS)


def test_answer_ends_at_a_length_of_its_prompt(tokens: TokenText) -> None:
    rig = Rig(tokens)
    sampling = Sampling(eos_token_ids=(EOS,))
    lengths = [answer_length(rig, n, [5, 6, n], sampling) for n in range(100)]
    assert len(set(lengths)) > 50
    assert 60 < sorted(lengths)[50] < 500
    other_seed = msgspec.structs.replace(sampling, seed=4, temperature=0.3)
    assert answer_length(rig, 0, [5, 6, 0], other_seed) == lengths[0]
    long = msgspec.structs.replace(sampling, min_tokens=4999)
    assert answer_length(rig, 0, [5, 6, 0], long) == 4999


FORM = grammar_of(
    Check(
        kind="json_schema",
        text='{"type":"object","properties":{"a":{"type":"string","maxLength":9},"b":{"enum":[1,"x"]}},'
        '"required":["a","b"],"additionalProperties":false}',
    )
)


def test_R21_an_answer_of_a_fixed_form_has_it_and_ends_there(tokens: TokenText) -> None:
    rig = Rig(tokens, num_blocks=200)
    for number in range(6):
        rig.add(number, PROMPT, Sampling(seed=number, eos_token_ids=(EOS,), grammar=FORM))
        ids = rig.generate(number, len(PROMPT), 60)
        end = ids.index(EOS)
        assert set(ids[end:]) == {EOS}
        stream = tokens.stream()
        value = json.loads("".join(map(stream.push, ids[:end])))
        assert value.keys() == {"a", "b"}
        assert value["b"] in (1, "x")


def test_R5_an_answer_of_a_fixed_form_goes_on_elsewhere_with_the_same_tokens(
    tokens: TokenText,
) -> None:
    sampling = Sampling(seed=4, eos_token_ids=(EOS,), grammar=FORM)
    whole = Rig(tokens)
    whole.add(1, PROMPT, sampling)
    expected = whole.generate(1, len(PROMPT), 16)
    for at in (1, 5, 15):
        other = Rig(tokens)
        other.add(1, PROMPT, sampling, emitted=np.array(expected[:at], dtype="<i4").tobytes())
        assert other.generate(1, len(PROMPT) + at, 16 - at) == expected[at:]


def test_an_answer_that_its_grammar_lets_nowhere_fails_alone(tokens: TokenText) -> None:
    rig = Rig(tokens)
    broken = Sampling(
        eos_token_ids=(EOS,), grammar='{"grammars":[{"lark_grammar":"start: nobody"}]}'
    )
    rig.add(1, PROMPT, broken)
    rig.add(2, PROMPT)
    n = len(PROMPT)
    failed, fine = rig.step(rig.work(1, 0, n), rig.work(2, 0, n))
    assert "nobody" in failed.failed
    assert fine.failed == ""


def test_logprobs_are_those_of_an_even_draw(tokens: TokenText) -> None:
    rig = Rig(tokens)
    rig.add(1, PROMPT, Sampling(logprobs=3))
    (sampled,) = rig.step(rig.work(1, 0, len(PROMPT)))
    assert sampled.logprobs is not None
    assert sampled.logprobs.top_ids[0] == sampled.token
    assert len(set(sampled.logprobs.top_ids)) == 3
    assert sampled.logprobs.logprob == pytest.approx(-np.log(len(tokens.printable_ids())))


def test_prefix_in_place_is_taken_over(tokens: TokenText) -> None:
    rig = Rig(tokens)
    rig.add(1, PROMPT)
    first = rig.work(1, 0, len(PROMPT))
    expected = rig.step(first)[0].token
    rig.add(2, PROMPT)
    shared = first.new_blocks[0][:2]
    hit = rig.work(2, 8, len(PROMPT) - 8, fresh=True, blocks=(*shared, rig._free.pop()))
    assert rig.step(hit)[0].token == expected


def test_r13_false_prefix_hit_is_an_error(tokens: TokenText) -> None:
    rig = Rig(tokens, validate=False)
    rig.add(1, PROMPT)
    first = rig.work(1, 0, len(PROMPT))
    rig.step(first)
    rig.add(2, [99, *PROMPT[1:]])
    hit = rig.work(2, 8, 3, fresh=True, blocks=(*first.new_blocks[0][:2], rig._free.pop()))
    with pytest.raises(EngineError, match=r"is not its own.*request 2.*prefix_cache"):
        rig.step(hit)


@pytest.mark.parametrize("more", [{"salt": "tenant"}, {"adapter": "lora"}])
def test_prefix_of_another_tenant_or_adapter_is_not_its_own(
    tokens: TokenText, more: Mapping[str, str]
) -> None:
    rig = Rig(tokens, validate=False)
    rig.add(1, PROMPT)
    first = rig.work(1, 0, len(PROMPT))
    rig.step(first)
    rig.add(2, PROMPT, **more)
    hit = rig.work(2, 8, 3, fresh=True, blocks=(*first.new_blocks[0][:2], rig._free.pop()))
    with pytest.raises(EngineError, match="is not its own"):
        rig.step(hit)


def test_r13_overwritten_block_is_seen_at_the_next_step(tokens: TokenText) -> None:
    rig = Rig(tokens, validate=False)
    rig.add(1, PROMPT)
    rig.step(rig.work(1, 0, len(PROMPT)))
    rig.slab[:] = bytes(len(rig.slab))
    with pytest.raises(EngineError, match="KV of token 10 is not its own"):
        rig.step(rig.work(1, len(PROMPT), 1))


def test_validation_sees_an_old_block_too(tokens: TokenText) -> None:
    for validate in (True, False):
        rig = Rig(tokens, validate=validate)
        rig.add(1, PROMPT)
        first = rig.work(1, 0, len(PROMPT))
        rig.step(first)
        rig.slab[first.new_blocks[0][0] * BLOCK * 8] ^= 1
        if validate:
            with pytest.raises(EngineError, match=f"block {first.new_blocks[0][0]} "):
                rig.step(rig.work(1, len(PROMPT), 1))
        else:
            assert rig.step(rig.work(1, len(PROMPT), 1))


def test_plan_that_does_not_fit_the_sequence_is_an_error(tokens: TokenText) -> None:
    for bad, words in [
        (lambda rig: rig.work(1, 0, len(PROMPT) + 1), "nobody knows"),
        (lambda rig: rig.work(1, 0, len(PROMPT) - 1), "samples before"),
        (lambda rig: rig.work(1, 0, len(PROMPT), blocks=(3, 4)), "too short"),
    ]:
        rig = Rig(tokens)
        rig.add(1, PROMPT)
        with pytest.raises(EngineError, match=words):
            rig.step(bad(rig))


def test_work_of_dropped_sequences_is_skipped(tokens: TokenText) -> None:
    rig = Rig(tokens)
    rig.add(1, PROMPT)
    rig.add(2, PROMPT)
    rig.engine.drop(RequestId(1))
    rig.engine.drop(RequestId(77))
    sampled = rig.step(rig.work(1, 0, len(PROMPT)), rig.work(2, 0, len(PROMPT)))
    assert [token.id for token in sampled] == [2]


def test_steps_in_a_row_keep_to_the_schedule_and_rest_ends_it(tokens: TokenText) -> None:
    rig = Rig(tokens)
    rig.add(1, PROMPT)
    profile = device_profile("h200-8b")
    n = len(PROMPT)
    rig.step(rig.work(1, 0, n))
    due = 100.0 + profile.step_seconds(
        num_tokens=n, num_samples=1, num_pairs=n * (n + 1) // 2, num_kv_tokens=n
    )
    assert rig.clock.waits == [pytest.approx(due)]
    rig.clock.now += 0.003  # the host is late: the device was not
    rig.step(rig.work(1, n, 1))
    decode = profile.step_seconds(num_tokens=1, num_samples=1, num_pairs=n + 1, num_kv_tokens=n + 1)
    assert rig.clock.waits[1] == pytest.approx(due + decode)
    assert rig.engine.took() == pytest.approx(decode)
    rig.engine.rest()
    rig.clock.now += 0.003
    rig.step(rig.work(1, n + 1, 1))
    assert rig.clock.waits[2] > due + 2 * decode + 0.003


def test_pacer_catches_up_and_forgives_a_long_stop() -> None:
    clock = Clock()
    pacer = Pacer(clock=clock, most_debt=0.5)
    assert pacer.due(pacer.begin(), 0.1) == pytest.approx(100.1)
    clock.now = 100.5
    assert pacer.due(pacer.begin(), 0.1) == pytest.approx(100.2)
    clock.now = 200.0
    assert pacer.due(pacer.begin(), 0.1) == pytest.approx(200.1)


def start_record(*, num_blocks: int = 8, profile: str = "cpu") -> WorkerStart:
    return WorkerStart(
        worker=WorkerId(2),
        epoch=1,
        devices=("paced:2",),
        engine="paced",
        model_dir=str(MODEL),
        dtype="float32",
        batcher=BatcherConfig(max_model_len=64),
        block_tokens=BLOCK,
        num_blocks=num_blocks,
        has_weights_fd=False,
        load_weights=False,
        hash_key=b"k",
        profile=profile,
    )


def test_engine_opens_on_the_slab_of_the_node(tokens: TokenText) -> None:
    fd = os.memfd_create("kv")
    try:
        os.ftruncate(fd, paced_kv_slab_bytes(num_blocks=8, block_tokens=BLOCK))
        engine = PacedEngine.open(start_record(), weights_fd=None, kv_fd=fd)
        assert engine.info.groups[0].num_blocks == 8
        assert engine.info.weights_source == "none"
        assert "cpu" in engine.info.notes[0]
        engine.wait_with(lambda due: None)
        state = SequenceState(prompt=np.arange(4, dtype="<i4").tobytes(), sampling=GREEDY)
        engine.add(RequestId(1), state)
        work = SeqWork(
            id=RequestId(1),
            start=0,
            num_tokens=4,
            phase=Phase.PREFILL,
            samples=True,
            fresh=True,
            new_blocks=((7,),),
        )
        assert len(engine.execute(StepPlan(step=1, work=(work,)))) == 1
        assert os.pread(fd, 8 * BLOCK, 7 * 8 * BLOCK).strip(b"\0")
        with pytest.raises(ValueError, match="8000 blocks need"):
            PacedEngine.open(start_record(num_blocks=8000), weights_fd=None, kv_fd=fd)
        with pytest.raises(ValueError, match="use one of"):
            PacedEngine.open(start_record(profile="gpu"), weights_fd=None, kv_fd=fd)
    finally:
        os.close(fd)


def test_too_long_sequence_names_the_setting(tokens: TokenText) -> None:
    rig = Rig(tokens, max_positions=8)
    with pytest.raises(EngineError, match="max_model_len"):
        rig.add(1, PROMPT)
