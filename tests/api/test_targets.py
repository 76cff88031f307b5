"""Latency targets from class, body and headers."""

import msgspec
import pytest

from appliance.api.errors import ApiError
from appliance.api.schemas import ChatBody
from appliance.api.targets import slo_of
from appliance.core.types import OnMiss, Slo

CLASSES = {
    "default": Slo(ttft=9.0),
    "chat": Slo(class_name="chat", ttft=1.0, tpot=0.05, weight=2.0),
}


def slo(headers=None, **fields) -> Slo:
    body = msgspec.convert({"messages": [], **fields}, ChatBody)
    return slo_of(body, headers or {}, classes=CLASSES, default="default")


def test_without_a_word_the_default_class_holds():
    assert slo() == CLASSES["default"]
    body = msgspec.convert({"messages": []}, ChatBody)
    assert slo_of(body, {}, classes={}, default="default") == Slo()


def test_the_class_of_the_key_comes_after_everything_the_request_says():
    def of(headers=None, **fields) -> Slo:
        body = msgspec.convert({"messages": [], **fields}, ChatBody)
        return slo_of(body, headers or {}, classes=CLASSES, default="chat")

    assert of() == CLASSES["chat"]
    assert of(slo="default") == of({"x-slo-class": "default"}) == CLASSES["default"]
    assert of(tpot_slo_ms=30) == Slo(class_name="custom", ttft=1.0, tpot=0.03, weight=2.0)


def test_a_class_is_named_in_body_or_header():
    assert slo(slo="chat") == CLASSES["chat"]
    assert slo(slo={"class": "chat"}) == CLASSES["chat"]
    assert slo({"x-slo-class": "chat"}) == CLASSES["chat"]
    assert slo({"x-slo-class": "nonsense"}, slo="chat") == CLASSES["chat"]


def test_own_targets_refine_the_class():
    refined = slo(slo={"class": "chat", "ttft_ms": 250, "e2e_ms": 3000})
    assert refined == Slo(class_name="chat", ttft=0.25, tpot=0.05, e2e=3.0, weight=2.0)


def test_own_targets_without_a_class_are_a_class_of_their_own():
    assert slo(tpot_slo_ms=30) == Slo(class_name="custom", ttft=9.0, tpot=0.03)


def test_body_wins_over_flat_fields_over_headers():
    headers = {"x-slo-ttft-ms": "1", "x-slo-tpot-ms": "2"}
    assert slo(headers).ttft == 0.001
    assert slo(headers).tpot == 0.002
    assert slo(headers, ttft_slo_ms=3).ttft == 0.003
    assert slo(headers, ttft_slo_ms=3, slo={"ttft_ms": 4}).ttft == 0.004
    assert slo(ttlt_slo_ms=5000).e2e == 5.0


NAMED = {"x-slo-class": "batch"}
NUMBERS = {"x-slo-ttft-ms": "1", "x-slo-tpot-ms": "2"}


@pytest.mark.parametrize(
    ("headers", "fields", "class_name", "ttft", "tpot"),
    [
        # a class that the body names speaks before flat fields and headers
        (NUMBERS, {"slo": "chat"}, "chat", 1.0, 0.05),
        (NUMBERS, {"slo": "chat", "ttft_slo_ms": 3}, "chat", 1.0, 0.05),
        (NUMBERS, {"slo": {"class": "chat", "ttft_ms": 4}}, "chat", 0.004, 0.05),
        # what that class leaves open, others may say; another class may not
        (NUMBERS, {"slo": "batch"}, "batch", 0.001, 0.002),
        ({"x-slo-class": "chat"}, {"slo": "batch"}, "batch", None, None),
        # numbers in headers come before the class of a header, and that before the key's class
        ({**NUMBERS, "x-slo-class": "chat"}, {}, "chat", 0.001, 0.002),
        ({**NAMED}, {}, "batch", None, None),
        ({**NAMED}, {"tpot_slo_ms": 30}, "batch", None, 0.03),
        # the key's class gives what nobody has said
        ({"x-slo-ttft-ms": "1"}, {}, "custom", 0.001, 0.02),
        ({}, {"slo": {"tpot_ms": 7}}, "custom", 0.5, 0.007),
        ({}, {}, "keyed", 0.5, 0.02),
    ],
)
def test_each_target_comes_from_the_first_that_says_something(
    headers, fields, class_name, ttft, tpot
):
    classes = {
        **CLASSES,
        "batch": Slo(class_name="batch"),
        "keyed": Slo(class_name="keyed", ttft=0.5, tpot=0.02),
    }
    body = msgspec.convert({"messages": [], **fields}, ChatBody)
    found = slo_of(body, headers, classes=classes, default="keyed")
    assert (found.class_name, found.ttft, found.tpot) == (class_name, ttft, tpot)


def test_own_targets_keep_what_the_class_says_of_a_budget_that_cannot_be_met():
    classes = {"picky": Slo(class_name="picky", ttft=1.0, on_miss=OnMiss.REFUSE)}
    body = msgspec.convert({"messages": [], "ttft_slo_ms": 5}, ChatBody)
    assert slo_of(body, {}, classes=classes, default="picky").on_miss is OnMiss.REFUSE


@pytest.mark.parametrize(
    ("headers", "fields", "param"),
    [
        ({}, {"slo": "gold"}, "slo"),
        ({}, {"slo": {"class": "gold"}}, "slo.class"),
        ({"x-slo-class": "gold"}, {}, "x-slo-class"),
        ({}, {"slo": {"ttft_ms": 0}}, "slo.ttft_ms"),
        ({}, {"slo": {"tpot_ms": -5}}, "slo.tpot_ms"),
        ({}, {"slo": {"e2e_ms": 1e12}}, "slo.e2e_ms"),
        ({}, {"ttft_slo_ms": 0}, "ttft_slo_ms"),
        ({"x-slo-ttft-ms": "soon"}, {}, "x-slo-ttft-ms"),
        ({"x-slo-tpot-ms": "nan"}, {}, "x-slo-tpot-ms"),
        ({"x-slo-tpot-ms": "inf"}, {}, "x-slo-tpot-ms"),
    ],
)
def test_a_target_that_makes_no_sense_names_field_or_header(headers, fields, param):
    with pytest.raises(ApiError) as caught:
        slo(headers, **fields)
    assert (caught.value.status, caught.value.body.param) == (400, param)
