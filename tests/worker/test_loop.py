"""The step loop between a real socket, the real Batcher and an engine: what its frames say."""

import socket
from collections.abc import Callable, Iterator, Sequence

import msgspec
import pytest
from tokenizers import Tokenizer

from appliance.core.faults import FaultRule
from appliance.core.messages import (
    Abort,
    Aborted,
    Assign,
    CacheChanged,
    Preempted,
    Refused,
    SetBudget,
    StepReported,
)
from appliance.core.payload import Sampling, SequenceState, TokenLogprobs
from appliance.core.types import ErrorKind, FinishReason, Request, RequestId, StepPlan
from appliance.worker.engine import Engine, EngineError, SampledToken
from appliance.worker.fault_actions import InjectedFault
from appliance.worker.text import TokenText
from tests.worker.loop_rig import MODEL, Rig, ScriptedEngine, W, names, paced, packed


@pytest.fixture(scope="module")
def tokens() -> TokenText:
    return TokenText.load(MODEL)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


RigMaker = Callable[..., Rig]


@pytest.fixture
def rig(tokens: TokenText) -> Iterator[RigMaker]:
    """Makes running rigs; at the end each is closed in order, and no block may be held (R2)."""
    made: list[Rig] = []

    def make(engine: Engine, **options: object) -> Rig:
        made.append(Rig(engine, tokens, **options))  # type: ignore[arg-type]
        return made[-1].start()

    yield make
    for each in made:
        each.end()
        load = each.batcher.load()
        assert load.blocks_free + load.blocks_held + load.blocks_leased == load.blocks_total
        if each.error is None and not each.batcher.has_work():
            assert load.blocks_held == 0


PROMPT = list(range(30, 41))


def test_length_end_gives_out_what_was_kept_back_in_the_same_frame(
    rig: RigMaker, tokenizer: Tokenizer
) -> None:
    ids = tokenizer.encode("say STOP 🎉", add_special_tokens=False).ids
    script = ids[:-1]  # half a character
    node = rig(ScriptedEngine({7: script}))
    node.assign(7, PROMPT, max_tokens=len(script), sampling=Sampling(stop=("🎉!",)))
    node.finish(7)
    assert node.answers[7].tokens == script
    assert node.answers[7].reason is FinishReason.LENGTH
    assert node.answers[7].text == "say STOP \ufffd" == tokenizer.decode(script)
    last = node.frames[-1][1]
    assert last is not None
    assert last.texts[-1].endswith("\ufffd")


def test_stop_string_over_several_tokens_ends_the_answer(
    rig: RigMaker, tokenizer: Tokenizer
) -> None:
    script = tokenizer.encode("one two END three", add_special_tokens=False).ids
    engine = ScriptedEngine({7: script})
    node = rig(engine)
    node.assign(7, PROMPT, sampling=Sampling(stop=(" END",)))
    node.finish(7)
    assert node.answers[7].text == "one two"
    assert node.answers[7].reason is FinishReason.STOP
    assert len(node.answers[7].tokens) < len(script)
    node.until(lambda: bool(engine.dropped))


def test_columns_stand_in_the_order_of_the_report(rig: RigMaker) -> None:
    class WithLogprobs(ScriptedEngine):
        def execute(self, plan: StepPlan) -> Sequence[SampledToken]:
            return [
                SampledToken(id=s.id, token=s.token, logprobs=TokenLogprobs(logprob=-float(s.id)))
                if s.id == 2
                else s
                for s in super().execute(plan)
            ]

    node = rig(WithLogprobs({1: [50] * 9, 2: [51] * 9, 3: [52] * 9}))
    for number in (1, 2, 3):
        node.assign(number, PROMPT, max_tokens=9)
    node.finish(1, 2, 3)
    assert [set(node.answers[n].tokens) for n in (1, 2, 3)] == [{50}, {51}, {52}]
    with_all = [out for _, out in node.frames if out is not None and len(out.ids) == 3]
    for outputs in with_all:
        assert outputs.logprobs is not None
        given = dict(zip(outputs.ids, outputs.logprobs, strict=True))
        assert given[RequestId(2)] == [TokenLogprobs(logprob=-2.0)]
        assert given[RequestId(1)] is None


