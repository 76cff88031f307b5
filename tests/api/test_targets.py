"""Latency targets from class, body and headers."""

import msgspec
import pytest
from multidict import CIMultiDict

from appliance.api.errors import ApiError
from appliance.api.schemas import ChatBody
from appliance.api.targets import slo_of
from appliance.core.types import OnMiss, Slo

CLASSES = {
    "default": Slo(ttft=9.0),
    "chat": Slo(class_name="chat", ttft=1.0, tpot=0.05, weight=2.0),
}


def read(headers=None, *, classes=CLASSES, default="default", **fields) -> Slo:
    body = msgspec.convert({"messages": [], **fields}, ChatBody)
    return slo_of(body, CIMultiDict(headers or {}), classes=classes, default=default)


def test_without_a_word_the_default_class_holds():
    assert read() == CLASSES["default"]
    assert read(classes={}) == Slo()


def test_the_class_of_the_key_comes_after_everything_the_request_says():
    def of(headers=None, **fields) -> Slo:
        return read(headers, default="chat", **fields)

    assert of() == CLASSES["chat"]
    assert of(slo="default") == of({"x-slo-class": "default"}) == CLASSES["default"]
    assert of(tpot_slo_ms=30) == Slo(class_name="custom", ttft=1.0, tpot=0.03, weight=2.0)


def test_a_class_is_named_in_body_or_header():
    assert read(slo="chat") == CLASSES["chat"]
    assert read(slo={"class": "chat"}) == CLASSES["chat"]
    assert read({"x-slo-class": "chat"}) == CLASSES["chat"]
    assert read({"x-slo-class": "nonsense"}, slo="chat") == CLASSES["chat"]


def test_own_targets_refine_the_class():
    refined = read(slo={"class": "chat", "ttft_ms": 250, "e2e_ms": 3000})
    assert refined == Slo(class_name="chat", ttft=0.25, tpot=0.05, e2e=3.0, weight=2.0)


def test_own_targets_without_a_class_are_a_class_of_their_own():
    assert read(tpot_slo_ms=30) == Slo(class_name="custom", ttft=9.0, tpot=0.03)


def test_body_wins_over_flat_fields_over_headers():
    headers = {"x-slo-ttft-ms": "1", "x-slo-tpot-ms": "2"}
    assert read(headers).ttft == 0.001
    assert read(headers).tpot == 0.002
    assert read(headers, ttft_slo_ms=3).ttft == 0.003
    assert read(headers, ttft_slo_ms=3, slo={"ttft_ms": 4}).ttft == 0.004
    assert read(ttlt_slo_ms=5000).e2e == 5.0


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
    found = read(headers, classes=classes, default="keyed", **fields)
    assert (found.class_name, found.ttft, found.tpot) == (class_name, ttft, tpot)


def test_own_targets_keep_what_the_class_says_of_a_budget_that_cannot_be_met():
    classes = {"picky": Slo(class_name="picky", ttft=1.0, on_miss=OnMiss.REFUSE)}
    assert read(classes=classes, default="picky", ttft_slo_ms=5).on_miss is OnMiss.REFUSE


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
        ({"x-slo-tpot-ms": "1_000"}, {}, "x-slo-tpot-ms"),
    ],
)
def test_a_target_that_makes_no_sense_names_field_or_header(headers, fields, param):
    with pytest.raises(ApiError) as caught:
        read(headers, **fields)
    assert (caught.value.status, caught.value.body.param) == (400, param)


@pytest.mark.parametrize("name", ["x-slo-ttft-ms", "x-slo-tpot-ms", "x-slo-class"])
def test_a_header_that_is_given_twice_is_refused_by_name(name):
    value = "chat" if name == "x-slo-class" else "5"
    with pytest.raises(ApiError, match=f"'{name}' is given 2 times") as caught:
        read([(name, value), (name.upper(), value)], slo="chat")
    assert (caught.value.status, caught.value.body.param) == (400, name)


def test_a_target_that_makes_no_sense_is_shown_as_it_was_written():
    with pytest.raises(ApiError, match=r"above 0 and up to 1e9, not '1_000'\."):
        read({"x-slo-tpot-ms": "1_000"})
    with pytest.raises(ApiError, match=r"above 0 and up to 1e9, not 1000000000\.1\."):
        read(slo={"e2e_ms": 1e9 + 0.1})
    assert read(slo={"e2e_ms": 1e9}).e2e == 1e6
