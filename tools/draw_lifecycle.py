"""The lifecycle tables of `appliance.core.lifecycle` as diagrams in docs/architecture.md.

    python tools/draw_lifecycle.py           print them
    python tools/draw_lifecycle.py --write   replace those in the document

A test fails when tables and document differ.
"""

import argparse
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from appliance.core.lifecycle import REQUEST_MOVES, WORKER_MOVES

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "architecture.md"
State = TypeVar("State", bound=StrEnum)


def diagram(moves: Mapping[State, AbstractSet[State]]) -> str:
    """A Mermaid state diagram: one line per move, the first and the last state marked."""
    states = list(moves)
    lines = ["stateDiagram-v2", f"    [*] --> {states[0]}"]
    for old in states:
        lines += [f"    {old} --> {new}" for new in states if new in moves[old]]
        if not moves[old]:
            lines.append(f"    {old} --> [*]")
    return "\n".join(lines)


def diagrams() -> dict[str, str]:
    """Name of the table -> its diagram as a fenced block."""
    drawn = {"requests": diagram(REQUEST_MOVES), "workers": diagram(WORKER_MOVES)}
    return {name: f"```mermaid\n{text}\n```" for name, text in drawn.items()}


def updated(document: str) -> str:
    """`document` with the blocks between `<!-- NAME -->` and `<!-- end NAME -->` drawn anew."""
    for name, block in diagrams().items():
        opening, closing = f"<!-- {name} -->", f"<!-- end {name} -->"
        before, _, rest = document.partition(opening)
        _, _, after = rest.partition(closing)
        document = f"{before}{opening}\n{block}\n{closing}{after}"
    return document


def main() -> None:
    """Print, or write into the document."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help="replace them in the document")
    if parser.parse_args().write:
        DOCUMENT.write_text(updated(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print("\n\n".join(diagrams().values()))


if __name__ == "__main__":
    main()