class FailingEngine(ScriptedEngine):
    """Says of one request, at one of its tokens, that it cannot go on."""

    def execute(self, plan: StepPlan) -> Sequence[SampledToken]:
        return [
            msgspec.structs.replace(s, failed="nothing may follow") if s.token == 77 else s
            for s in super().execute(plan)
        ]


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_an_answer_that_cannot_go_on_is_refused_for_good_and_costs_the_others_nothing(
    rig: RigMaker, depth: int
) -> None:
    engine = FailingEngine({1: [50] * 9, 2: [51, 51, 77, 51, 51, 51, 51], 3: [52] * 9})
    node = rig(engine, depth=depth)
    for number in (1, 2, 3):
        node.assign(number, PROMPT, max_tokens=9)
    node.finish(1, 3)
    assert node.answers[1].tokens == [50] * 9
    assert node.answers[3].tokens == [52] * 9
    assert node.answers[2].tokens == [51, 51]
    assert node.answers[2].reason is None
    node.until(lambda: bool(node.reports(Aborted)))
    about = [
        report
        for reports, _ in node.frames
        for report in reports
        if isinstance(report, Refused | Aborted)
    ]
    refused, aborted = about  # in this order: what was aborted unasked would be placed again
    assert isinstance(refused, Refused)
    assert (refused.kind, refused.request_id) == (ErrorKind.GRAMMAR, 2)
    assert "nothing may follow" in refused.reason
    assert isinstance(aborted, Aborted)
    node.until(lambda: 2 in engine.dropped)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_r12_every_depth_gives_the_same_answers(
    rig: RigMaker, tokens: TokenText, tokenizer: Tokenizer, depth: int
) -> None:
    node = rig(paced(tokens), depth=depth, max_batch_tokens=13)
    prompts = {n: [20 + n, *PROMPT[: 3 + n]] for n in range(1, 8)}
    for number, prompt in prompts.items():
        node.assign(number, prompt, max_tokens=20)
    node.finish(*prompts)
    reasons = {node.answers[number].reason for number in prompts}
    assert reasons == {FinishReason.STOP, FinishReason.LENGTH}
    for number, prompt in prompts.items():
        alone = rig(paced(tokens))
        alone.assign(number, prompt, max_tokens=20)
        alone.finish(number)
        answer = node.answers[number]
        assert answer.tokens == alone.answers[number].tokens
        assert answer.text == alone.answers[number].text == tokenizer.decode(answer.tokens)


def test_preempted_sequences_come_back_with_their_next_token(
    rig: RigMaker, tokens: TokenText
) -> None:
    tight, wide = rig(paced(tokens, num_blocks=14)), rig(paced(tokens, num_blocks=64))
    sampling = Sampling(ignore_eos=True)
    for node in (tight, wide):
        with node.together():
            for number in range(4):
                node.assign(number, [20 + number, *PROMPT], max_tokens=30, sampling=sampling)
        node.finish(0, 1, 2, 3)
    assert tight.reports(Preempted)
    assert not wide.reports(Preempted)
    for number in range(4):
        assert tight.answers[number].tokens == wide.answers[number].tokens
        assert tight.answers[number].text == wide.answers[number].text


def test_r5_moved_sequence_goes_on_in_the_middle_of_a_stop_string(
    rig: RigMaker, tokenizer: Tokenizer
) -> None:
    script = tokenizer.encode("so 🎉 ne🎉ver END after", add_special_tokens=False).ids
    sampling = Sampling(stop=("r END", "never"))
    whole = rig(ScriptedEngine({1: script}))
    whole.assign(1, PROMPT, sampling=sampling)
    whole.finish(1)
    expected = whole.answers[1]
    assert expected.text == "so 🎉 ne🎉ve"
    texts = [out.texts[0] for _, out in whole.frames if out is not None and out.ids]
    for moved in range(1, len(expected.tokens)):
        node = rig(ScriptedEngine({1: script}))
        node.assign(1, PROMPT, sampling=sampling, emitted=expected.tokens[:moved])
        node.finish(1)
        assert node.answers[1].tokens == expected.tokens[moved:]
        assert node.answers[1].text == "".join(texts[moved:])


