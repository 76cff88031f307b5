"""Errors of loading a model."""


class WeightError(ValueError):
    """A checkpoint or a weight slab cannot be used. The message names the file or tensor and the
    fix."""
