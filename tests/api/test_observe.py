"""Histograms and the clocking of one answer."""

from appliance.api.observe import ApiStats, Histogram, Meter
from appliance.core.types import Slo


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
