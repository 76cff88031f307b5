"""Carrying out a fault that a plan asked for. Inert without one."""

import os
import signal
import time
from typing import Never

from appliance.core.faults import FaultPlan, FaultRule
from appliance.worker.engine import EngineError


class InjectedFault(Exception):
    """The exception that a plan asked for."""


class FaultPoints:
    """The named places of a worker at which a plan may strike."""

    def __init__(self, plan: FaultPlan) -> None:
        self._plan = plan
        self.wants_tokens = plan.wants_tokens()
        """Callers collect prompt tokens only if somebody looks at them."""
        self.active = plan.active

    def reach(self, point: str, tokens: frozenset[int] = frozenset()) -> None:
        """This process has come to `point`. May raise, may not return."""
        if self.active and (rule := self._plan.hit(point, tokens=tokens)) is not None:
            carry_out(rule)

    def refuses(self, point: str) -> bool:
        """As `reach`; True when the plan wants what is asked for here to be refused."""
        if not self.active or (rule := self._plan.hit(point)) is None:
            return False
        carry_out(rule)
        return rule.action == "refuse"


def carry_out(rule: FaultRule) -> None:
    """Do to this process what the rule says. Returns after "delay", after "stop" once somebody lets
    the process go on, and for "refuse"; otherwise raises or ends the process."""
    match rule.action:
        case "kill":
            _die_by(signal.SIGKILL)
        case "segv":
            _die_by(signal.SIGSEGV)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "exit":
            os._exit(1)
        case "raise":
            raise InjectedFault(f"injected at {rule.point}")
        case "oom":
            raise EngineError(
                f"device out of memory at {rule.point} (injected); "
                "lower [kv] memory or [batch] max_batch_tokens"
            )
        case "delay":
            time.sleep(rule.seconds)


def _die_by(number: signal.Signals) -> Never:
    os.kill(os.getpid(), number)
    while True:
        signal.pause()
