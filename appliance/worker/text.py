"""From token ids to ready text, one token at a time; and where an answer stops.

The promise is one equation: the texts given out for a list of ids, joined, are the tokenizer's
decoding of the whole list (cut at a stop string). So text depends on the ids alone, and a sequence
that moves to another worker is rebuilt by replaying its ids.

Byte-level vocabularies (GPT-2, Llama 3, Qwen, the bundled model) are decoded exactly and in
constant time: each token is a fixed string of bytes, and an incremental UTF-8 decoder keeps the
incomplete tail. `tokenizers.decoders.DecodeStream` would be four times slower there, and it cannot
give out the tail at the end. Other decoders (Metaspace, byte fall-back) need their left neighbours:
a window of recent ids is decoded with and without the new ones, and the difference is the text.
"""

import codecs
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer

from appliance.core.payload import Sampling

REPLACEMENT = "\ufffd"


class TokenStream(Protocol):
    """The text of one growing list of ids."""

    def push(self, token: int) -> str:
        """Append an id; returns the text that became certain, perhaps none."""

    def flush(self) -> str:
        """The list is complete: what was kept back (an unfinished character becomes U+FFFD)."""


class TokenText:
    """A vocabulary as text; shared by all sequences of a worker."""

    special: frozenset[int]
    """Ids of special tokens, which are markup and not text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.special = frozenset(id_ for id_, token in added.items() if token.special)
        self._byte_level = _is_byte_level(tokenizer)
        self._shown = _Pieces(tokenizer, hidden=self.special)
        self._all = _Pieces(tokenizer, hidden=frozenset())

    @classmethod
    def load(cls, model_dir: str | Path) -> "TokenText":
        """Read `tokenizer.json`. Raises `FileNotFoundError` naming the file and what to do."""
        path = Path(model_dir) / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing: a worker needs the fast tokenizer's file; "
                "save the tokenizer with save_pretrained() beside the weights"
            )
        return cls(Tokenizer.from_file(str(path)))

    def stream(self, *, skip_special: bool = True) -> TokenStream:
        """A new, empty list of ids."""
        if self._byte_level:
            return ByteStream(self._shown if skip_special else self._all)
        return WindowStream(self._tokenizer, skip_special=skip_special)

    @property
    def num_tokens(self) -> int:
        """Size of the vocabulary, added tokens included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def printable_ids(self) -> list[int]:
        """Ids whose text alone is not empty, valid and printable; ascending."""
        vocab = self._tokenizer.get_vocab(with_added_tokens=True).values()
        ids = sorted(id_ for id_ in vocab if id_ not in self.special)
        if self._byte_level:
            texts = [self._all[id_].decode("utf-8", "replace") for id_ in ids]
        else:
            texts = self._tokenizer.decode_batch([[id_] for id_ in ids])
        return [
            id_
            for id_, text in zip(ids, texts, strict=True)
            if text and text.isprintable() and REPLACEMENT not in text
        ]


class ByteStream:
    """Token ids of a byte-level vocabulary: bytes, joined, read as UTF-8."""

    __slots__ = ("_decode", "_pieces")

    def __init__(self, pieces: "_Pieces") -> None:
        self._pieces = pieces
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def push(self, token: int) -> str:
        return self._decode(self._pieces[token])

    def flush(self) -> str:
        return self._decode(b"", True)


class WindowStream:
    """Token ids of any vocabulary, by the difference of two decoded windows.

    The window starts one give-out before the unread ids, so what a decoder does at the start of a
    text (strip a space) happens to both and cancels out."""

    __slots__ = ("_read", "_skip_special", "_tokenizer", "_window")

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._window: list[int] = []
        self._read = 0  # ids of the window whose text was given out

    def _text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=self._skip_special)

    def push(self, token: int) -> str:
        self._window.append(token)
        old, new = self._text(self._window[: self._read]), self._text(self._window)
        if len(new) <= len(old) or new.endswith(REPLACEMENT):
            return ""
        self._window = self._window[self._read :]
        self._read = len(self._window)
        return new[len(old) :]

    def flush(self) -> str:
        old, new = self._text(self._window[: self._read]), self._text(self._window)
        self._read = len(self._window)
        return new[len(old) :]


