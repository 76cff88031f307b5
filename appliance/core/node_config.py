"""The numbers that a Dispatcher is built with."""

from typing import Literal

from appliance.core.step_model import StepCoefficients
from appliance.core.types import Record, WorkerSpec


class DispatcherConfig(Record, frozen=True, kw_only=True):
    """Bounds and times of a Dispatcher; seconds, requests, tokens."""

    max_model_len: int
    max_queue: int = 1024
    """Requests that may wait unplaced before new ones are turned away."""
    max_queue_tokens: int = 1_000_000
    """Prompt tokens that may wait; one request may always wait alone."""
    queue_ahead: int = 4
    """Requests placed at a worker beyond what it can run, so that it never idles for a round
    trip."""
    respawn_backoff: float = 0.1
    """Pause before the first respawn; doubled with every further death in a row."""
    respawn_backoff_max: float = 10.0
    quarantine_deaths: int = 3
    """Deaths in a row, without serving healthily between, that end the respawning."""
    healthy_seconds: float = 10.0
    """An incarnation that still finishes steps (or idles) this long after it came up was
    healthy."""
    poison_deaths: int = 2
    """Deaths at which a request must have been present to be suspected."""
    trial_steps: int = 4
    """Steps with tokens of a suspect after which its first trial acquits it."""
    max_trials: int = 3
    """Trials of one request; the last goes on to the end of its answer."""
    spared_deaths: int = 2
    """Deaths of workers that had not answered its assignment, which a request is not blamed for."""
    max_refusals: int = 8
    """Refusals by workers after which a request ends with the last refusal's error."""
    refusal_pause: float = 0.05
    """A worker that refused a request may be asked again after this pause even if nothing changed;
    doubled with every refusal."""
    prefill_ahead: int = 4
    """Steps of prompt tokens placed at a worker whose role is prefill before others wait."""
    lease_seconds: float = 10.0
    """How long a source keeps the KV of a stopped sequence for its target."""
    move_pause: float = 0.2
    """After a failed move of a request, or a worker's refusal of one; doubled each time in a row,
    at most `move_pause_max`."""
    move_pause_max: float = 10.0
    drain_seconds: float = 2.0
    """Time for migrations before a flip; what has not moved by then stays."""
    wind_down: Literal["migrate", "wait"] = "migrate"
    """What a worker that will flip does with its answers: move them elsewhere, or finish them."""
    flip_seconds: float = 5.0
    """A worker that has not taken its new role by then makes the flip be rolled back."""
    park_seconds: float = 30.0
    """A worker that still has work by then is not parked."""
    spares: tuple[WorkerSpec, ...] = ()
    """Workers that the controller may start when those there are do not suffice."""
    steps: StepCoefficients | None = None
    """What a profile found about the duration of steps; None: they are learnt from the first."""
    prefix_pull: bool = True
    """Copy cached blocks from a peer when that is predicted to be cheaper than computing them."""
    block_bytes: int = 0
    """Bytes of one KV block, to predict a copy; 0: not known, nothing is copied."""
    pull_gain: float = 1.0
    """A copy must be predicted to take less than this share of the time to compute."""
    retry_after_min: float = 1.0
    retry_after_max: float = 60.0
