"""A policy with its roles and settings in one word, for command lines and results::

    NAME[@ROLES][{key=value,key=value}]

    edf                     every worker mixed
    fcfs@2P6D               two workers for prompts, six for decoding (a static P:D ratio)
    all-mixed@2P2D4M        and four mixed ones
    hyperflexis@auto        all mixed at first; the controller changes roles
    all-mixed{chunk=256}    with a setting of the policy

Roles go to the workers in the order of their ids: prompts, then decoding, then mixed."""

import re
from collections.abc import Mapping, Sequence

from msgspec import field

from appliance.core.slots import Policy
from appliance.core.types import Record, Role
from appliance.policy import make_policy
from appliance.policy.settings import PolicySettingsError

_CHOICE = re.compile(r"(?P<name>[^@{}]+)(@(?P<roles>[^@{}]*))?(\{(?P<settings>[^{}]*)\})?")
_ROLES = re.compile(r"(?:(\d+)[Pp])?(?:(\d+)[Dd])?(?:(\d+)[Mm])?")


class PolicyChoice(Record, frozen=True, kw_only=True):
    """One policy, its settings, and the roles that the workers begin with."""

    name: str
    settings: Mapping[str, object] = field(default_factory=dict)
    roles: str = "mixed"
    """"mixed", "auto" (mixed at first, then as the controller says), or counts as in "2P6D"."""

    @property
    def controller(self) -> bool:
        """Whether the automatic controller changes roles."""
        return self.roles == "auto"

    @property
    def word(self) -> str:
        """The choice as it is written; `parse_choice` reads it back."""
        text = self.name if self.roles == "mixed" else f"{self.name}@{self.roles}"
        if not self.settings:
            return text
        settings = ",".join(f"{key}={_written(value)}" for key, value in self.settings.items())
        return f"{text}{{{settings}}}"

    def role_tuple(self, num_workers: int) -> tuple[Role, ...]:
        """The roles of that many workers. Raises `PolicySettingsError` if the counts do not sum to
        it, or leave a phase to nobody."""
        if self.roles in ("mixed", "auto"):
            return (Role.MIXED,) * num_workers
        counts = _counts(self.roles)
        if sum(counts.values()) != num_workers:
            raise PolicySettingsError(
                f"roles {self.roles!r} are for {sum(counts.values())} workers, and there are "
                f"{num_workers}; write counts that sum to it, such as {_example(num_workers)}"
            )
        return tuple(role for role, count in counts.items() for _ in range(count))

    def make(self, *, role_settings: Mapping[str, object] | None = None) -> Policy:
        """A fresh policy object, with the controller where `roles` is "auto". Raises
        `PolicySettingsError`."""
        roles = (role_settings or {}) if self.controller else None
        return make_policy(self.name, self.settings, roles=roles)


def parse_choice(text: str) -> PolicyChoice:
    """`text` as a choice whose name and settings exist. Raises `PolicySettingsError` with what is
    wrong and the nearest that is known."""
    found = _CHOICE.fullmatch(text.strip())
    if found is None:
        raise PolicySettingsError(
            f"policy {text!r}: want NAME, NAME@ROLES or NAME@ROLES{{key=value,...}}, such as "
            "edf, fcfs@2P6D or all-mixed{chunk=256}"
        )
    roles = found["roles"]
    roles = "mixed" if roles is None else roles.strip()
    if roles.lower() in ("mixed", "auto"):
        roles = roles.lower()
    else:
        roles = "".join(f"{count}{role[0].upper()}" for role, count in _counts(roles).items())
    choice = PolicyChoice(
        name=found["name"].strip(), settings=_settings(found["settings"] or "", text), roles=roles
    )
    choice.make()
    return choice


def parse_choices(text: str) -> tuple[PolicyChoice, ...]:
    """Choices with commas between them. Raises `PolicySettingsError`, also if one is there
    twice."""
    words = re.split(r",(?![^{]*\})", text)
    choices = tuple(parse_choice(word) for word in words)
    written = [choice.word for choice in choices]
    for word in written:
        if written.count(word) > 1:
            raise PolicySettingsError(f"policy {word!r} is named twice")
    return choices


def static_ratios(num_workers: int) -> Sequence[str]:
    """Every division into workers for prompts and workers for decoding, as `roles`."""
    return [f"{each}P{num_workers - each}D" for each in range(1, num_workers)]


def _counts(roles: str) -> dict[Role, int]:
    """Workers by role, those with none left out."""
    found = _ROLES.fullmatch(roles)
    counts = [int(count or 0) for count in found.groups()] if found else []
    if not any(counts):
        raise PolicySettingsError(
            f"roles {roles!r}: want mixed, auto, or counts of prefill, decode and mixed workers "
            "in this order, such as 2P6D or 2P2D4M"
        )
    pairs = zip((Role.PREFILL, Role.DECODE, Role.MIXED), counts, strict=True)
    known = {role: count for role, count in pairs if count}
    if len(known) == 1 and Role.MIXED not in known:
        raise PolicySettingsError(
            f"roles {roles!r} leave a phase to nobody; write both P and D, or M"
        )
    return known


def _settings(text: str, choice: str) -> dict[str, object]:
    settings: dict[str, object] = {}
    for pair in text.split(",") if text.strip() else ():
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or not key or not value:
            raise PolicySettingsError(f"policy {choice!r}: want key=value and found {pair!r}")
        if key in settings:
            raise PolicySettingsError(f"policy {choice!r}: {key!r} is set twice")
        settings[key] = _read(value)
    return settings


def _read(value: str) -> object:
    if value in ("true", "false"):
        return value == "true"
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def _written(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _example(num_workers: int) -> str:
    return f"1P{num_workers - 1}D" if num_workers > 1 else "mixed"