class _Pieces(dict[int, bytes]):
    """Bytes of each token of a byte-level vocabulary, looked up once and kept."""

    def __init__(self, tokenizer: Tokenizer, *, hidden: frozenset[int]) -> None:
        super().__init__(dict.fromkeys(hidden, b""))
        self._tokenizer = tokenizer
        self._alphabet = _byte_alphabet()

    def __missing__(self, token: int) -> bytes:
        spelled = self._tokenizer.id_to_token(token) or ""  # models pad their vocabulary: no text
        alphabet = self._alphabet
        if all(letter in alphabet for letter in spelled):
            piece = bytes(alphabet[letter] for letter in spelled)
        else:
            piece = spelled.encode()  # an added token, which is spelled as it reads
        self[token] = piece
        return piece


def _byte_alphabet() -> dict[str, int]:
    """The letters by which byte-level vocabularies spell bytes: Latin-1's visible characters stand
    for themselves, the other bytes for the characters from U+0100 on, in order."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(visible))
    letters = {chr(byte): byte for byte in visible}
    letters.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return letters


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    decoder = json.loads(tokenizer.to_str())["decoder"] or {}
    while decoder.get("type") == "Sequence" and len(decoder["decoders"]) == 1:
        decoder = decoder["decoders"][0]
    return bool(decoder.get("type") == "ByteLevel")


class StopStrings:
    """Finds the first completed stop string in a stream of text; keeps back what could become one.

    Of several, the one that is *complete* first wins (the longest of those that end together), so
    the cut does not depend on how the text was divided into tokens."""

    def __init__(self, stops: Sequence[str], *, include: bool) -> None:
        """`include` leaves the stop string itself in the text."""
        self._stops = tuple(stop for stop in stops if stop)
        self._include = include
        self._starts = frozenset(
            stop[:size] for stop in self._stops for size in range(1, len(stop))
        )
        self._longest = max((len(start) for start in self._starts), default=0)
        self._kept = ""

    def push(self, text: str, *, armed: bool = True) -> tuple[str, bool]:
        """Returns the text that is certain and whether a stop string was completed. Unarmed,
        strings that are complete are let through; one that has only begun may still count."""
        text = self._kept + text
        if armed and (hit := self._first(text)) is not None:
            begin, end = hit
            self._kept = ""
            return text[: end if self._include else begin], True
        kept = self._start_of_a_stop(text)
        self._kept = text[len(text) - kept :]
        return text[: len(text) - kept], False

    def flush(self) -> str:
        """The stream has ended: what was kept back."""
        kept, self._kept = self._kept, ""
        return kept

    def _first(self, text: str) -> tuple[int, int] | None:
        hits = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if not hits:
            return None
        end, begin = min(hits)
        return begin, end

    def _start_of_a_stop(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        for size in range(min(self._longest, len(text)), 0, -1):
            if text[len(text) - size :] in self._starts:
                return size
        return 0


class SequenceText:
    """Text and stopping of one answer: feed it every emitted id, from the first one on."""

    __slots__ = ("_count", "_min_tokens", "_special", "_stop_ids", "_stops", "_stream")

    def __init__(self, tokens: TokenText, sampling: Sampling) -> None:
        self._stream = tokens.stream(skip_special=sampling.skip_special_tokens)
        self._special = tokens.special
        ends = () if sampling.ignore_eos else sampling.eos_token_ids
        self._stop_ids = frozenset((*ends, *sampling.stop_token_ids))
        self._stops = (
            StopStrings(sampling.stop, include=sampling.include_stop) if sampling.stop else None
        )
        self._min_tokens = sampling.min_tokens
        self._count = 0

    def push(self, token: int) -> tuple[str, bool]:
        """Add an emitted id. Returns the text that is ready and whether the answer stops with it.

        A stop token ends the answer from the `min_tokens`-th token on; it is text only if it is not
        a special token. A stop string must be completed by then or later. When the answer stops
        nothing is kept back."""
        self._count += 1
        armed = self._count >= self._min_tokens
        stopped = armed and token in self._stop_ids
        text = "" if stopped and token in self._special else self._stream.push(token)
        if self._stops is None:
            return (text + self._stream.flush(), True) if stopped else (text, False)
        text, hit = self._stops.push(text, armed=armed)
        if stopped and not hit:
            return text + self.flush(), True
        return text, hit

    def flush(self) -> str:
        """The answer ended for another reason (its length): everything kept back."""
        tail = self._stream.flush()
        if self._stops is None:
            return tail
        text, hit = self._stops.push(tail)
        return text if hit else text + self._stops.flush()
