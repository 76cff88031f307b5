"""What came of a run, judged: attainment, goodput, capacity, recovery. Pure; the benchmark against
a live server and the simulator share it, so that their figures mean the same."""
