"""Names of the things within an answer, in the form that clients know: `call_...`, `msg_...`."""

import secrets


def item_id(prefix: str) -> str:
    """An id that nobody can guess."""
    return f"{prefix}_{secrets.token_hex(12)}"
