"""Text to token ids and back, off the event loop.

Everything whose time grows with the prompt runs in a small thread pool: rendering the chat
template, `encode_batch` (which releases the interpreter lock) and naming the prompt's blocks. A
text that cannot fit, whatever its tokens are, is refused before it is tokenised. What waits for the
pool and what is in it is bounded in bytes of prompts; one prompt is always taken.
"""

import asyncio
import json
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import Tokenizer

from appliance.core.hashes import chain, root_hash
from appliance.core.types import Record
from appliance.live.chat_template import ChatTemplates, load_templates
from appliance.live.records import Encoded
from appliance.live.token_bytes import TokenBytes, longest_token_bytes

T = TypeVar("T")
INLINE_IDS = 1024
"""Prompts of up to this many ids are hashed on the spot: it takes less time than a thread hop."""

RATED_BYTES = 4096
"""Prompts from this size on show how fast a thread is; of shorter ones the call is most."""


class TooLong(ValueError):
    """The prompt cannot fit, whatever its tokens are. The message names length and limit."""


class TooBusy(Exception):
    """Too many bytes of prompts wait to be tokenised. `retry_after` in seconds."""

    def __init__(self, most: int, retry_after: float) -> None:
        super().__init__(f"more than {most} bytes of prompts wait to be tokenised")
        self.retry_after = retry_after


class TokenizerError(Exception):
    """The model's tokenizer cannot be used. The message names the file and the fix."""


class TextSettings(Record, frozen=True, kw_only=True):
    """`hash_key` is the node's secret for block names; without `prefix_cache` blocks are not
    named."""

    max_model_len: int
    vocab_size: int
    """Ids that the model takes (its embedding table may be larger than the tokenizer)."""
    block_tokens: int
    hash_key: bytes
    prefix_cache: bool = True
    num_threads: int = 2
    max_pending_bytes: int = 64 * 1024 * 1024
    """Of prompts that wait for a thread or are in one."""


