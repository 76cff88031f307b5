"""The laws of the node, one function each, checked after a message of the Dispatcher.

Used by tests at every step and by `--validate`. Numbers are those of `docs/invariants.md`; 0 is
the agreement of the Dispatcher's own books. Laws of one worker are in `appliance.core.invariants`;
law 6 (same inputs, same outputs) and law 12 (replay) are proved by
`appliance.core.journal.replay`."""

from collections.abc import Callable, Sequence

from appliance.core.admission import too_large
from appliance.core.invariants import LawBroken
from appliance.core.lifecycle import RequestState, WorkerState
from appliance.core.messages import Arrived, Assign, Ended, Input, Output, Pull, Reject, SetRole
from appliance.core.node_state import NodeState
from appliance.core.request_table import RequestRecord
from appliance.core.types import Record, RequestId, WorkerId
from appliance.core.worker_table import SERVING

AT_WORK = frozenset({WorkerState.READY, WorkerState.DRAINING, WorkerState.FLIPPING})
"""States in which a worker may have requests."""


class Heard(Record, frozen=True, kw_only=True):
    """One call of the Dispatcher, as the laws look at it. `promised`: the policy named a
    wake-up."""

    state: NodeState
    now: float
    outputs: Sequence[Output]
    promised: bool


Law = Callable[[Heard], None]


def law_0_books_agree(heard: Heard) -> None:
    """A request is in exactly one place, and every sum is the sum of its parts."""
    table = heard.state.requests
    queued = [request.id for request in table.queue.requests()]
    at_workers = [id_ for slot in heard.state.slots.values() for id_ in slot.assigned]
    places = [*queued, *table.suspects, *at_workers]
    live = [record.request.id for record in table.records()]
    _want(0, sorted(places) == sorted(live), f"live {live}, but found {places}")
    prompts = sum(request.prompt_tokens for request in table.queue.requests())
    _want(0, table.queue.tokens == prompts, "waiting tokens are not those of the queue")
    for slot in heard.state.slots.values():
        pending = sum(record.pending for record in slot.assigned.values())
        _want(0, slot.pending_tokens == pending, f"worker {slot.id}: pending tokens differ")
        promised = sum(record.move.blocks for record in slot.incoming.values() if record.move)
        _want(0, slot.promised_blocks == promised, f"worker {slot.id}: promised blocks differ")
        here, coming = list(slot.assigned.values()), list(slot.incoming.values())
        _want(0, slot.tally.agrees(here, coming), f"worker {slot.id}: its tally differs")
        stray = [id_ for id_, record in slot.assigned.items() if record.worker != slot.id]
        _want(0, not stray, f"worker {slot.id} lists requests {stray} that are elsewhere")


def law_0_moves_agree(heard: Heard) -> None:
    """A request that moves is in the books of both its workers, as what it is there, and in no
    others; a worker that should forget a request is not given it."""
    slots, records = heard.state.slots, heard.state.requests.records()
    incoming, leaving, leased = set(), set(), set()
    for record in records:
        id_, move = record.request.id, record.move
        leaving |= {(worker, id_) for worker in record.leaving}
        _want(0, record.worker not in record.leaving, f"given back too early; {record.story()}")
        if move is None:
            continue
        owner, other = move.source, move.target
        if move.stopped:
            owner, other = other, owner
            leased |= {(other, id_)} if move.leased else set()
        else:
            incoming.add((other, id_))
        _want(0, record.worker == owner, f"it is not its mover's; {record.story()}")
        _want(0, not record.suspected, f"a suspect moves; {record.story()}")
    had = heard.state.has_roles
    heard.state.note_roles()
    _want(0, had == heard.state.has_roles, f"some worker has a role: {had} is not so")
    told = {(slot.id, id_) for slot in slots.values() for id_ in slot.incoming}
    _want(0, told == incoming, f"incoming: {told ^ incoming}")
    told = {(slot.id, id_) for slot in slots.values() for id_ in slot.leaving}
    _want(0, told == leaving, f"leaving: {told ^ leaving}")
    told = {(slot.id, id_) for slot in slots.values() for id_ in slot.leased}
    _want(0, told >= leased, f"leased: {leased - told}")
    for slot in slots.values():
        busy = slot.incoming or slot.leased or slot.leaving
        _want(0, slot.state in SERVING or not busy, f"worker {slot.id} is {slot.state}, not empty")
        _want(0, not (slot.reserved and slot.incoming), f"worker {slot.id} pulls, reserved")


