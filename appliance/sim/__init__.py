"""The simulator: the schedulers of the product against a virtual clock and a world that alone knows
how long answers are."""
