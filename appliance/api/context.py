"""What every handler of one application shares, and what every request carries."""

import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from aiohttp import web

from appliance.api.observe import ApiStats
from appliance.api.settings import ApiSettings
from appliance.api.validate import Limits
from appliance.live.node import Node

_SANE_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")


class Names:
    """What the node calls a request that clients know by `x-request-id` or by the answer's id."""

    def __init__(self, limit: int) -> None:
        """`limit`: ids whose story can still be asked for; a request has two."""
        self._limit = limit
        self._names: OrderedDict[str, tuple[str, ...]] = OrderedDict()

    def note(self, request_id: str, names: Sequence[str]) -> None:
        """Remember the node's name of each prompt; the first is the answer's id."""
        for key in (request_id, names[0]):
            self._names[key] = tuple(names)
            self._names.move_to_end(key)
        while len(self._names) > self._limit:
            self._names.popitem(last=False)

    def of(self, name: str) -> tuple[str, ...]:
        """The node's names behind this one; itself when nothing is known."""
        return self._names.get(name, (name,))


@dataclass(frozen=True)
class Context:
    """The application's objects."""

    node: Node
    settings: ApiSettings
    stats: ApiStats
    names: Names

    @property
    def limits(self) -> Limits:
        """What requests are checked against."""
        info = self.node.info
        return Limits(
            max_model_len=info.max_model_len,
            vocab_size=info.vocab_size,
            max_sequences=self.settings.max_sequences,
            eos_token_ids=info.eos_token_ids,
            max_prompt_tokens=self.settings.max_prompt_tokens,
            max_messages=self.settings.max_messages,
            max_stop_strings=self.settings.max_stop_strings,
            max_stop_length=self.settings.max_stop_length,
        )


CONTEXT = web.AppKey("context", Context)
REQUEST_ID = web.RequestKey("request_id", str)
ARRIVED = web.RequestKey("arrived", float)


def stamp(request: web.Request) -> None:
    """Give a request its arrival time and its id: the client's when it is sane, else a new one."""
    given = request.headers.get("x-request-id", "")
    request[ARRIVED] = time.monotonic()
    request[REQUEST_ID] = given if _SANE_ID.fullmatch(given) else new_id("req")


def new_id(prefix: str) -> str:
    """An id that nobody can guess."""
    return f"{prefix}-{secrets.token_hex(12)}"
