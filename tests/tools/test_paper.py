"""The paper's tables as data, against the specification's own text of them."""

import re
from collections import Counter
from pathlib import Path

import pytest

from cmt_mae.tools.report import paper
from cmt_mae.tools.report.paper import PROTOCOLS, paper_numbers

B, L = paper.ARCHITECTURES["B"], paper.ARCHITECTURES["L"]

LP, FT, BOX, MASK, IOU = (
    "linear top1",
    "finetune top1",
    "coco box/AP",
    "coco mask/AP",
    "ade20k mIoU",
)
JF, J, F = "davis J&F", "davis J_mean", "davis F_mean"
Key = tuple[int, str, str, int | None, str]


@pytest.fixture
def texts(shared: Path) -> dict[int, str]:
    """Table number -> its text after the heading, bold marks taken off."""
    section = (shared / "spec.md").read_text().split("## 14.")[1].split("Figures:")[0]
    parts = re.split(r"Table (\d)", section.replace("**", "").replace("\n", " "))[1:]
    return {int(n): text for n, text in zip(parts[::2], parts[1::2], strict=True)}


def values(text: str) -> list[float | None]:
    return [None if v == "-" else float(v) for v in re.findall(r"\d*\.\d+|(?<![\w.])-(?!\w)", text)]


def spec_numbers(texts: dict[int, str]) -> dict[Key, float]:
    found: dict[Key, float | None] = {}

    def add(table, method, architecture, epochs, columns, row):
        assert len(row) == len(columns), (method, row)
        for column, value in zip(columns, row, strict=True):
            found[table, method, architecture, epochs, column] = value

    for entry in texts[1].split(":", 1)[1].strip(" .").split(";"):
        method, epochs, rest = re.fullmatch(
            r"\s*(.+?)(?: \((\d+)(?: ep)?\))? ((?:[\d.]+|-) / .*)", entry
        ).groups()
        b, *large = rest.split(",")
        add(1, method, B, int(epochs) if epochs else None, (LP, FT), values(b))
        for part in large:
            add(1, method, L, int(epochs) if epochs else None, (LP, FT), values(part))
    for entry in texts[2].split(":", 1)[1].strip(" .").split(";"):
        method, rest = re.fullmatch(r"\s*(.+?) ((?:[\d.]+|-) / .*)", entry).groups()
        name, _, epochs = method.partition("-") if method.startswith("MAE-") else (method, "", "")
        add(2, name, B, int(epochs) if epochs else None, (BOX, MASK, IOU), values(rest))
    for entry in texts[3].split(":", 1)[1].strip(" .").split(";"):
        method, size, rest = re.fullmatch(r"\s*(.+)-([BL]) (.*)", entry).groups()
        method = "CMT-MAE" if method == "CMT" else method
        add(3, method, {"B": B, "L": L}[size], None, (JF, J, F), values(rest))
    names = {"none": "without CM and CT", "CM": "CM only", "CT": "CT only", "both": "CM and CT"}
    for entry in texts[4].split("F:", 1)[1].strip(" .").split(";"):
        method, rest = entry.split(None, 1)
        add(4, names[method], B, None, (LP, FT, BOX, MASK, IOU, JF, J, F), values(rest))
    for entry in texts[5].split("J&F:", 1)[1].strip(" .").split(";"):
        alpha, rest = entry.split(None, 1)
        add(5, f"alpha {float(alpha):g}", B, None, (LP, FT, BOX, MASK, IOU, JF), values(rest))
    return {key: value for key, value in found.items() if value is not None}


def test_every_number_is_the_specifications(texts):
    ours = {
        (n.table, n.method, n.architecture, n.epochs, f"{n.task} {n.metric}"): n.value
        for n in paper_numbers()
    }
    assert ours == spec_numbers(texts)
    assert len(ours) == len(paper_numbers())
    assert Counter(key[0] for key in ours) == {1: 35, 2: 35, 3: 18, 4: 32, 5: 42}


def test_every_doubt_stands_at_a_number():
    numbers = paper_numbers()
    places = {(n.table, n.method, n.architecture, n.epochs, n.task) for n in numbers}
    sizes = paper.ARCHITECTURES
    for doubt in paper._content["doubts"]:
        for table, method, size, epochs, task in doubt["of"]:
            assert (table, method, sizes[size], epochs, task) in places
    assert {n.task for n in numbers} == set(PROTOCOLS)
