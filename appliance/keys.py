"""`appliance key`: a new random key, and the entry of the configuration that admits it.

The configuration keeps the digest only, so the key is shown once. It has 256 bits of randomness: a
plain SHA-256 of it cannot be searched through.
"""

import hashlib
import secrets
from collections.abc import Callable

from appliance.config import from_table

PREFIX = "sk-appliance-"
"""Makes a key easy to recognise where it should not be."""


def make_key(random: Callable[[int], str] = secrets.token_urlsafe) -> str:
    """A new key. `random` gives URL-safe text of that many random bytes."""
    return PREFIX + random(32)


def entry(key: str, *, name: str, admin: bool = False) -> str:
    """The TOML entry for `key`. Raises `ConfigError` when the name cannot be one."""
    digest = hashlib.sha256(key.encode()).hexdigest()
    from_table({"key": [{"name": name, "sha256": digest, "admin": admin}]})
    lines = ["[[key]]", f'name = "{name}"', f'sha256 = "{digest}"']
    return "\n".join(lines + ["admin = true"] * admin) + "\n"
