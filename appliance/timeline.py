"""When each stage of the start-up was reached, in seconds since the process was created.

The clock starts with the process and not with the first line of Python: the kernel's record of the
start is compared with the same clock now (its resolution is a hundredth of a second).
"""

import os
import time
from operator import itemgetter
from pathlib import Path


def process_age() -> float:
    """Seconds since this process was created."""
    stat = Path("/proc/self/stat").read_text()
    ticks = int(stat[stat.rindex(")") + 2 :].split()[19])  # field 22, starttime
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


class Timeline:
    """Stages in the order in which they were reached (noted late or not)."""

    def __init__(self) -> None:
        self._zero = time.monotonic() - process_age()
        self.stages: list[tuple[str, float]] = []
        """(name, seconds since the process was created)"""

    def reached(self, stage: str, *, at: float | None = None) -> float:
        """Note that `stage` is done (now, or `at` on the monotonic clock); its time."""
        seconds = (time.monotonic() if at is None else at) - self._zero
        self.stages.append((stage, seconds))
        self.stages.sort(key=itemgetter(1))
        return seconds
