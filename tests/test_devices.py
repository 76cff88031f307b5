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


def test_auto_takes_one_worker_on_one_core_and_every_card_where_there_are_some() -> None:
    assert len(plan("auto", cores=1).workers) == 1
    cards = plan("auto", gpus=3)
    assert cards.kind == "cuda"
    assert [worker.devices for worker in cards.workers] == [("cuda:0",), ("cuda:1",), ("cuda:2",)]
    assert "3 CUDA cards" in cards.why
    assert "no CUDA card" in plan("auto").why


def test_a_card_may_be_shared_by_two_workers() -> None:
    shared = plan("cuda:0,0", gpus=1)
    assert [worker.devices for worker in shared.workers] == [("cuda:0",), ("cuda:0",)]


def test_a_profile_belongs_to_the_paced_engine() -> None:
    found = plan("paced:4@h100-8b")
    assert (found.profile, found.engine, len(found.workers)) == ("h100-8b", "paced", 4)
    assert plan("cpu:1").engine == "torch"
    assert plan("paced:1").profile == "h200-8b"


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("gpu:1", "write auto, cpu:2, paced:4"),
        ("", "write auto, cpu:2, paced:4"),
        ("cpu:0", "the number of workers must be 1 to 64"),
        ("paced:9999", "the number of workers must be 1 to 64"),
        ("paced:2@b1000", "unknown device profile 'b1000'; use one of: cpu, h100-8b, h200-8b"),
        ("cpu:1@h200-8b", "only paced takes a @PROFILE"),
        ("cuda:0", "no CUDA device is visible on this machine; use --devices cpu:2"),
        ("cuda:x", "write auto, cpu:2, paced:4"),
    ],
)
def test_R20_a_wrong_device_is_refused_with_the_fix(spec: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        plan(spec)
    assert repr(spec) in str(caught.value)


def test_R20_a_card_that_is_not_there_names_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"there is no cuda:5; this machine has cuda:0 to cuda:1"):
        plan("cuda:0,5", gpus=2)
