"""The address: taken before anything is loaded, so that a port in use is found at once. And how
many connections the process may have."""

import errno
import resource
import socket

_ADDRESS_FIX = (
    "set server.host (--host) to an address of this machine, 127.0.0.1 for this machine only"
)
BACKLOG = 1024
"""Connections that the kernel keeps while the server still starts."""

RESERVED_FILES = 256
"""Descriptors for everything that is not a client: workers, slabs, logs, the journal."""


class CannotServe(Exception):
    """The server cannot begin, or cannot go on; the text names cause and fix."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `CannotServe` when the address cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise CannotServe(
            f"cannot listen on host {host!r}: {error.strerror}; {_ADDRESS_FIX}"
        ) from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise CannotServe(
            f"cannot listen on {host}:{port}: {error.strerror}; {_fix(error)}"
        ) from error
    listener.setblocking(False)
    return listener


def room_for(connections: int) -> int:
    """Raise this process's own limit on open files so that so many clients fit; how many do."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + RESERVED_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    if soft == resource.RLIM_INFINITY:
        return connections
    return max(1, min(connections, soft - RESERVED_FILES))


def url_of(listener: socket.socket) -> str:
    """Where a client on this machine finds it."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _fix(error: OSError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return (
                "stop what uses the port, or set server.port (--port) to another one, 0 for any "
                "free one"
            )
        case errno.EACCES:
            return "set server.port (--port) to 1024 or above, or give this user the right to it"
        case _:
            return _ADDRESS_FIX
