"""What /metrics says of budgets: attainment, slack and goodput by class, refusals and demotions.

An answer that was asked for ends in one of four ways: it met its budget, missed it, was refused, or
failed. What the client did itself (it left, it did not read, it asked for more than there is room
for) counts in none of them. Answers of a class that sets no target meet by being complete.
"""

from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from appliance.api.families import counter, gauge, histogram
from appliance.api.observe import ApiStats
from appliance.api.verdict import OF_CLIENTS
from appliance.core.step_model import StepModel
from appliance.live.stats import NodeStats

OUTCOMES = ("met", "missed", "refused", "failed")


class BudgetMetrics(Collector):
    """Of one application."""

    def __init__(self, stats: ApiStats, node: NodeStats, steps: StepModel) -> None:
        """`steps` predicts what budgets are planned by."""
        self._stats = stats
        self._node = node
        self._steps = steps

    def outcomes(self) -> dict[str, dict[str, int]]:
        """Answers by class and outcome, from the start on."""
        refused, failed = _by_class(self._node.refused), _by_class(self._node.failed)
        found = {}
        for name in sorted({*self._stats.classes, *refused, *failed}):
            latency = self._stats.classes.get(name)
            met, missed, lost = 0, 0, 0
            if latency is not None:
                met, missed, lost = latency.met, latency.missed, latency.lost
            row = (met, missed, refused[name], failed[name] + lost)
            found[name] = dict(zip(OUTCOMES, row, strict=True))
        return found

    def collect(self) -> Iterator[Metric]:
        """All families."""
        outcomes = self.outcomes()
        yield counter(
            "slo_answers",
            "Answers that were asked for, by how they did against their budget.",
            ["slo_class", "outcome"],
            [([name, how], n) for name, row in outcomes.items() for how, n in row.items()],
        )
        yield gauge(
            "slo_attainment_ratio",
            "Share of them that met it, since the start.",
            ["slo_class"],
            [
                ([name], row["met"] / sum(row.values()))
                for name, row in outcomes.items()
                if any(row.values())
            ],
        )
        classes = sorted(self._stats.classes.items())
        yield histogram(
            "slo_slack_seconds",
            "Time left of the budget at the first token, and before the last one's deadline.",
            ["slo_class", "at"],
            [
                ([name, at], slack)
                for name, each in classes
                for at, slack in (("first_token", each.first_slack), ("end", each.end_slack))
            ],
        )
        yield counter(
            "goodput_answers",
            "Complete answers that met their budget.",
            ["slo_class"],
            [([name], each.met) for name, each in classes],
        )
        yield counter(
            "goodput_tokens",
            "Tokens of complete answers that met their budget.",
            ["slo_class"],
            [([name], each.tokens_met) for name, each in classes],
        )
        yield counter(
            "slo_refusals",
            "Answers that were asked for and not begun, by reason.",
            ["slo_class", "reason"],
            [(list(key), n) for key, n in sorted(self._node.refused.items())],
        )
        yield counter(
            "slo_demotions",
            "Answers served after others since their budget could not be met, by reason.",
            ["slo_class", "reason"],
            [(list(key), n) for key, n in sorted(self._node.demoted.items())],
        )
        error = self._steps.error
        yield gauge(
            "step_prediction_error",
            "Relative error of recent predictions of step times, each made before its step.",
            ["of"],
            [(["mean"], error.mean_relative), (["p90"], error.p90_relative)],
        )


def _by_class(counts: Counter[tuple[str, str]]) -> Counter[str]:
    """Sums over the kinds that are not the client's doing."""
    sums: Counter[str] = Counter()
    for (name, kind), count in counts.items():
        if kind not in OF_CLIENTS:
            sums[name] += count
    return sums
