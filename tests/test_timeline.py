"""The clock of the start-up begins with the process."""

import subprocess
import sys
import time

from appliance.timeline import Timeline, process_age


def test_age_counts_from_the_creation_of_the_process_not_from_the_first_import() -> None:
    script = (
        "import time; time.sleep(0.3); "
        "from appliance.timeline import process_age; print(process_age())"
    )
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    lived = time.monotonic() - begun
    assert 0.28 <= float(done.stdout) <= lived + 0.02


def test_stages_are_kept_in_order_with_growing_times() -> None:
    timeline = Timeline()
    first = timeline.reached("config")
    second = timeline.reached("checkpoint")
    assert timeline.stages == [("config", first), ("checkpoint", second)]
    assert first <= second <= process_age() + 0.02
