"""One word for a policy with its roles and settings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.core.types import Role
from appliance.policy import POLICIES, PolicySettingsError
from appliance.policy.choice import PolicyChoice, parse_choice, parse_choices, static_ratios

P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED


@pytest.mark.parametrize(
    ("text", "name", "settings", "roles"),
    [
        ("edf", "edf", {}, (M, M, M, M)),
        ("fcfs@mixed", "fcfs", {}, (M, M, M, M)),
        ("fcfs@AUTO", "fcfs", {}, (M, M, M, M)),
        ("fcfs@1P3D", "fcfs", {}, (P, D, D, D)),
        ("fcfs@1p1d2m", "fcfs", {}, (P, D, M, M)),
        ("fcfs@1P1D2M{max_waiting=7}", "fcfs", {"max_waiting": 7}, (P, D, M, M)),
        (" llumnix { migrate = false , gap=1e2 } ", "llumnix", {"migrate": False, "gap": 100.0}, 4),
        ("srf{lengths=max_tokens}", "srf", {"lengths": "max_tokens"}, 4),
    ],
)
def test_what_is_written_is_what_is_chosen(
    text: str, name: str, settings: dict[str, object], roles: tuple[Role, ...] | int
) -> None:
    choice = parse_choice(text)
    assert (choice.name, choice.settings) == (name, settings)
    assert choice.role_tuple(4) == ((M,) * roles if isinstance(roles, int) else roles)
    assert choice.controller == ("auto" in text.lower())
    policy = choice.make()
    assert policy.name == name
    assert (policy.dispatch.roles is not None) == choice.controller


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "want NAME"),
        ("edf@", "roles ''"),
        ("edff", "did you mean 'edf'"),
        ("edf@2P", "leave a phase to nobody"),
        ("edf@0P2D", "leave a phase to nobody"),
        ("edf@2D2P", "such as 2P6D"),
        ("edf@many", "such as 2P6D"),
        ("all-mixed{chunk}", "want key=value and found 'chunk'"),
        ("all-mixed{chunk=1,chunk=2}", "'chunk' is set twice"),
        ("all-mixed{chunks=1}", "did you mean 'chunk'"),
        ("all-mixed{chunk=0}", "chunk"),
        ("all-mixed{chunk=1}@2P2D", "want NAME"),
    ],
)
def test_R20_what_makes_no_sense_is_refused_with_words(text: str, words: str) -> None:
    with pytest.raises(PolicySettingsError, match=words):
        parse_choice(text)


def test_roles_that_do_not_fit_the_number_of_workers_are_refused() -> None:
    with pytest.raises(PolicySettingsError, match=r"for 8 workers, and there are 4.*1P3D"):
        parse_choice("fcfs@2P6D").role_tuple(4)


def test_several_with_commas_between_them() -> None:
    choices = parse_choices("fcfs@2P2D,llumnix{gap=1,migrate=true}, srf")
    assert [each.word for each in choices] == ["fcfs@2P2D", "llumnix{gap=1,migrate=true}", "srf"]
    with pytest.raises(PolicySettingsError, match="named twice"):
        parse_choices("fcfs,edf,fcfs")


def test_every_static_ratio_serves_both_phases() -> None:
    assert list(static_ratios(4)) == ["1P3D", "2P2D", "3P1D"]
    for roles in static_ratios(8):
        assert set(PolicyChoice(name="fcfs", roles=roles).role_tuple(8)) == {P, D}


counts = st.integers(1, 9)
written_roles = st.one_of(
    st.sampled_from(["mixed", "auto"]),
    st.builds(lambda p, d, m: f"{p}P{d}D" + (f"{m}M" if m else ""), counts, counts, counts),
)


@given(st.sampled_from(sorted(POLICIES)), written_roles, st.integers(1, 4096), st.booleans())
def test_the_word_of_a_choice_reads_back(name: str, roles: str, number: int, some: bool) -> None:
    known: dict[str, dict[str, object]] = {
        "all-mixed": {"chunk": number},
        "llumnix": {"gap": number / 7, "migrate": number % 2 == 0},
    }
    choice = PolicyChoice(name=name, roles=roles, settings=known.get(name, {}) if some else {})
    assert parse_choice(choice.word) == choice
