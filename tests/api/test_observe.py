"""Histograms and the clocking of one answer."""

from appliance.api.observe import ApiStats, Histogram, Meter
from appliance.api.verdict import Verdict, worst
from appliance.core.stamps import Times
from appliance.core.types import Slo, WorkerId


def test_a_value_on_a_bound_belongs_below_it():
    histogram = Histogram((1, 2))
    for value in (0.5, 1, 1.5, 2, 7):
        histogram.observe(value)
    assert histogram.cumulative() == [("1", 2), ("2", 4), ("+Inf", 5)]
    assert histogram.sum == 12


def test_a_meter_takes_first_gap_mean_and_total():
    now = [10.0]
    latency = ApiStats().latency(Slo())
    meter = Meter(latency, 10.0, lambda: now[0])
    for moment, count in ((11.0, 1), (11.5, 1), (11.7, 0), (12.5, 2)):
        now[0] = moment
        meter.tokens(count)
    now[0] = 13.0
    meter.finished()
    assert latency.ttft.sum == 1.0
    assert latency.itl.sum == 0.5 + 1.0  # the last two tokens share the gap
    assert sum(latency.itl.counts) == 3
    assert latency.tpot.sum == 1.5 / 3
    assert latency.e2e.sum == 3.0


def test_one_token_has_no_mean_gap():
    latency = ApiStats().latency(Slo())
    meter = Meter(latency, 0.0, lambda: 1.0)
    meter.tokens(1)
    meter.finished()
    assert sum(latency.tpot.counts) == 0
    assert sum(latency.e2e.counts) == 1


def test_classes_are_counted_apart():
    stats = ApiStats()
    assert stats.latency(Slo(class_name="a")) is stats.latency(Slo(class_name="a"))
    assert stats.latency(Slo(class_name="a")) is not stats.latency(Slo(class_name="b"))


def judged(slo: Slo, *moments: float) -> Verdict:
    """The verdict on an answer whose tokens came at these moments; the request at 10 s."""
    return finished(slo, *moments, stats=ApiStats())[1]


def finished(slo: Slo, *moments: float, stats: ApiStats) -> tuple[Meter, Verdict]:
    """The same with its meter: it is not yet known whether its whole request completes."""
    now = [0.0]
    meter = Meter(stats.latency(slo), 10.0, lambda: now[0], slo=slo)
    for now[0] in moments:
        meter.tokens(1)
    now[0] += 1.0
    times = Times(queue=0.25, prefill=0.5, transfer=0.0, decode=9.0, workers=(WorkerId(3),))
    found = meter.finished(times)
    assert found is not None
    return meter, found


def test_a_verdict_counts_from_arrival_to_the_last_token_handed_over():
    slo = Slo(class_name="chat", ttft=1.0, tpot=0.5, e2e=3.0)
    assert judged(slo, 11.0, 11.5, 12.0).document() == {
        "class": "chat",
        "ttft_budget_ms": 1000.0,
        "tpot_budget_ms": 500.0,
        "e2e_budget_ms": 3000.0,
        "ttft_ms": 1000.0,
        "tpot_ms": 500.0,
        "met": True,
        "breakdown": {
            "queue_ms": 250.0,
            "prefill_ms": 500.0,
            "transfer_ms": 0.0,
            "decode_ms": 1250.0,
        },
        "workers": [3],
        "demoted": False,
    }


def test_any_target_that_is_missed_misses():
    assert not judged(Slo(ttft=0.9), 11.0, 11.5).met
    assert not judged(Slo(tpot=0.4), 11.0, 11.5).met
    assert not judged(Slo(e2e=1.4), 11.0, 11.5).met
    assert judged(Slo(), 99.0).met
    assert judged(Slo(tpot=0.1), 11.0).met, "one token has no gap"


def test_slack_is_told_at_the_first_token_and_before_the_last_deadline():
    found = judged(Slo(ttft=2.0, tpot=0.5), 11.0, 11.25, 11.5)
    assert (found.first_slack, found.end_slack(3)) == (1.0, 1.5)
    found = judged(Slo(tpot=0.5), 11.0, 12.5)
    assert (found.first_slack, found.end_slack(2)) == (None, -1.0)
    assert judged(Slo(), 11.0).end_slack(1) is None


def test_goodput_counts_what_met():
    stats, slo = ApiStats(), Slo(class_name="chat", ttft=1.0)
    latency = stats.latency(slo)
    good, _ = finished(slo, 11.0, 11.5, stats=stats)
    late, _ = finished(slo, 12.0, 12.5, stats=stats)
    assert (latency.met, latency.missed) == (0, 0), "their requests are not complete yet"
    good.judge()
    late.judge()
    assert (latency.met, latency.missed, latency.tokens_met) == (1, 1, 2)
    assert sum(latency.first_slack.counts) == 2
    vain, _ = finished(slo, 11.0, 11.5, stats=stats)
    vain.lose()
    assert (latency.met, latency.missed, latency.lost, latency.tokens_met) == (1, 1, 1, 2)


def test_several_answers_are_judged_by_the_one_that_did_worst():
    quick_miss, slow = judged(Slo(ttft=0.5), 11.0), judged(Slo(), 20.0)
    assert worst([slow, quick_miss]) is quick_miss
    assert worst([judged(Slo(), 11.0), slow]) is slow
    assert worst([]) is None
