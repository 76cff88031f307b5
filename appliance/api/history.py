"""Turns in the making, for routes that tell a conversation in smaller pieces than turns.

What the assistant thought, said and called, in this order, is one turn; anything that does not
follow in this order begins the next.
"""

from collections.abc import Mapping
from typing import Any

from appliance.api.errors import shown
from appliance.api.validate import invalid


class History:
    """Collects turns for a chat template."""

    def __init__(self) -> None:
        self._turns: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._called: set[str] = set()

    def turn(self, role: str, text: str) -> None:
        """A whole turn of somebody else than the assistant."""
        self._close()
        self._turns.append({"role": role, "content": text})

    def thoughts(self, text: str) -> None:
        """The assistant thought this."""
        if not text:
            return
        if self._open is not None and (self._open["content"] or "tool_calls" in self._open):
            self._close()
        turn = self._assistant()
        turn["reasoning_content"] = turn.get("reasoning_content", "") + text

    def prose(self, text: str) -> None:
        """The assistant said this."""
        if self._open is not None and (self._open["content"] or "tool_calls" in self._open):
            self._close()
        self._assistant()["content"] = text

    def call(self, call_id: str, name: str, arguments: Mapping[str, Any] | str) -> None:
        """The assistant called this tool. `arguments` is an object, or a text that is none."""
        call = {
            "id": call_id,
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }
        self._called.add(call_id)
        self._assistant().setdefault("tool_calls", []).append(call)

    def result(self, call_id: str, text: str, *, at: str) -> None:
        """What a call gave. Raises `ApiError` naming `at` when nothing was called so."""
        if call_id not in self._called:
            raise invalid(at, f"is {shown(call_id)}, which no earlier call has.")
        self._close()
        self._turns.append({"role": "tool", "content": text, "tool_call_id": call_id})

    def done(self) -> list[dict[str, Any]]:
        """All turns."""
        self._close()
        return self._turns

    def _assistant(self) -> dict[str, Any]:
        if self._open is None:
            self._open = {"role": "assistant", "content": ""}
        return self._open

    def _close(self) -> None:
        if self._open is not None:
            self._turns.append(self._open)
            self._open = None
