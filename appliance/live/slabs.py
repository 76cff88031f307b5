"""Memory that belongs to the node and outlives a worker.

A slab on CPU is an anonymous memory file: no name that could collide, nothing to unlink, gone
with the last descriptor and mapping. Pages exist from their first touch. The node keeps the
descriptor; each incarnation of a worker gets a duplicate of it and maps it.
"""

import errno
import fcntl
import os

_F_ADD_SEALS = 1033
_F_SEAL_SHRINK_GROW = 0x2 | 0x4


class SlabError(Exception):
    """The memory file cannot be made. The message names the cause and the setting to change."""


class Slab:
    """One anonymous memory file of a fixed size; bytes are zero until somebody writes them."""

    def __init__(self, name: str, num_bytes: int) -> None:
        """Raises `SlabError` when the kernel refuses."""
        self.name = name
        self.num_bytes = num_bytes
        self.fd = -1
        try:
            self.fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(self.fd, num_bytes)
        except OSError as error:
            self.close()
            reason = errno.errorcode.get(error.errno or 0, "?")
            raise SlabError(
                f"cannot create the {name} slab of {num_bytes} bytes ({reason}); "
                "lower [kv] memory or the number of devices"
            ) from error
        fcntl.fcntl(self.fd, _F_ADD_SEALS, _F_SEAL_SHRINK_GROW)

    def resident_bytes(self) -> int:
        """Bytes that have been touched so far."""
        return os.fstat(self.fd).st_blocks * 512

    def close(self) -> None:
        """Give up the node's descriptor; the memory goes with the last mapping. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
