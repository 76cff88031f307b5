"""What a single token stands for in bytes, and the most text that one token can stand for.

Both are read from the JSON of a `tokenizer.json`. The second gives a bound that needs no
tokenising: a text of `b` bytes has at least `b / longest` tokens, *if* nothing in the pipeline
can drop text and no token can stand for a run of unknown characters. Where that cannot be shown
there is no bound.
"""

from collections.abc import Mapping, Sequence
from typing import Any

NFC_SHRINK = 3
"""Bytes of UTF-8 that canonical composition can turn into one, at most (U+212A -> "K")."""


def byte_alphabet() -> dict[str, int]:
    """Character -> byte of the byte-level alphabet: printable bytes stand for themselves, the
    others for code points from 256 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return table


class TokenBytes:
    """Bytes of single tokens of one tokenizer, by its parsed `tokenizer.json`."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._byte_level = "ByteLevel" in _kinds(document.get("decoder"))
        self._alphabet = byte_alphabet()
        self._added = {entry["content"] for entry in document.get("added_tokens") or ()}

    def of(self, token: str) -> bytes:
        """The bytes that `token`, as spelled in the vocabulary, adds to the text."""
        if token in self._added:
            return token.encode()
        if self._byte_level:
            return bytes(self._alphabet[char] for char in token if char in self._alphabet)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode()


def longest_token_bytes(document: Mapping[str, Any]) -> int | None:
    """Bytes of input text that one token can stand for, at most; None when that cannot be shown."""
    model = document.get("model") or {}
    added = document.get("added_tokens") or ()
    shrink = _normaliser_shrink(document.get("normalizer"))
    if model.get("type") != "BPE" or shrink is None:
        return None
    if not _keeps_all_text(document.get("pre_tokenizer")):
        return None
    if any(entry.get("lstrip") or entry.get("rstrip") for entry in added):
        return None
    if not _knows_all_bytes(model, document):
        return None
    longest = max((len(token.encode()) for token in model["vocab"]), default=0)
    longest_added = max((len(entry["content"].encode()) for entry in added), default=0)
    return max(longest, longest_added) * shrink


def _kinds(part: Mapping[str, Any] | None) -> set[str]:
    """Type names of a pipeline part and of what it is a sequence of."""
    if part is None:
        return set()
    kinds = {str(part.get("type"))}
    for key in ("decoders", "pretokenizers", "normalizers"):
        for inner in part.get(key) or ():
            kinds |= _kinds(inner)
    return kinds


def _parts(part: Mapping[str, Any] | None, key: str) -> Sequence[Mapping[str, Any]]:
    if part is None:
        return ()
    return part[key] if part.get("type") == "Sequence" else (part,)


def _normaliser_shrink(normalizer: Mapping[str, Any] | None) -> int | None:
    """By how much normalising can shorten a text in bytes; None when it may drop text."""
    shrink = 1
    for part in _parts(normalizer, "normalizers"):
        match part.get("type"):
            case "NFC":
                shrink *= NFC_SHRINK
            case "Prepend":
                pass
            case "Replace" if part.get("pattern") == {"String": " "} and part.get("content"):
                pass
            case _:
                return None
    return shrink


def _keeps_all_text(pre_tokenizer: Mapping[str, Any] | None) -> bool:
    for part in _parts(pre_tokenizer, "pretokenizers"):
        match part.get("type"):
            case "ByteLevel" | "Digits" | "Metaspace":
                pass
            case "Split" if part.get("behavior") != "Removed":
                pass
            case _:
                return False
    return True


def _knows_all_bytes(model: Mapping[str, Any], document: Mapping[str, Any]) -> bool:
    """Whether every byte has a token of its own, so that no run collapses into one unknown
    token."""
    vocab = model["vocab"]
    if "ByteLevel" in _kinds(document.get("pre_tokenizer")):
        return all(char in vocab for char in byte_alphabet())
    return bool(model.get("byte_fallback")) and all(
        f"<0x{byte:02X}>" in vocab for byte in range(256)
    )
