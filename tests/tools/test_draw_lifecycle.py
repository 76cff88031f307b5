"""The diagrams in the document are those of the tables."""

from appliance.core.lifecycle import REQUEST_MOVES
from tools.draw_lifecycle import DOCUMENT, diagram, updated


def test_the_document_shows_the_tables_as_they_are() -> None:
    text = DOCUMENT.read_text()
    assert updated(text) == text, "run: python tools/draw_lifecycle.py --write"
    assert text.count("stateDiagram-v2") == 2


def test_a_diagram_has_one_arrow_per_move_and_the_ends() -> None:
    lines = diagram(REQUEST_MOVES).splitlines()
    assert len(lines) == 3 + sum(len(new) for new in REQUEST_MOVES.values())
    assert "    [*] --> waiting" in lines
    assert "    ended --> [*]" in lines
    assert "    assigned --> decoding" in lines
