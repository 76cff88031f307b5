"""What `--roles` and [standby] mean, and how mistakes are worded (R20)."""

from typing import Any

import pytest

from appliance.config import ConfigError, load
from appliance.core.types import Role
from appliance.devices import DevicePlan, plan_devices
from appliance.staff import (
    controller_settings,
    has_controller,
    notes_on_roles,
    parse_roles,
    staffed,
)

P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED


def staff(spec: str, **sections: dict[str, Any]) -> DevicePlan:
    devices = plan_devices(spec, cores=2, count_gpus=lambda: 0)
    return staffed(devices, load(None, sections))


@pytest.mark.parametrize(
    ("text", "roles"),
    [
        ("mixed", (M, M, M, M)),
        ("auto", (M, M, M, M)),
        ("decode", (D, D, D, D)),
        ("prefill,prefill,decode,decode", (P, P, D, D)),
        (" Prefill, decode ,MIXED,mixed", (P, D, M, M)),
    ],
)
def test_roles_are_one_per_worker_or_one_for_all(text: str, roles: tuple[Role, ...]) -> None:
    assert parse_roles(text, 4) == roles


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prefill,decode", r"names 2 roles for 4 workers; write one for each \(prefill,prefill,"),
        ("prefill,decode,mixed,mixed,mixed", "names 5 roles for 4 workers"),
        ("prefil,decode,decode,decode", "'prefil' is not a role; did you mean prefill?"),
        ("zzz", "'zzz' is not a role; write prefill, decode, mixed, or auto alone"),
        ("auto,decode,decode,decode", "'auto' is not a role"),
        ("", "'' is not a role"),
    ],
)
def test_R20_a_mistake_names_the_key_the_flag_and_the_fix(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=r"roles.initial = .* \(--roles\): " + words):
        parse_roles(text, 4)


def test_standby_workers_come_after_the_others_and_are_parked() -> None:
    plan = staff("paced:2", roles={"initial": "prefill,decode"}, standby={"workers": 2})
    assert [(w.id, w.devices, w.role, w.parked) for w in plan.workers] == [
        (0, ("paced:0",), P, False),
        (1, ("paced:1",), D, False),
        (2, ("paced:2",), M, True),
        (3, ("paced:3",), M, True),
    ]
    assert [w.devices for w in staff("cpu:1", standby={"workers": 1}).workers] == [("cpu",)] * 2


def test_R20_too_many_standby_workers_are_refused_with_a_number_that_fits() -> None:
    with pytest.raises(ConfigError, match=r"standby.workers = 3: .* write at most 1"):
        staff("paced:63", standby={"workers": 3})


def test_the_controller_is_on_where_auto_or_on_is_said() -> None:
    cases = [("auto", "auto", True), ("mixed", "auto", False), ("mixed", "on", True)]
    cases += [("auto", "off", False), ("decode", "auto", False)]
    for initial, controller, on in cases:
        config = load(None, {"roles": {"initial": initial, "controller": controller}})
        assert has_controller(config) is on, (initial, controller)


def test_a_phase_that_nobody_prefers_is_noted() -> None:
    (note,) = notes_on_roles(staff("paced:2", roles={"initial": "prefill"}).workers)
    assert "every worker prefers prefill, so decode is served by them too" in note
    for text in ("mixed", "prefill,decode", "mixed,decode"):
        assert notes_on_roles(staff("paced:2", roles={"initial": text}).workers) == []


def test_workers_that_may_be_started_later_come_last_and_are_no_workers_yet() -> None:
    plan = staff("paced:2", standby={"workers": 1, "add": 2})
    assert [(w.id, w.parked) for w in plan.workers] == [(0, False), (1, False), (2, True)]
    assert [(w.id, w.devices, w.parked) for w in plan.spares] == [
        (3, ("paced:3",), False),
        (4, ("paced:4",), False),
    ]
    assert plan.most == 5


@pytest.mark.parametrize(
    ("standby", "words"),
    [
        ({"workers": 2, "add": 62}, r"standby.add = 62: .* write at most 60"),
        ({"min_workers": 3}, r"standby.min_workers = 3: .* write at most 2"),
        ({"max_workers": 1}, r"standby.max_workers = 1 is less than the 2 that begin"),
        ({"min_workers": 2, "max_workers": 1}, r"less than standby.min_workers = 2"),
    ],
)
def test_R20_bounds_that_contradict_each_other_are_refused(
    standby: dict[str, int], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        staff("paced:2", standby=standby)


def test_scaling_alone_is_a_controller_that_leaves_the_roles() -> None:
    def told(roles: dict[str, object], **standby: object) -> dict[str, object] | None:
        config = load(None, {"roles": roles, "standby": standby})
        return dict(controller_settings(config)) if has_controller(config) else None

    assert told({}, workers=1) is None
    assert told({"scale": "on"}) == {"scale": "on", "flips": False}
    assert told({"scale": "on", "initial": "auto"}, min_workers=2) == {
        "scale": "on",
        "min_workers": 2,
    }
    assert told({"initial": "auto", "settings": {"dwell": 4.0}}) == {"dwell": 4.0}
    assert told({"scale": "on", "controller": "off"}) is None
