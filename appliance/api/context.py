"""What every handler of one application shares, and what every request carries."""

import re
import secrets
import time
from dataclasses import dataclass

from aiohttp import web

from appliance.api.observe import ApiStats
from appliance.api.settings import ApiSettings
from appliance.api.validate import Limits
from appliance.live.node import Node

_SANE_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")


@dataclass(frozen=True)
class Context:
    """The application's objects."""

    node: Node
    settings: ApiSettings
    stats: ApiStats

    @property
    def limits(self) -> Limits:
        """What requests are checked against."""
        info = self.node.info
        return Limits(
            max_model_len=info.max_model_len,
            vocab_size=info.vocab_size,
            max_sequences=self.settings.max_sequences,
            eos_token_ids=info.eos_token_ids,
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