def test_blocks_are_named_by_all_their_tokens_also_after_a_move(
    rig: RigMaker, tokens: TokenText
) -> None:
    node = rig(paced(tokens))
    sampling = Sampling(ignore_eos=True)
    node.assign(1, PROMPT, max_tokens=22, sampling=sampling)
    node.finish(1)
    answer = node.answers[1].tokens
    node.assign(2, PROMPT, max_tokens=30, sampling=sampling, emitted=answer)
    node.finish(2)
    assert node.answers[2].cached >= len(PROMPT)
    known = [*PROMPT, *answer, *node.answers[2].tokens]
    added = [
        name
        for report in node.reports(CacheChanged)
        if isinstance(report, CacheChanged)
        for name in report.added
    ]
    assert added == names(known[:-1])


def test_same_prompt_hits_the_prefix_and_gives_the_same_answer(
    rig: RigMaker, tokens: TokenText
) -> None:
    node = rig(paced(tokens))
    node.assign(1, PROMPT, max_tokens=9)
    node.finish(1)
    node.assign(2, PROMPT, max_tokens=9)
    node.assign(3, PROMPT, max_tokens=9, group=3)
    node.assign(4, PROMPT, max_tokens=9, group=3)
    node.finish(2, 3, 4)
    assert node.answers[1].cached == 0
    assert node.answers[2].cached == 8
    assert all(node.answers[n].tokens == node.answers[1].tokens for n in (2, 3, 4))


def test_without_a_prefix_cache_nothing_is_named(rig: RigMaker, tokens: TokenText) -> None:
    node = rig(paced(tokens), enable_prefix_cache=False)
    for number in (1, 2):
        node.assign(number, PROMPT, max_tokens=12)
        node.finish(number)
    assert node.answers[2].cached == 0
    assert not node.reports(CacheChanged)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_r3_abort_frees_a_sequence_in_any_state(
    rig: RigMaker, tokens: TokenText, depth: int
) -> None:
    node = rig(paced(tokens), depth=depth, max_num_seqs=2, max_batch_tokens=16)
    sampling = Sampling(ignore_eos=True)
    for number in range(6):
        node.assign(number, [*PROMPT, number] * 3, max_tokens=200, sampling=sampling)
    node.until(lambda: bool(node.answers[0].tokens))
    for number in (*range(6), 77):
        node.send(Abort(worker=W, request_id=RequestId(number)))
    node.until(lambda: len(node.reports(Aborted)) == 7)
    node.until(lambda: node.load is not None and node.load.blocks_held == 0)
    assert not node.batcher.has_work()
    node.assign(9, PROMPT, max_tokens=3)
    node.finish(9)


def test_token_sampled_after_an_abort_is_dropped(rig: RigMaker) -> None:
    engine = ScriptedEngine({1: [50] * 40, 2: [51] * 40})
    node = rig(engine)

    def abort_in_the_step(plan: StepPlan) -> None:
        if plan.step == 5:
            node.send(Abort(worker=W, request_id=RequestId(1)))
            node.loop.listen_until(node.loop._clock() + 0.02)
            assert not engine.dropped  # the running step still computes it

    engine.during = abort_in_the_step
    node.assign(1, PROMPT, max_tokens=30)
    node.assign(2, PROMPT, max_tokens=30)
    node.finish(2)
    assert len(node.answers[1].tokens) < 5
    assert len(node.answers[2].tokens) == 30
    assert len(node.reports(Aborted)) == 1
    assert engine.dropped == [1, 2]


def test_request_can_arrive_while_a_step_lasts(rig: RigMaker) -> None:
    engine = ScriptedEngine({1: [50] * 9, 2: [51] * 9})
    node = rig(engine)

    def assign_in_the_step(plan: StepPlan) -> None:
        if plan.step == 1:
            node.assign(2, PROMPT, max_tokens=4)
            node.loop.listen_until(node.loop._clock() + 0.02)

    engine.during = assign_in_the_step
    node.assign(1, PROMPT, max_tokens=4)
    node.finish(1, 2)
    assert node.answers[2].tokens == [51] * 4


