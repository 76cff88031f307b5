"""The desk where grammars are tried: another process, that may be lost at any time."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from appliance.api import grammars
from appliance.api.errors import ApiError
from appliance.api.grammars import GrammarDesk, Wanted

pytestmark = pytest.mark.procs

TOKENIZER = Path(__file__).parents[2] / "models" / "tiny-tasks" / "tokenizer.json"
SLOW = "(a{1000}){1000}"
"""A stand-in for what takes for ever: the slowed process sleeps when it sees it."""
SLEEPY_BOOT = (
    "import json, sys, time; sys.path[:] = json.loads(sys.argv.pop(1)); "
    "import appliance.api.grammar_check as program; whole = program.Checker.check; "
    "program.Checker.check = lambda self, check: "
    f"time.sleep(600) if check.text == {SLOW!r} else whole(self, check); program.main()"
)


def regex(pattern: str, *, param: str = "guided_regex") -> Wanted:
    return Wanted(param=param, kind="regex", text=pattern)


@pytest.fixture
async def desk() -> AsyncIterator[GrammarDesk]:
    opened = GrammarDesk(TOKENIZER, vocab_size=1024, ends=(2,))
    yield opened
    children = psutil.Process().children()
    await opened.close()
    assert not [child for child in children if child.is_running() and _is_ours(child)]


def _is_ours(child: psutil.Process) -> bool:
    return child.status() != psutil.STATUS_ZOMBIE and "grammar_check" in " ".join(child.cmdline())


async def refused(desk: GrammarDesk, wanted: Wanted) -> ApiError:
    with pytest.raises(ApiError) as caught:
        await desk.compiled(wanted)
    return caught.value


def pid_of(desk: GrammarDesk) -> int:
    assert desk._process is not None
    return desk._process.pid


async def test_nothing_is_started_before_it_is_needed(desk: GrammarDesk) -> None:
    assert desk._process is None
    known = await desk.compiled(regex("a+"))
    assert "lark_grammar" in known.grammar
    assert pid_of(desk)


async def test_a_refusal_names_the_field_it_came_in(desk: GrammarDesk) -> None:
    for param in ("guided_regex", "structured_outputs.regex"):
        error = await refused(desk, regex("a(", param=param))
        assert (error.status, error.body.param, error.body.code) == (400, param, "invalid_value")
        assert "unclosed group" in error.body.message


async def test_verdicts_are_remembered_and_shared(
    desk: GrammarDesk, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []
    exchange = GrammarDesk._exchange

    async def counted(self: GrammarDesk, key: Wanted) -> object:
        tried.append(key.text)
        return await exchange(self, key)

    monkeypatch.setattr(GrammarDesk, "_exchange", counted)
    monkeypatch.setattr(grammars, "MAX_KNOWN", 2)
    await asyncio.gather(*(desk.compiled(regex("a+")) for _ in range(5)))
    await desk.compiled(regex("b+"))
    await desk.compiled(regex("a+"))
    assert tried == ["a+", "b+"]
    await desk.compiled(regex("c+"))
    await desk.compiled(regex("b+"))
    assert tried == ["a+", "b+", "c+", "b+"]


async def test_what_takes_too_long_is_refused_and_the_process_ended(
    desk: GrammarDesk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammars, "BOOT", SLEEPY_BOOT)
    monkeypatch.setattr(grammars, "CHECK_SECONDS", 0.5)
    await desk.compiled(regex("a+"))
    first = pid_of(desk)
    error = await refused(desk, regex(SLOW))
    assert error.status == 400
    assert "within 0.5 seconds" in error.body.message
    assert not psutil.pid_exists(first)
    monkeypatch.setattr(grammars, "CHECK_SECONDS", 30)
    assert (await desk.compiled(regex("b+"))).grammar
    assert (await refused(desk, regex(SLOW))).status == 400  # remembered: costs no second process


async def test_a_client_that_leaves_spoils_no_others_answer(desk: GrammarDesk) -> None:
    leaving = asyncio.create_task(desk.compiled(regex("left{2}")))
    await asyncio.sleep(0)
    leaving.cancel()
    staying = await asyncio.gather(*(desk.compiled(regex(f"a{{{n}}}")) for n in range(1, 6)))
    for count, known in enumerate(staying, 1):
        assert f"a{{{count}}}" in known.grammar
    with pytest.raises(asyncio.CancelledError):
        await leaving


async def test_a_process_that_was_killed_is_started_anew(desk: GrammarDesk) -> None:
    await desk.compiled(regex("a+"))
    assert desk._process is not None
    os.kill(pid_of(desk), signal.SIGKILL)
    await desk._process.wait()
    assert (await desk.compiled(regex("b+"))).grammar


async def test_a_grammar_that_kills_the_process_is_refused(
    desk: GrammarDesk, monkeypatch: pytest.MonkeyPatch
) -> None:
    deadly = SLEEPY_BOOT.replace("time.sleep(600)", "__import__('os').abort()")
    monkeypatch.setattr(grammars, "BOOT", deadly)
    error = await refused(desk, regex(SLOW))
    assert (error.status, error.body.param) == (400, "guided_regex")
    assert "cannot be compiled" in error.body.message
    assert (await desk.compiled(regex("b+"))).grammar


async def test_too_large_and_too_many(desk: GrammarDesk, monkeypatch: pytest.MonkeyPatch) -> None:
    error = await refused(desk, regex("ä" * (grammars.MAX_BYTES // 2 + 1)))
    assert "larger than 65536 bytes" in error.body.message
    monkeypatch.setattr(grammars, "MAX_WAITING", 2)
    results = await asyncio.gather(
        *(desk.compiled(regex(f"x{{{n}}}")) for n in range(1, 5)), return_exceptions=True
    )
    refusals = [result for result in results if isinstance(result, ApiError)]
    assert [error.status for error in refusals] == [429, 429]
    assert refusals[0].headers["Retry-After"] == "1"


async def test_a_model_without_an_end_and_a_tokenizer_that_cannot_be_read(tmp_path: Path) -> None:
    endless = GrammarDesk(TOKENIZER, vocab_size=1024, ends=())
    error = await refused(endless, regex("a"))
    assert (error.status, error.body.param) == (400, "guided_regex")
    strange = tmp_path / "tokenizer.json"
    strange.write_text(json.dumps({"model": "unheard of"}))
    broken = GrammarDesk(strange, vocab_size=9, ends=(2,))
    error = await refused(broken, regex("a"))
    assert error.status == 500
    assert "tokenizer.json cannot be used with a grammar" in error.body.message
    await broken.close()
    await endless.close()


async def test_closing_in_the_middle_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grammars, "BOOT", SLEEPY_BOOT)
    desk = GrammarDesk(TOKENIZER, vocab_size=1024, ends=(2,))
    await desk.compiled(regex("a+"))
    pid = pid_of(desk)
    stuck = asyncio.create_task(desk.compiled(regex(SLOW)))
    await asyncio.sleep(0.05)
    await desk.close()
    assert not psutil.pid_exists(pid)
    with pytest.raises(asyncio.CancelledError):
        await stuck
