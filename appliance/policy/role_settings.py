"""Settings of the controller of roles and of who is in service
(`appliance.policy.role_control`)."""

from typing import Annotated, Literal

import msgspec

Seconds = Annotated[float, msgspec.Meta(ge=0)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
Share = Annotated[float, msgspec.Meta(gt=0, le=10)]
Count = Annotated[int, msgspec.Meta(ge=0)]


class RoleSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds, and shares of a worker's time (pressure)."""

    interval: Positive = 0.5
    window: Positive = 5.0
    high: Share = 0.9
    """Above this pressure something changes."""
    low: Share = 0.45
    """Below this pressure of mixed workers alone roles are given up."""
    gain: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.15
    """Share of the pressure that a flip must save."""
    confirm: Annotated[int, msgspec.Meta(ge=1)] = 2
    dwell: Seconds = 10.0
    cooldown: Seconds = 3.0
    """Between two flips."""
    hold: Seconds = 10.0
    horizon: Positive = 10.0
    flip_seconds: Seconds = 0.05
    """What a change of role costs a worker beside the sequences that must move."""
    move_seconds: Seconds = 0.01
    """What each of those costs it."""
    flips: bool = True
    """Roles may change; without, only who is in service does."""
    mixed: bool = True
    """Mixed workers are allowed; without them at least one worker of each role stays."""
    chunk: Annotated[int, msgspec.Meta(ge=1)] | Literal["auto", "full", "fit"] = "auto"
    """Prompt tokens of a step beside decodes: a number, "full" steps, or fitted by the policy into
    the slack of the decodes; "auto": as the policy does it."""

    scale: Literal["auto", "on", "off"] = "auto"
    """Workers are woken, parked and added: "auto" where some stand by at the start or could be
    added."""
    min_workers: Count = 0
    """Never fewer in service; 0: with "auto" as many as began in service, with "on" one."""
    max_workers: Count = 0
    """Never more in service; 0: all there are."""
    attainment: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.9
    """A smaller share of the answers of `attainment_window` within their targets asks for more
    workers."""
    attainment_window: Positive = 10.0
    enough: Annotated[int, msgspec.Meta(ge=1)] = 10
    """Answers with targets that such a share needs."""
    infeasible: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    """A larger share of requests that wait and can no longer start in time, among those that came
    in `window`, asks for more workers."""
    out_above: Share = 0.3
    """Below this level late requests and missed targets are not put down to too few workers."""
    out_confirm: Annotated[int, msgspec.Meta(ge=1)] = 3
    """Times in a row that more workers must be asked for."""
    out_to: Share = 0.75
    """Workers are woken until the pressure is predicted to be below this."""
    in_hold: Seconds = 30.0
    """The smaller number of workers must have sufficed for so long before one is parked."""
    in_below: Share = 0.6
    """It suffices where its pressure stays below this."""
    wake_cooldown: Seconds = 3.0
    add_cooldown: Seconds = 10.0
    park_cooldown: Seconds = 10.0
    """Between two such actions of one kind."""
    wake_seconds: Seconds = 0.05
    add_seconds: Seconds = 10.0
    """What waking and adding cost: time of a worker that serves nobody."""
