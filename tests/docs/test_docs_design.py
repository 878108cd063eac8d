"""The table of rooms on the design page is what the imports are."""

import ast
import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCE = REPOSITORY / "src" / "cmt_mae"
ROWS = re.compile(r"^\| `(\w+)/` \| .+ \| (.+) \|$", re.M)


def imported_rooms(room: Path, rooms: set[str]) -> set[str]:
    """Rooms that a room's files import from at any place, itself left out."""
    found: set[str] = set()
    for path in room.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            parts = (name.split(".") for name in names)
            found |= {p[1] for p in parts if p[0] == "cmt_mae" and len(p) > 1}
    return (found & rooms) - {room.name}


def test_every_room_imports_what_the_page_says() -> None:
    page = (REPOSITORY / "docs" / "design.md").read_text(encoding="utf-8")
    allowed = {room: set(re.findall(r"`(\w+)`", cell)) for room, cell in ROWS.findall(page)}
    rooms = {p.name for p in SOURCE.iterdir() if p.is_dir() and (p / "__init__.py").is_file()}
    assert set(allowed) == rooms
    for room in rooms:
        extra = imported_rooms(SOURCE / room, rooms) - allowed[room]
        assert not extra, f"{room} imports {extra}, which the page does not allow"
    assert imported_rooms(SOURCE / "evaluate", rooms) >= {"data", "training", "backbones"}


def test_what_the_page_forbids_is_seen(tmp_path: Path) -> None:
    room = tmp_path / "method"
    room.mkdir()
    (room / "a.py").write_text("def f():\n    from cmt_mae.data.crops import crop\n")
    (room / "b.py").write_text("from cmt_mae import report\nimport cmt_mae.training.fit\n")
    assert imported_rooms(room, {"data", "report", "training", "method"}) == {
        "data",
        "report",
        "training",
    }
