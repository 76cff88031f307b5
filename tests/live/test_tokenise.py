"""Text to ids and back: exact, off the loop, and never for a prompt that cannot fit."""

import asyncio
import json
import random
import shutil
import threading
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from appliance.core.hashes import chain, root_hash
from appliance.live.token_bytes import TokenBytes, longest_token_bytes
from appliance.live.tokenise import TextService, TextSettings, TokenizerError, TooBusy, TooLong

MODEL = Path(__file__).parents[2] / "models" / "tiny-tasks"
SETTINGS = TextSettings(max_model_len=64, vocab_size=1024, block_tokens=4, hash_key=b"k" * 16)
DOCUMENT: dict[str, Any] = json.loads((MODEL / "tokenizer.json").read_text())
TOKENIZER = Tokenizer.from_file(str(MODEL / "tokenizer.json"))


@pytest.fixture
def text() -> Iterator[TextService]:
    service = TextService(MODEL, SETTINGS)
    yield service
    service.close()


async def test_encode_gives_the_ids_of_the_tokenizer(text: TextService) -> None:
    encoded = await text.encode("spell cat", add_special_tokens=True)
    assert list(encoded.ids) == TOKENIZER.encode("spell cat").ids
    assert await text.decode(encoded.ids) == "spell cat"


async def test_a_chat_is_rendered_and_no_special_token_is_added_twice(text: TextService) -> None:
    encoded = await text.encode_chat([{"role": "user", "content": "hi"}])
    assert await text.decode(encoded.ids, skip_special_tokens=False) == (
        "<|bos|><|user|>hi<|end|><|assistant|>"
    )


async def test_blocks_are_named_by_content_and_salt(text: TextService) -> None:
    ids = list(range(10))
    one, two = await text.encode_ids(ids, salt="s"), await text.encode_ids(ids, salt="t")
    key = SETTINGS.hash_key
    raw = array("i", ids).tobytes()
    assert one.hashes == tuple(chain(raw, 4, key=key, parent=root_hash(key=key, salt="s")))
    assert len(one.hashes) == 2
    assert not set(one.hashes) & set(two.hashes)


async def test_without_a_prefix_cache_no_block_is_named() -> None:
    settings = TextSettings(
        max_model_len=64, vocab_size=1024, block_tokens=4, hash_key=b"k", prefix_cache=False
    )
    service = TextService(MODEL, settings)
    try:
        assert (await service.encode_ids(range(10))).hashes == ()
    finally:
        service.close()


async def test_ids_outside_the_vocabulary_are_refused_by_position(text: TextService) -> None:
    with pytest.raises(ValueError, match="token id 1024 at position 1"):
        await text.encode_ids([5, 1024])
    with pytest.raises(ValueError, match="token id -1 at position 0"):
        await text.encode_ids([-1])
    with pytest.raises(TooLong, match="64 tokens; this model takes at most 64"):
        await text.encode_ids([1] * 64)


async def test_a_provably_over_long_text_is_refused_before_it_is_tokenised(
    text: TextService, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = longest_token_bytes(DOCUMENT)
    assert longest is not None

    def never(*_: object, **__: object) -> None:
        pytest.fail("the text was tokenised")

    monkeypatch.setattr(text, "_encode", never)
    with pytest.raises(TooLong, match=r"at least 64 tokens; .* at most 64 tokens"):
        await text.encode("x" * (longest * 64), add_special_tokens=True)
    with pytest.raises(TooLong):
        await text.encode_chat([{"role": "user", "content": "y" * 100_000}])


async def test_r18_a_long_text_does_not_hold_up_the_loop() -> None:
    settings = TextSettings(
        max_model_len=4_000_000, vocab_size=1024, block_tokens=16, hash_key=b"k"
    )
    service = TextService(MODEL, settings)
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(1, 9))) for _ in range(60_000)]
    try:
        work = asyncio.create_task(service.encode(" ".join(words), add_special_tokens=False))
        turns = 0
        while not work.done():
            await asyncio.sleep(0)
            turns += 1
        encoded = await work
        assert len(encoded.ids) > 100_000
        assert turns > 100
    finally:
        service.close()


