"""Imported by a fork server: its second fork fails for want of memory."""

import errno
import os

_fork = os.fork
_calls: list[int] = []


def fork() -> int:
    """The kernel's refusal, once."""
    _calls.append(1)
    if len(_calls) == 2:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    return _fork()


os.fork = fork