def law_2_states_fit(heard: Heard) -> None:
    """Who waits is at no worker, who does not wait is at a live one. (Every move was looked up.)"""
    for record in heard.state.requests.records():
        waits, state = record.state is RequestState.WAITING, record.state
        _want(2, waits == (record.worker is None), record.story())
        if record.worker is not None:
            worker = heard.state.slots[record.worker].state
            _want(2, worker in AT_WORK, f"its worker is {worker}; {record.story()}")
        move = record.move
        _want(2, move is None or not waits, f"it waits and moves; {record.story()}")
        stopped = move is not None and move.stopped
        _want(2, stopped == (state is RequestState.HANDING_OFF), record.story())
        if state is RequestState.MIGRATING:
            _want(2, move is not None, record.story())


def law_5_times_in_order(heard: Heard) -> None:
    """Arrived <= assigned <= first token <= finished."""
    for record in heard.state.requests.records():
        times = [at for at, _, _ in record.history]
        _want(5, times == sorted(times) and times[-1] <= heard.now, record.story())
        if record.first_token_at is not None:
            assigned = [at for at, s, _ in record.history if s is RequestState.ASSIGNED]
            _want(5, assigned[0] <= record.first_token_at <= heard.now, record.story())


def law_7_views_have_age(heard: Heard) -> None:
    """No view claims to be from the future."""
    for view in heard.state.view.workers.values():
        _want(7, view.as_of <= heard.now, f"worker {view.id} as of {view.as_of} at {heard.now}")


def law_8_work_conserving(heard: Heard) -> None:
    """No waiting request has a willing worker, unless the policy named a time to ask again, and
    each has one that may become willing. A suspect waits only while a worker is reserved for it or
    none can take it."""
    for request in heard.state.requests.queue.requests():
        record = heard.state.requests.get(request.id)
        willing = [] if record is None else heard.state.willing(record, heard.now)
        idle = bool(willing) and not heard.promised
        _want(8, not idle, f"request {request.id} waits, willing: {[s.id for s in willing]}")
        hopeless = heard.state.is_abandoned or too_large(heard.state, request)
        _want(8, not hopeless, f"request {request.id} waits for what never comes")
    reserved = any(slot.reserved for slot in heard.state.slots.values())
    for suspect in heard.state.requests.suspects.values():
        able = [slot.id for slot in heard.state.able(suspect, heard.now)]
        _want(8, reserved or not able, f"suspect {suspect.request.id} waits, able: {able}")


def law_8_phases_are_served(heard: Heard) -> None:
    """What is at a worker for prompts moves on as soon as one for decoding has room, unless the
    policy said no: asked in `promised` as for placement."""
    for slot in heard.state.slots.values():
        if slot.state not in AT_WORK or slot.prefers_decode or heard.promised:
            continue
        for record in slot.assigned.values():
            targets = heard.state.moves.targets(record, heard.now)
            words = f"request {record.request.id} stays at {slot.id}, willing"
            _want(8, not targets, f"{words}: {[target.id for target in targets]}")