async def test_r15_waiting_prompts_are_bounded_in_bytes_and_one_is_always_taken() -> None:
    settings = TextSettings(
        max_model_len=64, vocab_size=1024, block_tokens=4, hash_key=b"k", max_pending_bytes=100
    )
    service, gate = TextService(MODEL, settings), threading.Event()
    try:
        first = asyncio.create_task(service.run(gate.wait, num_bytes=1000))
        await asyncio.sleep(0)
        with pytest.raises(TooBusy, match="more than 100 bytes") as caught:
            await service.encode("a", add_special_tokens=False)
        assert caught.value.retry_after > 0
        gate.set()
        await first
        small = [service.encode("a b", add_special_tokens=False) for _ in range(20)]
        assert len(await asyncio.gather(*small)) == 20
    finally:
        gate.set()
        service.close()


async def test_r15_a_failed_prompt_gives_its_bytes_back(text: TextService) -> None:
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            await text.run(lambda: 1 // 0, num_bytes=50 * 1024 * 1024)
    assert (await text.encode("a", add_special_tokens=False)).ids


async def test_work_runs_in_named_threads_that_end_with_the_service(text: TextService) -> None:
    await text.encode("a", add_special_tokens=False)
    assert any(thread.name.startswith("text") for thread in threading.enumerate())
    text.close()
    assert not any(thread.name.startswith("text") for thread in threading.enumerate())


def test_r20_a_missing_or_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is missing; save the tokenizer"):
        TextService(tmp_path, SETTINGS)
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(TokenizerError, match=r"tokenizer\.json cannot be read"):
        TextService(tmp_path, SETTINGS)


def test_padding_and_truncation_of_the_file_are_switched_off(tmp_path: Path) -> None:
    shutil.copytree(MODEL, tmp_path / "m")
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    tokenizer.enable_padding(length=20)
    tokenizer.enable_truncation(3)
    tokenizer.save(str(tmp_path / "m" / "tokenizer.json"))
    service = TextService(tmp_path / "m", SETTINGS)
    try:
        encoded = asyncio.run(service.encode("one two three four", add_special_tokens=False))
        assert list(encoded.ids) == TOKENIZER.encode("one two three four").ids
    finally:
        service.close()


# --- single tokens --------------------------------------------------------------------------------


@given(st.text(max_size=40))
def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(sample: str) -> None:
    token_bytes = TokenBytes(DOCUMENT)
    ids = TOKENIZER.encode(sample, add_special_tokens=False).ids
    spelled = [TOKENIZER.id_to_token(token) for token in ids]
    assert b"".join(token_bytes.of(each) for each in spelled) == sample.encode()


@given(st.text(max_size=200))
def test_no_text_has_fewer_tokens_than_the_bound_says(sample: str) -> None:
    longest = longest_token_bytes(DOCUMENT)
    assert longest is not None
    num_tokens = len(TOKENIZER.encode(sample, add_special_tokens=False).ids)
    assert num_tokens * longest >= len(sample.encode())


def test_a_token_is_shown_as_text_and_bytes(text: TextService) -> None:
    ids = TOKENIZER.encode("é", add_special_tokens=False).ids
    shown = [text.token_text(token) for token in ids]
    assert b"".join(raw for _, raw in shown) == "é".encode()
    assert text.token_text(2) == ("<|end|>", b"<|end|>")
    assert text.token_text(99_999) == ("", b"")


def test_byte_fallback_tokens_are_bytes_and_markers_are_spaces() -> None:
    token_bytes = TokenBytes({"decoder": {"type": "Sequence", "decoders": [{"type": "Fuse"}]}})
    assert token_bytes.of("<0xC3>") == b"\xc3"
    assert token_bytes.of("\u2581word") == b" word"


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}]}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed"}},
        {"model": {"type": "WordPiece", "vocab": {}}},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "byte_fallback": False}},
        {"added_tokens": [{"content": "<x>", "lstrip": True}]},
    ],
)
def test_there_is_no_bound_where_text_can_vanish(change: dict[str, Any]) -> None:
    assert longest_token_bytes({**DOCUMENT, **change}) is None


def test_the_bound_allows_for_normalisation() -> None:
    plain = longest_token_bytes(DOCUMENT)
    composed = longest_token_bytes({**DOCUMENT, "normalizer": {"type": "NFC"}})
    assert plain is not None
    assert composed == 3 * plain


async def test_markup_is_known_as_markup(text: TextService) -> None:
    assert text.is_special("<|end|>")
    assert not text.is_special("a")
    assert not text.is_special("<tool_call>")
