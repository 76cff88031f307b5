"""The arguments of `appliance bench`, and what they ask for."""

import argparse
import os
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import msgspec

from appliance import __version__
from appliance.bench.points import Offer
from appliance.bench.report import BadReport, check_name
from appliance.bench.target import Target
from appliance.metrics.document import DocumentError, check_output
from appliance.workload.arrivals import ArrivalsError, parse_arrivals
from appliance.workload.lengths import Lengths, LengthTable
from appliance.workload.spec import (
    Calibration,
    SpecError,
    WorkloadSpec,
    class_slos,
    digest,
    load_spec,
)
from appliance.workload.trace_rows import TraceError, read_trace

DEFAULT_SECONDS = 60.0
KEY_VARIABLE = "OPENAI_API_KEY"


class BadOptions(Exception):
    """What was asked for cannot be understood; the text names the option and the fix."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """All options of the command."""
    add = parser.add_argument
    add("--url", required=True, metavar="U", help="the server: http://127.0.0.1:8000")
    add("--workload", default="five", metavar="W", help='"five" or a TOML or JSON file')
    add("--trace", metavar="FILE", help="JSON lines of requests: arrivals, lengths, prefixes")
    add("--rate", type=numbers, default=(), metavar="R", help="requests/s, or several: 5,10,20")
    add("--load", type=numbers, default=(), metavar="L", help="factors of --rate or of the trace")
    add("--seconds", type=float, metavar="S", help="length of a run (60; a trace: all of it)")
    add("--arrivals", metavar="A", help="poisson, gamma:4, phases:20, ... (the workload's)")
    add("--seed", type=whole_numbers, default=(0,), metavar="N", help="one or several: 0,1,2")
    add("--json", type=Path, metavar="OUT", help="write all scores here, run by run")
    add("--outcomes", type=Path, metavar="OUT", help="append every request's fate, a line each")
    add("--resume", action="store_true", help="measure only what --json does not have yet")
    add("--report", type=Path, metavar="OUT", help="write OUT.html or OUT.png with pictures")
    add("--policy-name", metavar="WORDS", help="what the results call the server's policy")
    add("--warm-up", type=float, metavar="S", help="first seconds that do not count")
    add("--drain", type=float, default=120.0, metavar="S", help="wait for open answers (120)")
    add("--timeout", type=float, default=600.0, metavar="S", help="give an answer up (600)")
    add("--model", default="", metavar="NAME", help="model to ask for (the first one listed)")
    add("--key", default="", metavar="K", help=f"API key (else ${KEY_VARIABLE})")
    add("--max-len", type=int, metavar="N", help="longest prompt and answer (the server's limit)")
    add("--no-slo", action="store_true", help="send no targets: for servers that refuse them")
    add("--natural", action="store_true", help="no ignore_eos: the model ends its answers")
    add(
        "--calibrate",
        action="store_true",
        help="targets relative to the unloaded server, measured first",
    )


def numbers(text: str) -> tuple[float, ...]:
    """`5,10,20`"""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: write numbers, as in 5,10,20") from error


def whole_numbers(text: str) -> tuple[int, ...]:
    """`0,1,2`"""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: write whole numbers, as in 0,1,2") from error


def key_of(options: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> str:
    """The API key: the option, else the environment's; empty for none."""
    return str(options.key or environ.get(KEY_VARIABLE, ""))


def offer_of(options: argparse.Namespace) -> Offer:
    """What is to be offered. Raises `BadOptions`."""
    try:
        spec = load_spec(options.workload)
        arrivals = options.arrivals or spec.arrivals
        parse_arrivals(arrivals)
        rows = tuple(read_trace(Path(options.trace))) if options.trace else ()
        if options.report is not None:
            check_name(options.report)
        for flag in ("json", "outcomes", "report"):
            if (path := getattr(options, flag)) is not None:
                check_output(path, flag=f"--{flag}")
    except (SpecError, ArrivalsError, TraceError, BadReport, DocumentError) as error:
        raise BadOptions(str(error)) from error
    warm_up = spec.warm_up_seconds if options.warm_up is None else options.warm_up
    offer = Offer(
        spec=spec,
        seconds=options.seconds,
        warm_up=warm_up,
        arrivals=arrivals,
        rows=rows,
    )
    for name, value in (("--seconds", options.seconds), ("--timeout", options.timeout)):
        if value is not None and not (isfinite(value) and value > 0):
            raise BadOptions(f"{name} {value:g}: must be a finite number above 0")
    for name, value in (("--warm-up", warm_up), ("--drain", options.drain)):
        if not (isfinite(value) and value >= 0):
            raise BadOptions(f"{name} {value:g}: must be a finite number, not negative")
    if offer.seconds is None and not offer.is_timed:
        offer = msgspec.structs.replace(offer, seconds=DEFAULT_SECONDS)
    if offer.seconds is not None and offer.seconds <= warm_up:
        raise BadOptions(
            f"--seconds {offer.seconds:g} with --warm-up {warm_up:g} leaves nothing that counts; "
            "make the run longer or the warm-up shorter"
        )
    return offer


