"""A node whose policy is HyperFlexis and that knows how long steps last."""

from collections.abc import Sequence

from msgspec.structs import replace

from appliance.core.cost import CostModel
from appliance.core.dispatcher import Dispatcher
from appliance.core.messages import Output, SeqFinished, StepReported
from appliance.core.step_model import StepCoefficients
from appliance.core.types import FinishReason, RequestId, Role, Slo, WorkerId
from appliance.policy import make_policy
from tests.core.node_kit import Node, assigns, load

ROW = (0.004, 1e-4, 0.0, 1e-4, 0.0)
STEPS = StepCoefficients(planes=(ROW, ROW))
"""10,000 prompt tokens per second, and 0.1 ms for each that decodes."""


class Known(Node):
    """A node that knows how long steps last."""

    def __init__(
        self,
        num_workers: int = 1,
        *,
        max_num_seqs: int = 64,
        roles: Sequence[Role] = (),
        **settings: object,
    ) -> None:
        policy = make_policy("hyperflexis", settings).dispatch
        super().__init__(
            num_workers,
            max_num_seqs=max_num_seqs,
            num_blocks=4096,
            policy=policy,
            boot=False,
            roles=roles,
            max_model_len=9000,
        )
        self.core = Dispatcher(
            self.config,
            workers=self.specs,
            policy=policy,
            cost=CostModel(steps=STEPS),
            validate=True,
        )
        self.hear_later(0.0)
        for spec in self.specs:
            self.up(spec.id)

    def exact_step(
        self,
        worker: int,
        ids: Sequence[int],
        *,
        finished: Sequence[int] = (),
        prefill: int = 0,
        backlog: int = 0,
    ) -> list[Output]:
        """A step in which these get a token, as long as predicted; `backlog` prompt tokens are
        left then."""
        self.steps += 1
        seconds = 0.004 + 1e-4 * (len(ids) - len(finished) + prefill)
        wanted = load(free=4096, total=4096, running=len(ids))
        report = StepReported(
            worker=WorkerId(worker),
            step=self.steps,
            elapsed=seconds,
            prefill_tokens=prefill,
            decode_tokens=len(ids) - len(finished),
            ids=tuple(RequestId(number) for number in ids),
            load=replace(wanted, backlog_tokens=backlog),
            finished=tuple(
                SeqFinished(
                    id=RequestId(number),
                    reason=FinishReason.STOP,
                    emitted_tokens=1,
                    cached_tokens=0,
                )
                for number in finished
            ),
        )
        return self.hear(report, after=seconds)


def placed(outputs: Sequence[Output]) -> list[int]:
    return [number for number, _, _ in assigns(outputs)]


def urgent(ttft: float, **more: object) -> Slo:
    return Slo(ttft=ttft, **more)  # type: ignore[arg-type]
