"""Text is a function of the ids: joined pieces are the tokenizer's decoding, cut at a stop."""

import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from tokenizers.decoders import DecodeStream

from appliance.core.payload import Sampling
from appliance.worker.text import SequenceText, StopStrings, TokenText

MODEL = Path(__file__).resolve().parents[2] / "models" / "tiny-tasks"


@pytest.fixture(scope="module")
def tokens() -> TokenText:
    return TokenText.load(MODEL)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


def fallback_tokenizer() -> Tokenizer:
    """A vocabulary in the manner of Llama 2: word starts marked, unknown bytes spelled out."""
    words = ["▁", "▁the", "▁cat", "s", "ing", "▁été", "猫", "!"]
    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": 1 + byte for byte in range(256)}
    vocab |= {word: 257 + index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def streamed(tokens: TokenText, ids: Sequence[int], *, skip_special: bool = True) -> list[str]:
    stream = tokens.stream(skip_special=skip_special)
    return [stream.push(token) for token in ids] + [stream.flush()]


@pytest.mark.parametrize("skip_special", [True, False])
def test_joined_pieces_equal_decode_for_random_ids(
    tokens: TokenText, tokenizer: Tokenizer, skip_special: bool
) -> None:
    rng = random.Random(7)
    size = tokenizer.get_vocab_size()
    for limit in (size, 300) * 300:  # low ids are single bytes: mostly invalid UTF-8
        ids = [rng.randrange(limit) for _ in range(rng.randrange(1, 80))]
        text = "".join(streamed(tokens, ids, skip_special=skip_special))
        assert text == tokenizer.decode(ids, skip_special_tokens=skip_special)


def test_decode_stream_agrees_where_it_speaks(tokens: TokenText, tokenizer: Tokenizer) -> None:
    rng = random.Random(8)
    for _ in range(200):
        ids = [rng.randrange(tokenizer.get_vocab_size()) for _ in range(60)]
        stream = DecodeStream(skip_special_tokens=True)
        reference = "".join(stream.step(tokenizer, token) or "" for token in ids)
        assert "".join(streamed(tokens, ids)).startswith(reference)


@pytest.mark.parametrize("text", ["日本語 🎉 naïve", "👩‍👩‍👧 é", "plain"])
def test_no_half_character_is_given_out(tokens: TokenText, tokenizer: Tokenizer, text: str) -> None:
    pieces = streamed(tokens, tokenizer.encode(text, add_special_tokens=False).ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_unfinished_character_appears_at_the_end(tokens: TokenText, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a🎉", add_special_tokens=False).ids[:-1]
    pieces = streamed(tokens, ids)
    assert "".join(pieces[:-1]) == "a"
    assert pieces[-1] == "\ufffd"


def test_ids_beyond_the_vocabulary_have_no_text(tokens: TokenText, tokenizer: Tokenizer) -> None:
    assert streamed(tokens, [tokenizer.get_vocab_size() + 5]) == ["", ""]


def test_printable_ids_are_text_on_their_own(tokens: TokenText, tokenizer: Tokenizer) -> None:
    ids = tokens.printable_ids()
    assert len(ids) > 400
    assert max(ids) < tokens.num_tokens == tokenizer.get_vocab_size()
    assert not tokens.special & set(ids)
    assert all(tokenizer.decode([token]).isprintable() for token in ids)


def test_fallback_vocabulary_streams_words_and_bytes() -> None:
    tokenizer = fallback_tokenizer()
    tokens = TokenText(tokenizer)
    eaten = [1 + byte for byte in "🐈".encode()]
    ids = [258, 259, 260, *eaten, 262, 263, 264]
    pieces = streamed(tokens, ids)
    assert pieces[:3] == ["the", " cat", "s"]
    assert pieces[3:7] == ["", "", "", "🐈"]
    assert "".join(pieces) == tokenizer.decode(ids) == "the cats🐈 été猫!"


def test_fallback_vocabulary_joined_pieces_equal_decode() -> None:
    tokenizer = fallback_tokenizer()
    tokens = TokenText(tokenizer)
    rng = random.Random(3)
    units = [[257 + index] for index in range(8)]
    units += [[1 + byte for byte in char.encode()] for char in "é猫🐈"]
    for _ in range(200):
        ids = [token for _ in range(20) for token in rng.choice(units)]
        assert "".join(streamed(tokens, ids)) == tokenizer.decode(ids)


def test_missing_tokenizer_names_file_and_remedy(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is missing.*save_pretrained"):
        TokenText.load(tmp_path)


def cut(stops: Sequence[str], pieces: Sequence[str], *, include: bool = False) -> tuple[str, bool]:
    finder = StopStrings(stops, include=include)
    out = ""
    for piece in pieces:
        text, hit = finder.push(piece)
        out += text
        if hit:
            return out, True
    return out + finder.flush(), False


def test_stop_string_over_several_tokens_is_cut() -> None:
    assert cut(["END"], ["ab", "cE", "N", "Dx"]) == ("abc", True)
    assert cut(["END"], ["ab", "cE", "N", "Dx"], include=True) == ("abcEND", True)


def test_start_of_a_stop_is_kept_back_and_given_out_when_it_was_none() -> None:
    finder = StopStrings(["END"], include=False)
    assert finder.push("aEN") == ("a", False)
    assert finder.push("E") == ("EN", False)
    assert finder.flush() == "E"


def test_unarmed_strings_pass_and_one_begun_may_still_stop() -> None:
    finder = StopStrings(["ab"], include=False)
    assert finder.push("xab", armed=False) == ("xab", False)
    assert finder.push("ya", armed=False) == ("y", False)
    assert finder.push("b!") == ("", True)


@given(
    st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.text(alphabet="ab", max_size=30),
    st.data(),
)
@settings(max_examples=300, deadline=None)
def test_cut_does_not_depend_on_the_division(
    stops: list[str], text: str, data: st.DataObject
) -> None:
    borders = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    edges = [0, *borders, len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    # the slow obvious one: grow the text letter by letter until a stop is complete
    expected = (text, False)
    for end in range(1, len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            expected = (text[: end - max(map(len, done))], True)
            break
    assert cut(stops, pieces) == expected


def answer(tokens: TokenText, sampling: Sampling, ids: Sequence[int]) -> tuple[str, int, bool]:
    """Text, number of ids taken, whether it stopped."""
    sequence = SequenceText(tokens, sampling)
    out = ""
    for count, token in enumerate(ids, start=1):
        text, stopped = sequence.push(token)
        out += text
        if stopped:
            return out, count, True
    return out + sequence.flush(), len(ids), False


@pytest.fixture(scope="module")
def hello(tokenizer: Tokenizer) -> list[int]:
    return list(tokenizer.encode("hello world", add_special_tokens=False).ids)


def test_end_token_stops_and_is_no_text(tokens: TokenText, hello: list[int]) -> None:
    sampling = Sampling(eos_token_ids=(2,), skip_special_tokens=False)
    assert answer(tokens, sampling, [*hello, 2, *hello]) == ("hello world", len(hello) + 1, True)


def test_ignored_end_token_goes_on_but_stop_token_counts(
    tokens: TokenText, hello: list[int]
) -> None:
    sampling = Sampling(eos_token_ids=(2,), stop_token_ids=(4,), ignore_eos=True)
    ids = [*hello, 2, *hello, 4, *hello]
    assert answer(tokens, sampling, ids) == ("hello world" * 2, 2 * len(hello) + 2, True)


def test_ordinary_stop_token_is_text(tokens: TokenText, hello: list[int]) -> None:
    sampling = Sampling(stop_token_ids=(hello[-1],))
    assert answer(tokens, sampling, hello * 2) == ("hello world", len(hello), True)


def test_min_tokens_delays_every_stop(tokens: TokenText, hello: list[int]) -> None:
    sampling = Sampling(eos_token_ids=(2,), stop=("wor",), min_tokens=len(hello) + 2)
    text, count, stopped = answer(tokens, sampling, [*hello, 2, *hello])
    assert (text, stopped) == ("hello worldhello ", True)
    assert count > len(hello) + 2


def test_stop_flushes_an_unfinished_character(tokens: TokenText, tokenizer: Tokenizer) -> None:
    half = tokenizer.encode("🎉", add_special_tokens=False).ids[:-1]
    sampling = Sampling(eos_token_ids=(2,), stop=("zz",))
    assert answer(tokens, sampling, [*half, 2]) == ("\ufffd", len(half) + 1, True)


def test_replay_gives_the_same_continuation(tokens: TokenText, tokenizer: Tokenizer) -> None:
    sampling = Sampling(stop=("🎉🎉", "never"))
    ids = tokenizer.encode("so 🎉 ne🎉ver 🎉🎉 after", add_special_tokens=False).ids
    whole = SequenceText(tokens, sampling)
    texts = [whole.push(token) for token in ids]
    for moved in range(len(ids)):
        again = SequenceText(tokens, sampling)
        for token in ids[:moved]:
            again.push(token)
        if any(stopped for _, stopped in texts[:moved]):
            break
        assert again.push(ids[moved]) == texts[moved]
