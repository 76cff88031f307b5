"""What is special about each rival; the laws that all keep are in `test_contract`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pytest

from appliance.core.messages import Heartbeat, Preempted, Pull
from appliance.core.slots import Policy
from appliance.core.types import CacheGroupSpec, Phase, Request, RequestId, Role, Slo, WorkerId
from appliance.policy import make_policy
from tests.core.node_kit import Node, assigns, load, request
from tests.core.toy_worker import Task
from tests.core.whole_node import Setting
from tests.policy.dressed import serve

TIGHT, LOOSE = Slo(ttft=1.0), Slo(ttft=100.0)


def placed_order(name: str, requests: Sequence[Mapping[str, object]]) -> list[int]:
    """In which order one worker with one seat gets these, after it was kept busy by request 0."""
    node = Node(1, max_num_seqs=1, queue_ahead=0, policy=make_policy(name, {}).dispatch)
    node.arrive(0)
    for number, fields in enumerate(requests, start=1):
        node.arrive(number, **fields)
    placed = [0]
    while node.core.num_live:
        outputs = node.step(0, placed[-1:], finished=placed[-1:])
        placed += [number for number, _, _ in assigns(outputs)]
    return placed[1:]


# --- the order at the node ------------------------------------------------------------------------


def test_edf_places_by_the_deadline_of_the_first_token_and_those_without_one_last() -> None:
    slos: list[Slo] = [Slo(), LOOSE, TIGHT, Slo(e2e=50.0), Slo(ttft=2.0, e2e=1000.0)]
    assert placed_order("edf", [{"slo": slo} for slo in slos]) == [3, 5, 4, 2, 1]


def test_static_priority_places_by_priority_then_weight_then_arrival() -> None:
    heavy, light = Slo(weight=4.0), Slo(weight=0.5)
    requests: list[dict[str, object]] = [
        {"slo": light},
        {"slo": heavy},
        {"slo": heavy},
        {"slo": light, "priority": -1},
        {"slo": heavy, "priority": 1},
    ]
    assert placed_order("static-priority", requests) == [4, 2, 3, 1, 5]


def test_srf_places_the_shortest_job_first() -> None:
    assert placed_order("srf", [{"prompt": n} for n in (500, 20, 300, 20)]) == [2, 4, 3, 1]


def test_srf_learns_the_lengths_of_classes_or_believes_the_clients() -> None:
    for settings, expected in (({}, [2, 1]), ({"lengths": "max_tokens"}, [1, 2])):
        node = Node(1, policy=make_policy("srf", settings).dispatch)
        for _ in range(40):
            node.core.view.cost.lengths.observe("long", 400)
            node.core.view.cost.lengths.observe("short", 4)
        first = request(1, slo=Slo(class_name="long"), max_tokens=10)
        second = request(2, slo=Slo(class_name="short"), max_tokens=90)
        order = make_policy("srf", settings).dispatch.order
        queue = order([first, second], node.core.view, node.now)
        assert [each.id for each in queue] == expected


def step(node: Node, worker: int, ids: Sequence[int], *, free: int) -> None:
    """They got a token, and so many blocks are free."""
    node.step(worker, ids)
    told = load(free=free, running=len(ids))
    node.hear(Heartbeat(worker=WorkerId(worker), step=node.steps, load=told))


# --- the place ------------------------------------------------------------------------------------


def test_round_robin_takes_turns_whatever_is_there_already() -> None:
    node = Node(3, max_num_seqs=8, policy=make_policy("round-robin", {}).dispatch)
    for number in range(1, 7):
        node.arrive(number, prompt=900 if number % 3 == 1 else 1)
    assert [node.where[number] for number in range(1, 7)] == [0, 1, 2, 0, 1, 2]
    node.down(1)
    node.arrive(7)
    node.arrive(8)
    node.arrive(9)
    assert 1 not in {node.where[number] for number in (7, 8, 9)}


def test_round_robin_takes_turns_at_hand_offs_of_its_own() -> None:
    roles = (Role.PREFILL, Role.DECODE, Role.DECODE)
    policy = make_policy("round-robin", {}).dispatch
    node = Node(3, max_num_seqs=8, policy=policy, roles=roles)
    node.link_all()
    for number in range(1, 5):
        node.arrive(number)
    moved = [node.core.view.workers[WorkerId(worker)].incoming for worker in (1, 2)]
    assert moved == [2, 2]


def test_least_loaded_counts_requests_or_tokens() -> None:
    for measure, where in (("requests", 1), ("tokens", 0)):
        policy = make_policy("least-loaded", {"measure": measure}).dispatch
        node = Node(2, max_num_seqs=8, policy=policy)
        node.arrive(1, prompt=10)
        node.arrive(2, prompt=900)
        node.arrive(3, prompt=10)
        node.step(1, [2], finished=[2])
        node.arrive(4, prompt=500)
        node.arrive(5, prompt=1)
        assert node.where[5] == where, measure


def test_llumnix_goes_where_each_answer_has_the_most_room() -> None:
    node = Node(2, max_num_seqs=8, policy=make_policy("llumnix", {}).dispatch)
    node.arrive(1, prompt=30)
    node.arrive(2, prompt=600)
    assert (node.where[1], node.where[2]) == (0, 1)
    step(node, 0, [1], free=60)
    step(node, 1, [2], free=25)
    node.arrive(3, prompt=10)
    assert node.where[3] == 0, "60 blocks against 25"
    step(node, 0, [1, 3], free=20)
    node.arrive(4, prompt=10)
    assert node.where[4] == 1, "20 blocks for two against 25 for one"


def rebalanced(settings: dict[str, object]) -> list[tuple[int, int]]:
    """Two workers, the first of them nearly out of memory; which answers move where."""
    policy = make_policy("llumnix", {"interval": 0.0, **settings}).dispatch
    node = Node(2, max_num_seqs=8, policy=policy)
    node.link_all()
    for number, prompt in ((1, 300), (2, 10), (3, 100)):
        node.arrive(number, prompt=prompt)
    here = node.at(0)
    before = len(node.said)
    step(node, 0, here, free=3)
    pulls = [each for each in node.said[before:] if isinstance(each, Pull)]
    return [(each.request.id, each.worker) for each in pulls]


def test_llumnix_moves_the_lightest_answer_off_a_worker_that_is_nearly_full() -> None:
    assert rebalanced({}) == [(1, 1)]
    assert rebalanced({"migrate": False}) == []
    assert rebalanced({"gap": 1e6}) == []
    assert rebalanced({"out_below": 1.0}) == []


def chained(number: int, blocks: int) -> tuple[int, ...]:
    return tuple(range(number * 1000, number * 1000 + blocks))


def test_sticky_prefix_goes_where_the_prompt_has_been_unless_that_worker_is_overloaded() -> None:
    settings = {"gap": 2, "ratio": 1.5}
    node = Node(3, max_num_seqs=9, policy=make_policy("sticky-prefix", settings).dispatch)
    hashes = chained(1, 4)
    node.arrive(1, prompt=65, prefix_hashes=hashes)
    node.arrive(2, prompt=65, prefix_hashes=chained(2, 4))
    for number in (3, 4):
        node.arrive(number, prompt=81, prefix_hashes=(*hashes, number))
        assert node.where[number] == node.where[1], "the prefix was sent there"
    node.arrive(5, prompt=330, prefix_hashes=(*hashes, *chained(5, 16)))
    assert node.where[5] == 2, "four of twenty blocks do not decide"
    node.arrive(6, prompt=65, prefix_hashes=hashes)
    node.arrive(7, prompt=65, prefix_hashes=hashes)
    assert (node.where[6], node.where[7]) != (0, 0), "too many there"


def test_sticky_prefix_forgets_the_oldest_blocks() -> None:
    policy = make_policy("sticky-prefix", {"remembered_blocks": 4})
    node = Node(2, max_num_seqs=9, policy=policy.dispatch)
    node.arrive(1, prompt=65, prefix_hashes=chained(1, 4))
    node.arrive(2, prompt=65, prefix_hashes=chained(2, 4))
    node.arrive(3, prompt=65, prefix_hashes=chained(2, 4))
    assert node.where[3] == node.where[2]
    node.arrive(4, prompt=65, prefix_hashes=chained(1, 4))
    assert node.where[4] == 0, "the fewest requests decide"


# --- the step -------------------------------------------------------------------------------------


@dataclass
class Seq:
    """One sequence as a policy sees it."""

    request: Request
    phase: Phase = Phase.PREFILL
    num_known: int = 0
    num_computed: int = 0
    num_emitted: int = 0
    first_token_at: float | None = None

    @property
    def id(self) -> RequestId:
        return self.request.id

    @property
    def slo(self) -> Slo:
        return self.request.slo


@dataclass
class Local:
    """One Batcher as a policy sees it."""

    waiting: list[Seq] = field(default_factory=list)
    running: list[Seq] = field(default_factory=list)
    free_blocks: int = 100
    total_blocks: int = 100
    block_tokens: int = 16
    max_num_seqs: int = 8
    max_batch_tokens: int = 64
    stale: frozenset[RequestId] = frozenset()


def prompt(number: int, tokens: int, *, done: int = 0, **more: object) -> Seq:
    new = request(number, arrived=float(number), prompt=tokens, **more)
    return Seq(new, num_known=tokens, num_computed=done)


def decode(number: int) -> Seq:
    new = request(number, arrived=float(number))
    return Seq(new, Phase.DECODE, num_known=12, num_computed=11, num_emitted=2)


def granted(policy: Policy, view: Local) -> list[tuple[int, int]]:
    grants = policy.batch.fill(view, view.max_batch_tokens, 50.0)  # type: ignore[arg-type]
    assert sum(grant.num_tokens for grant in grants) <= view.max_batch_tokens
    assert len({grant.id for grant in grants}) == len(grants)
    return [(grant.id, grant.num_tokens) for grant in grants]


def test_all_mixed_gives_prompts_a_chunk_of_every_step_and_no_more() -> None:
    view = Local(running=[decode(1), prompt(2, 100), decode(3)], waiting=[prompt(4, 50)])
    assert granted(make_policy("all-mixed", {"chunk": 30}), view) == [(1, 1), (3, 1), (2, 30)]
    assert granted(make_policy("all-mixed", {}), view) == [(1, 1), (3, 1), (2, 62)]
    view.running[1].num_computed = 90
    assert granted(make_policy("all-mixed", {"chunk": 30}), view)[2:] == [(2, 10), (4, 20)]


def test_edf_gives_prompts_no_more_than_its_chunk_if_it_has_one() -> None:
    view = Local(running=[decode(1), prompt(2, 100), decode(3)], waiting=[prompt(4, 50)])
    assert sum(n for _, n in granted(make_policy("edf", {"chunk": 30}), view)) == 2 + 30
    assert sum(n for _, n in granted(make_policy("edf", {}), view)) == 64


@pytest.mark.parametrize("name", ["edf", "static-priority", "srf"])
def test_an_urgent_prompt_overtakes_those_that_run_but_for_a_share_of_the_oldest(name: str) -> None:
    urgent = prompt(5, 40, slo=Slo(ttft=1.0, weight=9.0))
    running = [decode(1), prompt(2, 100, slo=LOOSE), prompt(3, 90, slo=LOOSE)]
    view = Local(running=running, waiting=[prompt(4, 95, slo=LOOSE), urgent])
    assert granted(make_policy(name, {}), view)[:3] == [(1, 1), (2, 4), (5, 40)]


@pytest.mark.parametrize("name", ["edf", "static-priority", "srf"])
def test_it_overtakes_nobody_where_it_may_not_fit(name: str) -> None:
    """Else a step could be given away to one that memory keeps out, again and again."""
    urgent = prompt(5, 40, slo=Slo(ttft=1.0, weight=9.0))
    running = [prompt(2, 100, slo=LOOSE)]
    view = Local(running=running, waiting=[urgent], free_blocks=10)
    assert granted(make_policy(name, {}), view) == [(2, 64)]
    view.running[0].num_computed = 90
    share = 10 if name == "srf" else 4
    assert granted(make_policy(name, {}), view)[:2] == [(2, share), (5, 40)]


def test_the_least_urgent_is_preempted_and_of_equal_ones_the_latest() -> None:
    view = Local()
    some = [
        prompt(n, 10 * n, slo=slo) for n, slo in ((1, LOOSE), (2, TIGHT), (3, Slo()), (4, Slo()))
    ]

    def victim(name: str) -> int:
        return make_policy(name, {}).batch.victim(view, some, 50.0)  # type: ignore[arg-type]

    assert victim("edf") == 4
    assert victim("srf") == 4
    assert victim("static-priority") == 4
    some[3] = replace(some[3], request=request(4, prompt=1, slo=Slo(ttft=0.1, weight=2.0)))
    some[3].num_known = 1
    assert victim("edf") == 3
    assert victim("srf") == 3
    assert victim("static-priority") == 3


def test_peak_kv_begins_only_what_fits_to_the_end_and_never_preempts() -> None:
    policy = make_policy("fcfs-peak-kv", {})
    running = [prompt(1, 160, max_tokens=160)]
    view = Local(running=running, waiting=[prompt(n, 16, max_tokens=784) for n in (2, 3)])
    assert granted(policy, view) == [(1, 64)]
    running[0].num_computed = 150
    assert granted(policy, view) == [(1, 10), (2, 16)]
    view.running = []
    view.waiting[0] = prompt(2, 16, max_tokens=100_000)
    assert granted(policy, view) == [(2, 16)], "alone it may have all"
    group = CacheGroupSpec(num_blocks=16, block_tokens=4)
    work = [Task(id=n, prompt=tuple(range(n, n + 6)), max_tokens=20, seed=n) for n in range(1, 20)]
    told = []
    for name in ("fcfs", "fcfs-peak-kv"):
        setting = Setting(policy=make_policy(name, {}), groups=(group,), num_workers=1)
        node = serve(setting, work)
        told.append([each.input for each in node.journal.records()])
    assert any(isinstance(each, Preempted) for each in told[0])
    assert not any(isinstance(each, Preempted) for each in told[1])
