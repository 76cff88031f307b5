"""Penalties and grammars in the engine that runs a model: alone or among others, moved, preempted,
planned ahead, the tokens are the same (R5, R12)."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import jsonschema
import msgspec
import pytest

from appliance.api.grammar_check import Check, grammar_of
from appliance.core.payload import Sampling
from appliance.worker.text import TokenText
from tests.random_schemas import random_schema
from tests.worker.engine_rig import Driver, Slabs
from tests.worker.test_identity import Loop

MODEL = Path(__file__).resolve().parents[2] / "models" / "tiny-tasks"
EOS = 2
SCHEMAS = [random_schema(seed)[0] for seed in (3, 8, 21, 34, 55)]
GRAMMARS = [grammar_of(Check(kind="json_schema", text=json.dumps(schema))) for schema in SCHEMAS]


@pytest.fixture(scope="module")
def slabs() -> Iterator[Slabs]:
    opened = Slabs(MODEL, num_blocks=900)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def tokens() -> TokenText:
    return TokenText.load(MODEL)


def prompt_of(index: int) -> list[int]:
    return [1, 4, *(8 + (index * 37 + k * 11) % 900 for k in range(5 + index)), 2, 5]


def sampling_of(index: int) -> Sampling:
    """Grammars, penalties, both, neither; greedy and drawn."""
    sampling = Sampling(
        temperature=(0.0, 0.9)[index % 2],
        seed=index,
        eos_token_ids=(EOS,),
        logprobs=2 if index % 5 == 0 else None,
    )
    if index % 3:
        grammar = GRAMMARS[index % len(GRAMMARS)]
        sampling = msgspec.structs.replace(sampling, grammar=grammar, frequency_penalty=0.7)
    if index % 4:
        sampling = msgspec.structs.replace(
            sampling, repetition_penalty=1.1, presence_penalty=0.4, logit_bias=((40, 1.5),)
        )
    return sampling


def driver_of(slabs: Slabs) -> Driver:
    return Driver(slabs.engine(), num_blocks=slabs.num_blocks)


def alone(slabs: Slabs, index: int, count: int) -> list[int]:
    driver = driver_of(slabs)
    prompt = prompt_of(index)
    driver.add(0, prompt, sampling=sampling_of(index))
    driver.generate({0: len(prompt) + count})
    return driver.known[0][len(prompt) :]


def test_R12_thirty_two_at_once_say_what_each_says_alone(slabs: Slabs) -> None:
    driver, count = driver_of(slabs), 24
    for index in range(32):
        driver.add(index, prompt_of(index), sampling=sampling_of(index))
    driver.generate({index: len(prompt_of(index)) + count for index in range(32)}, chunk=7)
    for index in range(32):
        said = driver.known[index][len(prompt_of(index)) :]
        assert said == alone(slabs, index, count), index


@pytest.mark.parametrize("index", [1, 5, 7, 10, 12])
def test_R5_killed_at_any_token_and_continued_elsewhere_it_says_the_same(
    slabs: Slabs, index: int
) -> None:
    count = 30
    whole = alone(slabs, index, count)
    prompt = prompt_of(index)
    for at in (1, 2, 13, 29):
        driver = driver_of(slabs)
        driver.add(0, prompt, emitted=whole[:at], sampling=sampling_of(index))
        driver.generate({0: len(prompt) + count})
        assert driver.known[0][len(prompt) :] == whole


def test_R12_a_preempted_answer_goes_on_as_if_nothing_had_been(slabs: Slabs) -> None:
    index, count = 10, 30
    driver, prompt = driver_of(slabs), prompt_of(10)
    driver.add(0, prompt, sampling=sampling_of(index))
    for length in (len(prompt) + 4, len(prompt) + 15, len(prompt) + count):
        driver.generate({0: length})
        driver.preempt(0)
    assert driver.known[0][len(prompt) :] == alone(slabs, index, count)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_R12_every_depth_of_planning_gives_the_same_answers(slabs: Slabs, depth: int) -> None:
    loop = Loop(slabs.engine(), budget=48, depth=depth, num_blocks=200, max_seqs=6)
    for index in range(8):
        loop.add(index, prompt_of(index), sampling=sampling_of(index))
    loop.run()
    for index in range(8):
        said = loop.known[index][len(prompt_of(index)) :]
        assert said == alone(slabs, index, len(said)), index
        assert len(said) > 20


def answer(tokens: TokenText, ids: Sequence[int]) -> str:
    stream = tokens.stream()
    return "".join(map(stream.push, ids)) + stream.flush()


def test_R21_drawn_answers_follow_their_schemas(slabs: Slabs, tokens: TokenText) -> None:
    driver = driver_of(slabs)
    for index in range(15):
        sampling = Sampling(
            seed=index,
            temperature=1.0,
            frequency_penalty=1.0,
            eos_token_ids=(EOS,),
            grammar=GRAMMARS[index % len(GRAMMARS)],
        )
        driver.add(index, prompt_of(index), sampling=sampling)
    driver.generate({index: len(prompt_of(index)) + 300 for index in range(15)})
    for index in range(15):
        said = driver.known[index][len(prompt_of(index)) :]
        assert EOS in said
        end = said.index(EOS)
        assert set(said[end:]) == {EOS}  # what was planned ahead of the end
        value = json.loads(answer(tokens, said[:end]))
        jsonschema.Draft202012Validator(SCHEMAS[index % len(SCHEMAS)]).validate(value)


def test_a_grammar_that_cannot_go_on_fails_its_own_sequence_only(slabs: Slabs) -> None:
    driver = driver_of(slabs)
    broken = Sampling(temperature=0.0, eos_token_ids=(EOS,), grammar="no grammar at all {")
    driver.add(0, prompt_of(1), sampling=sampling_of(1))
    driver.add(1, prompt_of(2), sampling=broken)
    fine, failed = driver.step([0, 1])
    assert fine.failed == ""
    assert fine.token == alone(slabs, 1, 1)[0]
    assert failed.failed