def test_state_that_does_not_fit_its_request_is_refused(rig: RigMaker, tokens: TokenText) -> None:
    node = rig(paced(tokens))
    request = Request(id=RequestId(1), arrived=0.0, prompt_tokens=5, max_tokens=3)
    short = SequenceState(prompt=packed([1, 2]), sampling=Sampling())
    node.send(Assign(worker=W, request=request), b"\xc1 not msgpack")
    node.send(Assign(worker=W, request=request), msgspec.msgpack.encode(short))
    node.until(lambda: len(node.reports(Refused)) == 2)
    for refused in node.reports(Refused):
        assert isinstance(refused, Refused)
        assert (refused.command, refused.request_id) == ("Assign", 1)
        assert refused.kind is ErrorKind.INTERNAL
        assert "does not fit its request" in refused.reason


def test_answers_of_the_batcher_go_back(rig: RigMaker, tokens: TokenText) -> None:
    node = rig(paced(tokens, num_blocks=4))
    node.send(SetBudget(worker=W, prefill_tokens=0, max_decodes=1))
    node.assign(1, PROMPT, max_tokens=50)
    node.until(lambda: len(node.reports(Refused)) == 2)
    kinds = [r.kind for r in node.reports(Refused) if isinstance(r, Refused)]
    assert kinds == [ErrorKind.INTERNAL, ErrorKind.TOO_LONG]


def test_orderly_end_waits_for_the_running_step(rig: RigMaker) -> None:
    engine = ScriptedEngine({1: [50] * 300})
    node = rig(engine)
    steps: list[int] = []

    def close_in_the_step(plan: StepPlan) -> None:
        steps.append(plan.step)
        if plan.step == 3:
            node.node.shutdown(socket.SHUT_WR)
            node.loop.listen_until(node.loop._clock() + 0.01)

    engine.during = close_in_the_step
    node.assign(1, PROMPT, max_tokens=200)
    while node.read():
        pass
    assert steps == [1, 2, 3]
    assert len(node.answers[1].tokens) == 3
    assert node.error is None


def test_engine_error_ends_the_loop_and_nothing_more_is_sent(rig: RigMaker) -> None:
    engine = ScriptedEngine({1: [50] * 300})
    node = rig(engine)

    def fail(plan: StepPlan) -> None:
        if plan.step == 4:
            raise EngineError("device lost; reset it")

    engine.during = fail
    node.assign(1, PROMPT, max_tokens=200)
    while node.read():
        pass
    assert isinstance(node.error, EngineError)
    assert len(node.answers[1].tokens) == 3


@pytest.mark.parametrize(
    "point",
    ["worker.assign", "worker.before_step", "worker.after_step", "worker.before_send"],
)
def test_fault_strikes_where_the_plan_says(rig: RigMaker, point: str) -> None:
    rule = FaultRule(point=point, action="raise", nth=3)
    node = rig(ScriptedEngine({n: [50] * 300 for n in range(4)}), faults=[rule])
    for number in range(4):
        node.assign(number, PROMPT, max_tokens=9)
    while node.read():
        pass
    assert isinstance(node.error, InjectedFault)
    assert point in str(node.error)
    if point != "worker.assign":
        assert len(node.reports(StepReported)) == 2


@pytest.mark.parametrize("point", ["worker.before_step", "worker.assign"])
def test_r27_fault_can_look_for_a_token_of_the_prompt(rig: RigMaker, point: str) -> None:
    rule = FaultRule(point=point, action="oom", token=999)
    node = rig(ScriptedEngine({n: [999] * 300 for n in range(4)}), faults=[rule])
    node.assign(1, PROMPT, max_tokens=9)
    node.finish(1)
    node.assign(2, [*PROMPT, 999, 5], max_tokens=9)
    while node.read():
        pass
    assert isinstance(node.error, EngineError)
    assert "out of memory" in str(node.error)
    assert node.answers[2].tokens == []


def test_step_times_follow_each_other_without_a_gap(rig: RigMaker, tokens: TokenText) -> None:
    node = rig(paced(tokens))
    node.assign(1, PROMPT, max_tokens=20, sampling=Sampling(ignore_eos=True))
    node.finish(1)
    steps = [r for r in node.reports(StepReported) if isinstance(r, StepReported)]
    assert [step.step for step in steps] == list(range(1, 21))
    assert all(step.elapsed >= 0 for step in steps)
    assert steps[0].prefill_tokens == len(PROMPT)
    assert all(step.decode_tokens == 1 for step in steps[1:])
