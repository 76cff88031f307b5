"""Metric families of this server, in the words of `prometheus_client`."""

from collections.abc import Iterable

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from appliance.api.observe import Histogram

PREFIX = "appliance_"
Series = Iterable[tuple[list[str], float]]


def gauge(name: str, words: str, labels: list[str], series: Series) -> Metric:
    """Values that go up and down."""
    family = GaugeMetricFamily(PREFIX + name, words, labels=labels)
    for values, value in series:
        family.add_metric(values, value)
    return family


def counter(name: str, words: str, labels: list[str], series: Series) -> Metric:
    """Values that only grow."""
    family = CounterMetricFamily(PREFIX + name, words, labels=labels)
    for values, value in series:
        family.add_metric(values, value)
    return family


def histogram(
    name: str, words: str, labels: list[str], series: Iterable[tuple[list[str], Histogram]]
) -> Metric:
    """Distributions."""
    family = HistogramMetricFamily(PREFIX + name, words, labels=labels)
    for values, histogram in series:
        family.add_metric(values, buckets=histogram.cumulative(), sum_value=histogram.sum)
    return family
