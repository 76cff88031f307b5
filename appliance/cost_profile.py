"""The file that `appliance profile` writes and `devices.cost_profile` names: how long the steps of
a device last with a model, as JSON."""

from pathlib import Path

import msgspec

from appliance.config import ConfigError
from appliance.core.step_model import PredictionError, Seen, StepCoefficients
from appliance.core.types import Record

FORMAT = "appliance step profile 1"


class CostProfile(Record, frozen=True, kw_only=True):
    """What was measured, and what was made of it. Seconds and counts."""

    format: str = FORMAT
    devices: str
    """As in `devices.spec`."""
    model: str
    dtype: str
    coefficients: StepCoefficients
    error: PredictionError
    """Of the fit, over the steps that were measured."""
    seen: tuple[Seen, ...] = ()


def write_profile(profile: CostProfile, path: Path) -> None:
    """As indented JSON. Raises `OSError`."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(profile), indent=1) + b"\n")


def load_coefficients(path: str) -> StepCoefficients | None:
    """What the file at `devices.cost_profile` says; None for an empty path. Raises `ConfigError`
    for a file that cannot be read or is none of ours."""
    if not path:
        return None
    fix = "write one with: appliance profile --json FILE"
    try:
        profile = msgspec.json.decode(Path(path).read_bytes(), type=CostProfile)
    except OSError as error:
        raise ConfigError(f"devices.cost_profile = {path!r}: {error.strerror}; {fix}") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"devices.cost_profile = {path!r}: {error}; {fix}") from error
    if profile.format != FORMAT:
        raise ConfigError(
            f"devices.cost_profile = {path!r}: the format is {profile.format!r} and not "
            f"{FORMAT!r}; {fix}"
        )
    _check(profile.coefficients, path)
    return profile.coefficients


def _check(found: StepCoefficients, path: str) -> None:
    """Steps must take time, and never less for more work."""
    for plane in found.planes:
        if not all(0.0 <= k < float("inf") for k in plane):
            raise ConfigError(
                f"devices.cost_profile = {path!r}: coefficients.planes must be numbers of at least "
                "0; write the file again with: appliance profile --json FILE"
            )
    if max(plane[0] for plane in found.planes) <= 0.0:
        raise ConfigError(
            f"devices.cost_profile = {path!r}: an empty step takes no time in it; write the file "
            "again with: appliance profile --json FILE"
        )
