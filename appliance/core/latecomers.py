"""Requests whose targets cannot be met any more, as the policy says.

A request is demoted at most once and is served all the same; it is refused only while nothing of it
was sent. Both are put on record with the reason."""

from appliance.core.admission import retry_after
from appliance.core.audit import Audit
from appliance.core.lifecycle import RequestState
from appliance.core.messages import Degrade
from appliance.core.node_state import NodeState
from appliance.core.request_table import RequestRecord
from appliance.core.slots import DispatchSlots, Late, PolicyMistake
from appliance.core.types import ErrorKind


class Latecomers:
    """Asks the slot `late` and carries out what it says."""

    def __init__(self, state: NodeState, *, policy: DispatchSlots, audit: Audit) -> None:
        self._state = state
        self._late = policy.late
        self._audit = audit

    def step(self, now: float) -> None:
        """Demote and refuse whom the policy names. Raises `PolicyMistake` for a request that is not
        alive, was demoted before, or is to be refused though it is at a worker or has emitted."""
        if self._late is None:
            return
        for late in self._late(self._state.view, now):
            record = self._state.requests.get(late.id)
            if record is None:
                raise PolicyMistake(f"late: there is no request {late.id}")
            if late.action == "demote":
                self._demote(record, late, now)
            else:
                self._refuse(record, late, now)

    def _demote(self, record: RequestRecord, late: Late, now: float) -> None:
        if record.demoted:
            raise PolicyMistake(f"late: request {late.id} was demoted before")
        self._state.demote(record)
        self._state.out.append(Degrade(request_id=late.id, reason=late.reason))
        self._on_record("demote", record, late, now, outcome="served as best effort")

    def _refuse(self, record: RequestRecord, late: Late, now: float) -> None:
        if record.state is not RequestState.WAITING or record.emitted:
            raise PolicyMistake(f"late: request {late.id} is under way and cannot be refused")
        self._on_record("refuse", record, late, now, outcome="refused")
        self._state.totals.refused += 1
        self._state.fail(
            record,
            now,
            kind=ErrorKind.BUDGET,
            message=late.reason,
            retry_after=retry_after(self._state),
        )

    def _on_record(
        self, kind: str, record: RequestRecord, late: Late, now: float, *, outcome: str
    ) -> None:
        where = () if record.worker is None else (record.worker,)
        words = f"request {late.id} ({record.request.slo.class_name}): {late.reason}"
        self._audit.decide(kind, now, by="policy", workers=where, trigger=words, outcome=outcome)
