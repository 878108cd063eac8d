"""Imports run one way: the table of rooms on the design page is what the code does; no circles."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCE = REPOSITORY / "src" / "cmt_mae"
ROWS = re.compile(r"^\| `(\w+)/` \| .+ \| (.+) \|$", re.M)


def module_name(path: Path, source: Path) -> str:
    """``a/b.py`` -> ``a.b``, below the package; a package's own file is the package."""
    parts = path.relative_to(source).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: Path) -> dict[str, set[str]]:
    """Module -> modules of ours that it imports at any place; TYPE_CHECKING blocks are no imports."""
    modules = {module_name(path, source): path for path in source.rglob("*.py")}
    found: dict[str, set[str]] = {}
    for name, path in modules.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        unseen = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
            for inner in ast.walk(node)
        }
        found[name] = set()
        for node in ast.walk(tree):
            names: list[tuple[str, str]] = []  # (module or name in it, module)
            if id(node) in unseen:
                continue
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [(f"{node.module}.{alias.name}", node.module) for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [(alias.name, alias.name) for alias in node.names]
            for longer, shorter in names:
                for wanted in (longer, shorter):
                    head, _, below = wanted.partition(".")
                    if head == "cmt_mae" and below in modules:
                        found[name].add(below)
                        break
        found[name] -= {name, ""}
    return found


def room(module: str) -> str:
    return module.partition(".")[0]


def allowed_rooms() -> dict[str, set[str]]:
    page = (REPOSITORY / "docs" / "design.md").read_text(encoding="utf-8")
    return {name: set(re.findall(r"`(\w+)`", cell)) for name, cell in ROWS.findall(page)}


def against_the_rule(
    found: dict[str, set[str]], allowed: dict[str, set[str]]
) -> set[tuple[str, str]]:
    return {
        (module, other)
        for module, others in found.items()
        for other in others
        if room(module) in allowed
        and room(other) != room(module)
        and room(other) not in allowed[room(module)]
    }


def test_every_room_imports_what_the_page_allows() -> None:
    allowed = allowed_rooms()
    assert set(allowed) == {p.parent.name for p in SOURCE.glob("*/__init__.py")}
    assert against_the_rule(imports(SOURCE), allowed) == set()


def test_the_page_itself_runs_one_way() -> None:
    tuple(
        graphlib.TopologicalSorter(allowed_rooms()).static_order()
    )  # CycleError where it does not


def test_no_module_imports_itself_in_a_circle() -> None:
    tuple(graphlib.TopologicalSorter(imports(SOURCE)).static_order())


def test_what_the_page_forbids_is_seen(tmp_path: Path) -> None:
    for name, text in {
        "method/a.py": "def f():\n    from cmt_mae.data.crops import crop\n",
        "data/crops.py": "from cmt_mae import method\nimport cmt_mae.method.a\n",
        "data/ok.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import cmt_mae.tools.x\n",
        "tools/x.py": "",
        "method/__init__.py": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = imports(tmp_path)
    forbidden = {("method.a", "data.crops"), ("data.crops", "method.a"), ("data.crops", "method")}
    assert against_the_rule(found, {"method": set(), "data": set()}) == forbidden
    with pytest.raises(graphlib.CycleError):
        tuple(graphlib.TopologicalSorter(found).static_order())
