"""Model workers: an answer that moves is, token for token, the one that stays (R12).

Two engines over slabs of one node, in threads; the bundled model in float32 on one thread."""

from collections.abc import Iterator

import msgspec
import pytest
from tokenizers import Tokenizer

from appliance.core.messages import KvPulled, PrefixPulled
from appliance.core.model_shape import parse_config, slab_bytes
from appliance.core.payload import Sampling
from appliance.core.types import BatcherConfig, FinishReason
from tests.worker.moves_ends import MODEL, Slabs, paced_start
from tests.worker.moves_rig import MovesNode

EOS = (2,)
GRAMMAR = 'start: /[a-z ]{10,60}/ "." /[0-9]{4,8}/\n'
CASES = {
    "greedy": Sampling(temperature=0.0, eos_token_ids=EOS, ignore_eos=True),
    "seeded": Sampling(temperature=0.9, top_p=0.95, seed=11, eos_token_ids=EOS, ignore_eos=True),
    "penalties": Sampling(
        temperature=0.7,
        seed=12,
        frequency_penalty=0.6,
        presence_penalty=0.3,
        repetition_penalty=1.2,
        eos_token_ids=EOS,
        ignore_eos=True,
    ),
    "grammar": Sampling(temperature=0.8, seed=13, grammar=GRAMMAR, eos_token_ids=EOS),
    "logprobs": Sampling(temperature=0.0, logprobs=2, eos_token_ids=EOS, ignore_eos=True),
}
MAX_TOKENS = 60


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MovesNode]:
    """Two workers; the second one maps what the first one has loaded."""
    shape = parse_config(msgspec.json.decode((MODEL / "config.json").read_bytes()))
    start = paced_start(
        engine="torch",
        has_weights_fd=True,
        num_blocks=128,
        batcher=BatcherConfig(max_model_len=512, max_batch_tokens=64),
    )
    slabs = Slabs(
        start,
        block_bytes=shape.kv_block_bytes("float32", block_tokens=start.block_tokens),
        weight_bytes=slab_bytes(shape, "float32"),
    )
    made = MovesNode(slabs, tmp_path_factory.mktemp("torch"))
    made.add(0, load_weights=True).until(lambda: made.ends[0].up)
    made.add(1).ready()
    yield made
    made.close()
    assert [end.error for end in made.ends.values()] == [None, None]


@pytest.fixture(scope="module")
def prompts() -> dict[str, list[int]]:
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    text = "the spoon and the moon went to the river to see the boats. "
    return {
        name: tokenizer.encode(f"{name}: {text * (number + 1)}").ids
        for number, name in enumerate(CASES)
    }


class Numbers:
    """Request ids that no test shares."""

    def __init__(self) -> None:
        self.last = 0

    def next(self) -> int:
        self.last += 1
        return self.last


@pytest.fixture(scope="module")
def numbers() -> Numbers:
    return Numbers()


@pytest.fixture(scope="module")
def undisturbed(
    node: MovesNode, prompts: dict[str, list[int]], numbers: Numbers
) -> dict[str, tuple[list[int], str]]:
    """Answers of the first worker alone, one at a time."""
    answers: dict[str, tuple[list[int], str]] = {}
    for name, sampling in CASES.items():
        number = numbers.next()
        node.assign(number, 0, prompts[name], sampling=sampling, max_tokens=MAX_TOKENS)
        answer = node.finish(number).answers[number]
        answers[name] = (answer.tokens, answer.text)
    return answers


@pytest.mark.parametrize("live", [False, True], ids=["hand-off", "live"])
def test_r12_answers_that_move_are_those_that_stay(
    node: MovesNode,
    prompts: dict[str, list[int]],
    undisturbed: dict[str, tuple[list[int], str]],
    numbers: Numbers,
    live: bool,
) -> None:
    """All cases at once, so that each shares its steps with others at both workers; the prompts get
    another salt from case to case, so nothing is found in a cache."""
    served: dict[str, int] = {}
    for turn, (name, sampling) in enumerate(CASES.items()):
        number = served[name] = numbers.next()
        source = turn % 2
        node.assign(
            number,
            source,
            prompts[name],
            sampling=sampling,
            max_tokens=MAX_TOKENS,
            salt=f"{live}",
        )
        if not live:
            node.move(number, target=1 - source)
    if live:
        for number in served.values():
            node.emitted(number, 8)
            if node.answers[number].reason is None:
                node.move(number, target=1 - node.answers[number].owner, live=True)
    node.finish(*served.values()).settle()
    arrived = {r.request_id for r in node.of(KvPulled) if isinstance(r, KvPulled)}
    for name, number in served.items():
        answer = node.answers[number]
        assert (answer.tokens, answer.text) == undisturbed[name], name
    assert arrived >= set(served.values()) - ({served["grammar"]} if live else set())


def test_stop_string_that_begins_at_one_worker_ends_at_the_other(
    node: MovesNode,
    prompts: dict[str, list[int]],
    undisturbed: dict[str, tuple[list[int], str]],
    numbers: Numbers,
) -> None:
    text = undisturbed["greedy"][1]
    stop = text[:12]  # begins with the first token, which the source emits
    number = numbers.next()
    sampling = msgspec.structs.replace(CASES["greedy"], stop=(stop,))
    node.assign(number, 0, prompts["greedy"], sampling=sampling, salt="stop")
    node.move(number, target=1)
    answer = node.finish(number).answers[number]
    assert (answer.text, answer.reason) == ("", FinishReason.STOP)
    assert answer.served_by == [0, 1]


def test_r12_answer_over_a_fetched_prefix_is_that_over_a_computed_one(
    node: MovesNode, prompts: dict[str, list[int]], numbers: Numbers
) -> None:
    prompt = prompts["logprobs"]
    first, second = numbers.next(), numbers.next()
    for number, worker, peer in ((first, 0, None), (second, 1, 0)):
        node.assign(number, worker, prompt, sampling=CASES["greedy"], salt="fetch", pull_from=peer)
        node.finish(number)
    (report,) = [r for r in node.of(PrefixPulled) if r.request_id == second]  # type: ignore[union-attr]
    assert isinstance(report, PrefixPulled)
    assert report.num_blocks == (len(prompt) - 1) // 16 > 2
    assert node.answers[second].tokens == node.answers[first].tokens
