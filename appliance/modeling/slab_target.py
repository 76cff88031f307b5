"""The slab to be filled, and the two ways of writing to it.

Through the descriptor of its memory file: the kernel takes a page, copies, and is done. Through a
mapping: a page that this process has not touched costs a fault, and one that nobody has touched is
filled with zeros first. So the descriptor is two to three times as fast into a slab that is new to
this process, and the mapping is twice as fast into one whose pages are all mapped
(docs/results/weights.md).
"""

import os
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class SlabTarget:
    """A writable slab."""

    view: memoryview
    """All of it, mapped (or any other buffer)."""
    fd: int | None = None
    """Its memory file; None: write through `view`, as for a buffer without one or for a mapping
    whose pages are in place."""

    def write(self, offset: int, data: memoryview) -> None:
        """Put bytes into place, without holding the interpreter lock. Raises `OSError` when there
        is no memory for them."""
        if self.fd is None:
            end = offset + len(data)
            np.copyto(np.frombuffer(self.view[offset:end], np.uint8), np.frombuffer(data, np.uint8))
            return
        while data:
            count = os.pwrite(self.fd, data, offset)
            data, offset = data[count:], offset + count