class TextService:
    """The tokenizer and chat templates of one model. Close it to end its threads."""

    def __init__(self, directory: Path, settings: TextSettings) -> None:
        """Raises `TokenizerError` or `TemplateFailed` when the model's files cannot be used."""
        self._settings = settings
        self._tokenizer, document = _load_tokenizer(directory / "tokenizer.json")
        self._token_bytes = TokenBytes(document)
        self._longest = longest_token_bytes(document)
        self._templates = load_templates(directory)
        self._pool = ThreadPoolExecutor(settings.num_threads, thread_name_prefix="text")
        self._pending_bytes = 0
        self._seconds_per_byte = 1e-7
        """Of one thread, lately."""

    @property
    def vocab_size(self) -> int:
        """Number of ids that the model takes."""
        return self._settings.vocab_size

    @property
    def templates(self) -> ChatTemplates:
        """The chat templates (possibly none)."""
        return self._templates

    def is_special(self, text: str) -> bool:
        """Whether this text is one token of markup, which answers are freed from."""
        token = self._tokenizer.token_to_id(text)
        added = None if token is None else self._tokenizer.get_added_tokens_decoder().get(token)
        return added is not None and bool(added.special)

    @property
    def hash_key(self) -> bytes:
        """The key that names blocks."""
        return self._settings.hash_key

    async def encode(self, text: str, *, add_special_tokens: bool, salt: str = "") -> Encoded:
        """Ids of a text. Raises `TooLong` when the text provably does not fit, and `TooBusy`."""
        self._refuse_hopeless(text)
        return await self.run(
            lambda: self._encode(text, salt, special=add_special_tokens), num_bytes=len(text)
        )

    async def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
        salt: str = "",
    ) -> Encoded:
        """Ids of a conversation. The template writes the special tokens, none is added.

        Raises `TemplateMissing`, `TemplateFailed`, `TooLong` or `TooBusy`."""

        def work() -> Encoded:
            text = self._templates.render(
                messages,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                variables=template_kwargs,
            )
            self._refuse_hopeless(text)
            return self._encode(text, salt, special=False)

        num_bytes = sum(len(message.get("content") or "") for message in messages)
        return await self.run(work, num_bytes=num_bytes)

    async def encode_ids(self, ids: Sequence[int], *, salt: str = "") -> Encoded:
        """A prompt given as ids. Raises `ValueError` naming the first id outside the vocabulary,
        `TooLong` and `TooBusy`."""
        if len(ids) >= self._settings.max_model_len:
            raise self._too_long(f"{len(ids)} tokens")
        packed = array("i", ids)
        if packed and (min(packed) < 0 or max(packed) >= self.vocab_size):
            index = next(i for i, token in enumerate(ids) if not 0 <= token < self.vocab_size)
            raise ValueError(
                f"token id {ids[index]} at position {index} is outside the vocabulary "
                f"of {self.vocab_size} tokens"
            )
        if len(packed) <= INLINE_IDS:
            return self.name_blocks(packed, salt)
        return await self.run(lambda: self.name_blocks(packed, salt), num_bytes=4 * len(packed))

    def name_blocks(self, ids: "array[int]", salt: str) -> Encoded:
        """`ids` with the names of their full blocks under `salt`; takes time for a long prompt."""
        hashes: tuple[int, ...] = ()
        if self._settings.prefix_cache:
            key = self._settings.hash_key
            parent = root_hash(key=key, salt=salt)
            hashes = tuple(
                chain(ids.tobytes(), self._settings.block_tokens, key=key, parent=parent)
            )
        return Encoded(ids=ids, hashes=hashes, salt=salt)

    async def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of these ids. Raises `TooBusy`."""

        def work() -> str:  # the batch call releases the interpreter lock, the single one does not
            (text,) = self._tokenizer.decode_batch(
                [list(ids)], skip_special_tokens=skip_special_tokens
            )
            return str(text)

        return await self.run(work, num_bytes=4 * len(ids))

    def token_text(self, token: int) -> tuple[str, bytes]:
        """What one token adds to a text: as a string (incomplete characters as U+FFFD) and as
        bytes."""
        spelled = self._tokenizer.id_to_token(token)
        raw = b"" if spelled is None else self._token_bytes.of(spelled)
        return raw.decode(errors="replace"), raw

    def close(self) -> None:
        """End the threads; running work is finished, waiting work is dropped."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    async def run(self, work: Callable[[], T], *, num_bytes: int) -> T:
        """Anything that takes long and concerns one prompt of about so many bytes, in a thread of
        this service. Raises `TooBusy`."""
        most = self._settings.max_pending_bytes
        if self._pending_bytes and self._pending_bytes + num_bytes > most:
            wait = self._pending_bytes * self._seconds_per_byte / self._settings.num_threads
            raise TooBusy(most, wait)

        def timed() -> tuple[T, float]:
            begun = time.monotonic()
            return work(), time.monotonic() - begun

        self._pending_bytes += num_bytes
        try:
            result, took = await asyncio.get_running_loop().run_in_executor(self._pool, timed)
        finally:
            self._pending_bytes -= num_bytes
        if num_bytes >= RATED_BYTES:
            self._seconds_per_byte += 0.1 * (took / num_bytes - self._seconds_per_byte)
        return result

    def _encode(self, text: str, salt: str, *, special: bool) -> Encoded:
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=special)
        return self.name_blocks(array("i", encoding.ids), salt)

    def _refuse_hopeless(self, text: str) -> None:
        """Raise `TooLong` when even the longest tokens could not make the text fit."""
        limit = self._settings.max_model_len
        if self._longest is None or len(text) * 4 < limit:
            return
        num_bytes = len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))
        if num_bytes >= self._longest * limit:
            least = -(-num_bytes // self._longest)
            raise self._too_long(f"{num_bytes} bytes, at least {least} tokens")

    def _too_long(self, length: str) -> TooLong:
        limit = self._settings.max_model_len
        return TooLong(
            f"the prompt is too long: {length}; this model takes at most {limit} tokens, "
            "prompt and answer together"
        )


def _load_tokenizer(path: Path) -> tuple[Tokenizer, dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        tokenizer = Tokenizer.from_str(text)
        document: dict[str, Any] = json.loads(text)
    except FileNotFoundError as error:
        raise TokenizerError(
            f"{path} is missing; save the tokenizer in its fast form (tokenizer.json)"
        ) from error
    except Exception as error:  # the tokenizers library raises bare Exception
        raise TokenizerError(f"{path} cannot be read: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer, document
