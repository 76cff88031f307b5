"""docs/hyperflexis.md lists the settings that there are, with their defaults."""

import re
from pathlib import Path

from msgspec.structs import fields

from appliance.policy.hyperflexis_budget import HyperflexisSettings

PAGE = Path(__file__).parents[2] / "docs" / "hyperflexis.md"


def test_the_page_lists_every_setting_with_its_default() -> None:
    table = PAGE.read_text().split("## Settings")[1].split("## Limits")[0]
    listed = dict(re.findall(r"^\| `(\w+)` \| (\S+) \|", table, re.MULTILINE))
    known = {each.name: each.default for each in fields(HyperflexisSettings)}
    assert listed == {
        name: str(default).lower() if isinstance(default, bool) else str(default)
        for name, default in known.items()
    }


def test_the_page_names_no_setting_that_is_not_there() -> None:
    known = {each.name for each in fields(HyperflexisSettings)}
    unknowns = PAGE.read_text().split("## Unknowns")[1].split("## Settings")[0]
    last_cells = [row.split("|")[3] for row in unknowns.splitlines() if row.startswith("| ")][2:]
    named = set(re.findall(r"`(\w+)`", " ".join(last_cells))) - {"on_miss"}
    assert named == known