def law_10_no_assign_while_draining(heard: Heard) -> None:
    """Work goes to ready workers only, be it by `Assign` or by `Pull`, and to a reserved one only
    the suspect that it waits for. A worker may be told its new role after the last `Pull`."""
    told: set[WorkerId] = set()
    for output in heard.outputs:
        if isinstance(output, SetRole):
            told.add(output.worker)
        if isinstance(output, Pull):
            slot = heard.state.slots[output.worker]
            words = f"request {output.request.id} moves to worker {slot.id}"
            flips = slot.state is WorkerState.FLIPPING and slot.id not in told
            ready = slot.state is WorkerState.READY or flips
            _want(10, ready, f"{words}, which is {slot.state}")
        if isinstance(output, Assign):
            slot = heard.state.slots[output.worker]
            words = f"request {output.request.id} went to worker {slot.id}"
            _want(10, slot.state is WorkerState.READY, f"{words}, which is {slot.state}")
            record = heard.state.requests.get(output.request.id)
            isolated = record is not None and record.isolated
            _want(10, isolated == slot.reserved, f"{words}, reserved: {slot.reserved}")


def r27_suspects_run_alone(heard: Heard) -> None:
    """A suspect is on trial wherever it is; it shares a worker with acquitted requests only, in a
    strict trial with none. One present at too many deaths is suspected until it was acquitted."""
    config = heard.state.config
    for record in heard.state.requests.records():
        guilty = len(record.deaths) >= config.poison_deaths and not record.acquitted
        _want(0, record.suspected == guilty, f"suspected: {record.suspected}; {record.story()}")
        _want(0, record.trials < config.max_trials, f"trials: {record.trials}; {record.story()}")
        if record.worker is None or record.state is RequestState.CANCELLING:
            continue
        _want(0, record.isolated == record.suspected, f"not on trial; {record.story()}")
        if record.isolated:
            here = heard.state.slots[record.worker].assigned.values()
            mates = [mate for mate in here if mate is not record and not _only_leaves(mate)]
            fit = all(mate.acquitted for mate in mates) and not (record.strict and mates)
            _want(0, fit, f"suspect with {len(mates)}; {record.story()}")


def _only_leaves(record: RequestRecord) -> bool:
    """Whether it is listed where it is because that worker, which does not compute it, has yet to
    say that it forgot a cancelled request."""
    cancelling = record.state is RequestState.CANCELLING
    return cancelling and record.history[-1][2] != record.worker


NODE_LAWS: Sequence[Law] = (
    law_0_books_agree,
    law_0_moves_agree,
    law_2_states_fit,
    law_5_times_in_order,
    law_7_views_have_age,
    law_8_work_conserving,
    law_8_phases_are_served,
    law_10_no_assign_while_draining,
    r27_suspects_run_alone,
)


class NodeAuditor:
    """Checks `NODE_LAWS` after each message, and what needs a memory: law 1 and law 3."""

    def __init__(self, state: NodeState) -> None:
        self._state = state
        self._live: set[RequestId] = set()
        self._now = float("-inf")

    def check(
        self, message: Input, now: float, *, outputs: Sequence[Output], promised: bool
    ) -> None:
        """Raise `LawBroken` for the first law that does not hold."""
        _want(3, now >= self._now, f"time went back from {self._now} to {now}")
        self._now = now
        self._ends_once(message, outputs)
        heard = Heard(state=self._state, now=now, outputs=outputs, promised=promised)
        for law in NODE_LAWS:
            law(heard)

    def _ends_once(self, message: Input, outputs: Sequence[Output]) -> None:
        """Law 1: every accepted request ends exactly once, a rejected one never."""
        rejected = {output.request_id for output in outputs if isinstance(output, Reject)}
        if isinstance(message, Arrived) and message.request.id not in rejected:
            self._live.add(message.request.id)
        for output in outputs:
            if isinstance(output, Ended):
                known = output.request_id in self._live
                _want(1, known, f"request {output.request_id} ended but was not alive")
                self._live.remove(output.request_id)
        table = {record.request.id for record in self._state.requests.records()}
        _want(1, table == self._live, f"lost or kept: {sorted(table ^ self._live)}")


def _want(law: int, holds: bool, words: str) -> None:
    if not holds:
        raise LawBroken(law, words)
