"""Items from a specification: arrivals, classes, lengths and targets put together."""

from appliance.workload.arrivals import Arrivals, arrival_times, parse_arrivals
from appliance.workload.draws import Draws
from appliance.workload.items import Item
from appliance.workload.lengths import draw_lengths, fitted
from appliance.workload.spec import Calibration, WorkloadSpec


def generate(
    spec: WorkloadSpec,
    *,
    rate: float,
    seconds: float,
    seed: int,
    arrivals: Arrivals | None = None,
    calibration: Calibration | None = None,
) -> list[Item]:
    """The requests of a run of `seconds` at a mean of `rate` requests per second, sorted by `at`.

    `arrivals` and `calibration` stand in for the specification's. The n-th request of a class has
    the same lengths at every rate."""
    kinds = {one.name: one for one in spec.classes}
    times = arrival_times(
        parse_arrivals(spec.arrivals) if arrivals is None else arrivals,
        rate=rate,
        seconds=seconds,
        shares={name: one.share for name, one in kinds.items()},
        seed=seed,
    )
    calibration = calibration or spec.calibration
    draws = {name: Draws(seed, f"lengths/{name}") for name in kinds}
    items = []
    for index, (at, name) in enumerate(times):
        kind = kinds[name]
        prompt, output = fitted(
            *draw_lengths(kind.lengths, draws[name]),
            scale=spec.length_scale,
            max_len=spec.max_len,
        )
        items.append(
            Item(
                index=index,
                at=at,
                class_name=name,
                prompt_tokens=prompt,
                output_tokens=output,
                max_tokens=asked_tokens(spec, prompt, output),
                slo=kind.slo(prompt, calibration=calibration, scale=spec.slo_scale),
            )
        )
    return items


def asked_tokens(spec: WorkloadSpec, prompt: int, output: int) -> int:
    """What the request says as `max_tokens` (see `WorkloadSpec`)."""
    if spec.max_tokens == 0:
        return output
    asked = max(spec.max_tokens, output)
    return max(output, min(asked, spec.max_len - prompt)) if spec.max_len else asked
