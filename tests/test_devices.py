"""`--devices`: what it means, and how a wrong one is refused (R20)."""

import re

import pytest

from appliance.config import ConfigError
from appliance.devices import DevicePlan, plan_devices


def plan(spec: str, *, cores: int = 4, gpus: int = 0) -> DevicePlan:
    return plan_devices(spec, cores=cores, count_gpus=lambda: gpus)


@pytest.mark.parametrize(
    ("spec", "kind", "devices"),
    [
        ("cpu:3", "cpu", ["cpu"] * 3),
        ("cpu", "cpu", ["cpu"] * 2),
        ("paced:2", "paced", ["paced:0", "paced:1"]),
        ("paced", "paced", ["paced:0"]),
        ("auto", "cpu", ["cpu"] * 2),
    ],
)
def test_workers_are_one_per_device(spec: str, kind: str, devices: list[str]) -> None:
    found = plan(spec)
    assert found.kind == kind
    assert [worker.devices for worker in found.workers] == [(device,) for device in devices]
    assert [worker.id for worker in found.workers] == list(range(len(devices)))


def test_auto_takes_two_workers_or_one_per_core_and_names_cards_that_stay_idle() -> None:
    assert len(plan("auto", cores=1).workers) == 1
    assert "no CUDA card" in plan("auto").why
    beside = plan("auto", gpus=3)
    assert beside.kind == "cpu"
    assert "3 CUDA cards stay idle" in beside.why


def test_a_profile_belongs_to_the_paced_engine() -> None:
    found = plan("paced:4@h100-8b")
    assert (found.profile, found.engine, len(found.workers)) == ("h100-8b", "paced", 4)
    assert plan("cpu:1").engine == "torch"
    assert plan("paced:1").profile == "h200-8b"


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("gpu:1", "write auto, cpu:2, paced:4 or paced:4@h200-8b"),
        ("", "write auto, cpu:2, paced:4 or paced:4@h200-8b"),
        ("cpu:0", "the number of workers must be 1 to 64"),
        ("paced:9999", "the number of workers must be 1 to 64"),
        ("paced:2@b1000", "unknown device profile 'b1000'; use one of: cpu, h100-8b, h200-8b"),
        ("cpu:1@h200-8b", "only paced takes a @PROFILE"),
        ("cuda:0", "does not compute on CUDA devices (none is visible on this machine); use"),
        ("cuda:x", "write auto, cpu:2, paced:4 or paced:4@h200-8b"),
    ],
)
def test_R20_a_wrong_device_is_refused_with_the_fix(spec: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        plan(spec)
    assert repr(spec) in str(caught.value)


def test_R20_cards_that_are_there_are_counted_in_the_refusal() -> None:
    with pytest.raises(ConfigError, match=r"\(2 are visible\); use --devices cpu:2"):
        plan("cuda:0,1", gpus=2)
