"""The documents that answers are made of, as JSON bytes.

Every chunk is a function of the answer's identity and what is added: nothing here knows a socket, a
loop or the node, so chunks could be made in another process and would be the same bytes.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from appliance.core.payload import TokenLogprobs

if TYPE_CHECKING:
    from appliance.live.tokenise import TextService

END = b"}\n\n"
DONE = b"data: [DONE]\n\n"
LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


class Usage(msgspec.Struct):
    """Tokens of one HTTP request, summed over its prompts and answers."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    """Of the completion's; told only where there are some."""

    def document(self) -> dict[str, Any]:
        """The `usage` object."""
        reasoning = {"completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens}}
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            **(reasoning if self.reasoning_tokens else {}),
        }


def finite(logprob: float) -> float:
    """A log-probability that JSON can carry."""
    return max(logprob, LOWEST_LOGPROB)


class LogprobRenderer:
    """Log-probabilities of one answer in the shape of its route; remembers the text's length."""

    def __init__(self, text: "TextService", *, chat: bool) -> None:
        self._text = text
        self._chat = chat
        self._offset = 0

    def render(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """The `logprobs` object for these tokens, which follow those of the last call."""
        if self._chat:
            pairs = zip(tokens, logprobs, strict=True)
            return {
                "content": [self._entry(token, entry) for token, entry in pairs],
                "refusal": None,
            }
        return self._columns(tokens, logprobs)

    def _entry(self, token: int, entry: TokenLogprobs) -> dict[str, Any]:
        top = zip(entry.top_ids, entry.top_logprobs, strict=True)
        return {
            **self._token(token, entry.logprob),
            "top_logprobs": [self._token(other, logprob) for other, logprob in top],
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text, raw = self._text.token_text(token)
        return {"token": text, "logprob": finite(logprob), "bytes": list(raw)}

    def _columns(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
        columns: dict[str, list[Any]] = {
            "text_offset": [],
            "token_logprobs": [],
            "tokens": [],
            "top_logprobs": [],
        }
        for token, entry in zip(tokens, logprobs, strict=True):
            text, _ = self._text.token_text(token)
            top = {
                self._text.token_text(other)[0]: finite(logprob)
                for other, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True)
            }
            top.setdefault(text, finite(entry.logprob))
            columns["text_offset"].append(self._offset)
            columns["token_logprobs"].append(finite(entry.logprob))
            columns["tokens"].append(text)
            columns["top_logprobs"].append(top)
            self._offset += len(text)
        return columns


class Identity(msgspec.Struct, frozen=True):
    """What every document and chunk of one answer begins with."""

    id: str
    object: str
    created: int
    model: str

    def opening(self) -> bytes:
        """`{"id": ... "model": ...` without the closing brace."""
        return msgspec.json.encode(self)[:-1]


class ChunkTemplate:
    """The bytes around the text of one answer's chunks, made once.

    A plain chunk is `head + text + tail`; one with log-probabilities or running usage is
    `head + text + middle + logprobs + unfinished + usage + END`."""

    __slots__ = ("_chat", "_null_usage", "_opening", "head", "middle", "tail", "unfinished")

    def __init__(self, identity: Identity, index: int, *, chat: bool, null_usage: bool) -> None:
        self._chat = chat
        self._null_usage = b',"usage":null' if null_usage else b""
        self._opening = b"data: " + identity.opening() + b',"choices":[{"index":%d,' % index
        self.head = self._opening + (b'"delta":{"content":' if chat else b'"text":')
        self.middle = (b"}" if chat else b"") + b',"logprobs":'
        self.unfinished = b',"finish_reason":null}]'
        self.tail = self.middle + b"null" + self.unfinished + self._null_usage + END

    def text(self, text: str) -> bytes:
        """The plain chunk that adds this text."""
        return self.head + msgspec.json.encode(text) + self.tail

    def usage(self, running: bytes | None) -> bytes:
        """The `usage` member: running usage (JSON), or null or nothing where there is none."""
        return self._null_usage if running is None else b',"usage":' + running

    def role(self, running: bytes | None) -> bytes:
        """What precedes the first text: the role in a conversation, nothing otherwise."""
        if not self._chat:
            return b""
        delta = b'"delta":{"role":"assistant","content":""},"logprobs":null'
        return self._opening + delta + self.unfinished + self.usage(running) + END

    def delta(self, body: bytes, logprobs: bytes, running: bytes | None) -> bytes:
        """A chunk of a conversation that adds something else than text: `body` is its delta."""
        middle = b',"logprobs":' + logprobs + self.unfinished
        return self._opening + b'"delta":' + body + middle + self.usage(running) + END

    def finish(
        self, reason: str, running: bytes | None, slo: Mapping[str, Any] | None = None
    ) -> bytes:
        """The chunk that ends this answer; the last one of a stream carries the verdict."""
        empty = b'"delta":{}' if self._chat else b'"text":""'
        end = b',"logprobs":null,"finish_reason":"' + reason.encode() + b'"}]'
        verdict = b"" if slo is None else b',"slo":' + msgspec.json.encode(slo)
        return self._opening + empty + end + self.usage(running) + verdict + END


def usage_chunk(identity: Identity, usage: Usage) -> bytes:
    """The last chunk of a stream that was asked for its usage: no choices."""
    body = msgspec.json.encode(usage.document())
    return b"data: " + identity.opening() + b',"choices":[],"usage":' + body + END


def error_event(document: bytes) -> bytes:
    """An error in mid-stream, in the form that makes the official clients raise."""
    return b"data: " + document + b"\n\n"