def fitted_offer(offer: Offer, target: Target, *, max_len: int | None) -> tuple[Offer, list[str]]:
    """The offer with lengths that the server can take, and a note where that changes it."""
    limits = [
        limit for limit in (offer.spec.max_len, max_len, target.max_model_len) if limit is not None
    ]
    limit = min((one for one in limits if one > 0), default=0)
    if limit == offer.spec.max_len:
        return offer, []
    spec = msgspec.structs.replace(offer.spec, max_len=limit)
    note = f"prompt and answer together have at most {limit} tokens"
    return msgspec.structs.replace(offer, spec=spec), [note]


def document_spec(
    options: argparse.Namespace,
    offer: Offer,
    target: Target,
    *,
    notes: Sequence[str],
    policy: str,
) -> dict[str, Any]:
    """What was asked, as plain values: the `spec` of the document. What tells two experiments apart
    is all in it; the digests are for what has no words of its own."""
    spec = offer.spec
    whole = msgspec.structs.replace(spec, arrivals=offer.arrivals, warm_up_seconds=offer.warm_up)
    return {
        "workload": spec.name,
        "arrivals": "trace" if offer.is_timed else offer.arrivals,
        "seconds": offer.seconds,
        "warm_up_seconds": offer.warm_up,
        "load_is": load_unit(options, offer),
        "trace": Path(options.trace).name if options.trace else "",
        "max_len": spec.max_len,
        "length_scale": spec.length_scale,
        "max_tokens": spec.max_tokens,
        "slo_scale": spec.slo_scale,
        "natural": options.natural,
        "targets": "none" if options.no_slo else "told",
        "relative": _calibration(offer.calibration),
        "classes": class_targets(spec),
        "shares": {one.name: one.share for one in spec.classes},
        "lengths": {one.name: length_words(one.lengths) for one in spec.classes},
        "workload_digest": digest(whole),
        "trace_digest": digest(offer.rows) if offer.rows else "",
        "model": target.settings.model,
        "server": f"{target.settings.model} at {target.address.url}",
        "policy": policy,
        "prompts": target.settings.route.value,
        "client": f"appliance bench {__version__}",
        "notes": list(notes),
    }


def load_unit(options: argparse.Namespace, offer: Offer) -> str:
    """What the numbers of the loads mean."""
    if options.load:
        return "times the trace's speed" if offer.is_timed else f"times {options.rate[0]:g}/s"
    return "requests/s" if options.rate or not offer.is_timed else "times the trace's speed"


def class_targets(spec: WorkloadSpec) -> dict[str, dict[str, float]]:
    """Targets of each class in milliseconds, those that it has."""
    found: dict[str, dict[str, float]] = {}
    for name, slo in class_slos(spec).items():
        pairs = {"ttft_ms": slo.ttft, "tpot_ms": slo.tpot, "e2e_ms": slo.e2e}
        found[name] = {key: value * 1000 for key, value in pairs.items() if value is not None}
    return found


def length_words(lengths: Lengths) -> Any:
    """Lengths as plain values; a table goes by its name."""
    return lengths.name if isinstance(lengths, LengthTable) else msgspec.to_builtins(lengths)


def _calibration(calibration: Calibration | None) -> dict[str, float] | None:
    if calibration is None:
        return None
    return {"a": calibration.a, "b": calibration.b, "tpot0": calibration.tpot0}
