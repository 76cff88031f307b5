"""Every end that is not an answer has a status, a family and a code."""

import json

import pytest

from appliance.api.errors import STATUS, ApiError, error_of, shown
from appliance.core.types import ErrorKind


@pytest.mark.parametrize("kind", list(ErrorKind))
def test_every_error_kind_has_an_error_object(kind):
    error = error_of(kind, "words")
    document = json.loads(error.encoded())
    assert set(document) == {"error"}
    assert set(document["error"]) == {"message", "type", "param", "code"}
    assert document["error"]["code"] == kind.value
    assert error.status == STATUS[kind]


def test_r16_who_comes_too_early_is_told_when_to_come_back():
    assert error_of(ErrorKind.QUEUE_FULL, "full", retry_after=2.3).headers["Retry-After"] == "3"
    assert error_of(ErrorKind.DRAINING, "later").headers["Retry-After"] == "1"
    assert error_of(ErrorKind.NO_WORKER, "later", retry_after=0.0).headers["Retry-After"] == "1"
    assert "Retry-After" not in error_of(ErrorKind.INTERNAL, "broken").headers


def test_r27_a_poison_request_is_not_to_be_sent_again():
    assert error_of(ErrorKind.POISON, "no").headers["x-should-retry"] == "false"


def test_an_error_without_words_says_its_code():
    assert error_of(ErrorKind.INTERNAL, "").body.message == "internal_error"


def test_what_a_client_sent_is_shown_short_and_printable():
    assert shown("a\n\ud800") == "'a\\n\\ud800'"
    assert len(shown("x" * 500)) == 80
    assert ApiError(shown("\ud800"), code="c").encoded()
