"""Many pieces of one long job on a few threads, with word of progress.

The work of a piece is a system call or a copy that releases the interpreter lock, so threads run
side by side, and the process can show signs of life meanwhile.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

Piece = TypeVar("Piece")
Progress = Callable[[int, int, float], None]
"""Called with (bytes done, bytes in all, seconds so far)."""
PROGRESS_SECONDS = 1.0


def nothing(*_: object) -> None:
    """Progress that nobody looks at."""


def run_pieces(
    pieces: Sequence[Piece],
    work: Callable[[Piece], int],
    *,
    num_bytes: int,
    threads: int,
    progress: Progress = nothing,
) -> None:
    """Do `work` (which returns the bytes it did) for every piece, at most `threads` at one time;
    `progress` is called every `PROGRESS_SECONDS` until all `num_bytes` are done.

    Raises the first error of a piece, after those under way have ended; no further one begins."""
    began, done = time.monotonic(), 0
    with ThreadPoolExecutor(max(1, threads), thread_name_prefix="pieces") as pool:
        pending = {pool.submit(work, piece) for piece in pieces}
        try:
            while pending:
                ended, pending = wait(pending, PROGRESS_SECONDS, return_when=FIRST_EXCEPTION)
                done += sum(piece.result() for piece in ended)
                if pending:
                    progress(done, num_bytes, time.monotonic() - began)
        finally:
            pool.shutdown(cancel_futures=True)
