"""Logs: one line per event, fields beside the words, for people or programs."""

import io
import json
import logging
import re
from collections.abc import Iterator
from typing import Literal

import pytest

from appliance import logs


@pytest.fixture
def untouched_logging() -> Iterator[None]:
    """Put the root logger back as it was."""
    root, ours = logging.getLogger(), logging.getLogger("appliance")
    before = (root.handlers[:], root.level, ours.level)
    yield
    root.handlers[:], level, our_level = before
    root.setLevel(level)
    ours.setLevel(our_level)


def said(style: Literal["human", "json"], level: str = "info") -> io.StringIO:
    stream = io.StringIO()
    logs.set_up(style=style, level=level, stream=stream)
    logger = logging.getLogger("appliance.live.workers")
    logger.debug("a detail")
    cause = {"worker": 1, "cause": "killed by SIGKILL", "seconds": 0.12345}
    logger.warning("worker has died", extra=cause)
    logging.getLogger("elsewhere").info("chatter of a library")
    return stream


@pytest.mark.usefixtures("untouched_logging")
def test_a_line_for_people_has_the_fields_behind_the_words() -> None:
    line = said("human").getvalue()
    expected = (
        r"\d\d:\d\d:\d\d\.\d{3} warning live\.workers: worker has died  "
        r'worker=1 cause="killed by SIGKILL" seconds=0\.123\n'
    )
    assert re.fullmatch(expected, line)


@pytest.mark.usefixtures("untouched_logging")
def test_a_line_for_programs_is_one_json_object_with_every_field() -> None:
    (line,) = said("json").getvalue().splitlines()
    document = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT.*\+00:00", document.pop("time"))
    assert document == {
        "level": "warning",
        "logger": "appliance.live.workers",
        "message": "worker has died",
        "worker": 1,
        "cause": "killed by SIGKILL",
        "seconds": 0.12345,
    }


@pytest.mark.usefixtures("untouched_logging")
def test_the_level_is_for_our_loggers_only() -> None:
    lines = said("human", "debug").getvalue()
    assert "a detail" in lines
    assert "chatter" not in lines


@pytest.mark.usefixtures("untouched_logging")
@pytest.mark.parametrize("style", ["human", "json"])
def test_a_line_break_in_a_field_cannot_forge_a_line(style: Literal["human", "json"]) -> None:
    stream = io.StringIO()
    logs.set_up(style=style, level="info", stream=stream)
    logging.getLogger("appliance").error("bad name", extra={"request": "x\n18:00 error all well"})
    assert len(stream.getvalue().splitlines()) == 1


@pytest.mark.usefixtures("untouched_logging")
def test_a_traceback_is_kept() -> None:
    stream = io.StringIO()
    logs.set_up(style="json", level="info", stream=stream)
    try:
        raise RuntimeError("the cause")
    except RuntimeError:
        logging.getLogger("appliance").exception("it failed")
    assert "RuntimeError: the cause" in json.loads(stream.getvalue())["traceback"]
