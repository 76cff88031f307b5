"""From the C sources beside this file to a shared library in the user's cache directory.

The library's name is a hash of everything its bits follow from: sources, flags, compiler, the
processor's features. So it is built once per machine and never used on another. Whoever comes first
builds it, under a lock, into a file of another name that is then moved into place; the others wait
for the lock. Needs no header but the compiler's own and takes two or three seconds.

This file imports neither torch nor numpy: the node looks here before any worker exists.
"""

import fcntl
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

from appliance.core.types import Record

SOURCES = ("forward.c", "attention.h", "products.h", "vectors.h")
"""The first is compiled and includes the others."""
COMPILERS = ("cc", "gcc", "clang")
FLAGS = (
    "-std=gnu11", "-O2", "-ftree-vectorize", "-ffp-contract=off", "-fno-math-errno", "-fPIC",
    "-shared",
)  # fmt: skip
"""No fast math and no contraction: the order of every sum is that of the text."""
BUILD_SECONDS = 60.0
_CPUINFO = Path("/proc/cpuinfo")
_CPU_LINES = ("flags", "features", "model name", "cpu part", "isa")


class NativeUnavailable(Exception):
    """There are no native kernels here; the text says why."""


class Library(Record, frozen=True, kw_only=True):
    """A built library."""

    path: Path
    compiler: str
    fresh: bool
    """It was built just now, not found."""


def ensure_built(
    *, environ: Mapping[str, str] | None = None, sources: Path | None = None
) -> Library:
    """The library for this machine, built if need be. Raises `NativeUnavailable`.

    The compiler is `$CC`, else the first of `COMPILERS` on the path."""
    environ = os.environ if environ is None else environ
    sources = Path(__file__).parent if sources is None else sources
    command = find_compiler(environ)
    try:
        texts = [(sources / name).read_bytes() for name in SOURCES]
        directory = cache_directory(environ)
        path = directory / f"kernels-{_fingerprint(command, texts)}.so"
        if path.is_file():
            return Library(path=path, compiler=shlex.join(command), fresh=False)
        with _locked(directory / "build.lock"):
            fresh = not path.is_file()
            if fresh:
                _build(command, sources / SOURCES[0], path)
    except OSError as error:
        raise NativeUnavailable(f"cannot build the kernels: {error}") from error
    return Library(path=path, compiler=shlex.join(command), fresh=fresh)


def check_threads(threads: int) -> None:
    """Raises `NativeUnavailable` for more than one: the kernels know one thread."""
    if threads != 1:
        raise NativeUnavailable(
            f"devices.threads is {threads}, the native kernels run on one thread"
        )


def find_compiler(environ: Mapping[str, str]) -> list[str]:
    """The command of the C compiler, its program as a full path. Raises `NativeUnavailable`."""
    chosen = shlex.split(environ.get("CC", ""))
    for name in chosen[:1] or COMPILERS:
        program = shutil.which(name, path=environ.get("PATH"))
        if program is not None:
            return [program, *chosen[1:]]
    looked = chosen[0] + " (from CC)" if chosen else ", ".join(COMPILERS)
    raise NativeUnavailable(f"no C compiler found, looked for {looked}")


def cache_directory(environ: Mapping[str, str]) -> Path:
    """A directory of this user alone: in the cache directory, else in the temporary one.

    Raises `NativeUnavailable` when there is none: code that others could write is not loaded."""
    home = environ.get("HOME", "")
    base = environ.get("XDG_CACHE_HOME") or (f"{home}/.cache" if home else "")
    own = Path(tempfile.gettempdir()) / f"appliance-kernels-{os.getuid()}"
    refused = []
    for directory in ([Path(base) / "appliance" / "kernels"] if base else []) + [own]:
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = directory.lstat()
        except OSError as error:
            refused.append(f"{directory}: {error.strerror}")
            continue
        private = status.st_uid == os.getuid() and not status.st_mode & 0o022
        if stat.S_ISDIR(status.st_mode) and private and os.access(directory, os.W_OK):
            return directory
        refused.append(f"{directory}: not a writable directory of this user alone")
    raise NativeUnavailable(f"no directory for the built kernels ({'; '.join(refused)})")


def _build(command: Sequence[str], source: Path, path: Path) -> None:
    """Compile for this very processor, or for what `command` names; for any of its kind where the
    compiler does not know it."""
    said = ""
    named = any(word.startswith(("-march=", "-mcpu=")) for word in command)
    for tuning in ((),) if named else (("-march=native",), ("-mcpu=native",), ()):
        handle, temporary = tempfile.mkstemp(suffix=".so", dir=path.parent)
        os.close(handle)
        try:
            done = subprocess.run(
                [*command, *FLAGS, *tuning, "-o", temporary, str(source)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=BUILD_SECONDS,
                check=False,
            )
            if done.returncode == 0:
                os.replace(temporary, path)
                return
            said = said or _first_error(done.stderr) or f"exit status {done.returncode}"
        except subprocess.TimeoutExpired as error:
            raise NativeUnavailable(f"{command[0]} took over {BUILD_SECONDS:.0f} s") from error
        finally:
            Path(temporary).unlink(missing_ok=True)
    raise NativeUnavailable(f"{command[0]} failed: {said}")


def _first_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[0] if lines else "")


def _fingerprint(command: Sequence[str], texts: Sequence[bytes]) -> str:
    program = Path(command[0]).resolve()
    status = program.stat()
    digest = blake2b(digest_size=12)
    parts = [*FLAGS, *command, str(program), str(status.st_size), str(status.st_mtime_ns)]
    for part in (*parts, platform.machine(), *_cpu(_CPUINFO)):
        digest.update(part.encode() + b"\0")
    for text in texts:
        digest.update(text + b"\0")
    return digest.hexdigest()


def _cpu(path: Path) -> Iterator[str]:
    """What the kernel says of the first processor's kind."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if not line.strip():
                return
            if line.lower().startswith(_CPU_LINES):
                yield line.strip()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
