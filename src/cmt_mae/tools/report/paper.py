"""The paper's own tables 1 to 5, from paper.yaml beside this file. Nothing there was measured by us."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml

ARCHITECTURES = {"B": "ViT-B/16", "L": "ViT-L/16"}
_content: dict[str, Any] = yaml.safe_load(
    (resources.files("cmt_mae.tools.report") / "paper.yaml").read_text(encoding="utf-8")
)
SOURCE: str = _content["source"]
PROTOCOLS: dict[str, str] = _content["protocols"]
"""Task -> what the paper says of its protocol, and what it leaves open."""


@dataclass(frozen=True)
class PaperNumber:
    """One number as the paper prints it."""

    table: int
    """1 to 5."""
    method: str
    """As the table names it; the rows of tables 4 and 5 say what they leave out."""
    architecture: str
    """As the table says, which is not always what the number was measured with (see doubts)."""
    epochs: int | None
    """Of pre-training; None where the table does not say."""
    task: str
    """linear, finetune, coco, ade20k or davis."""
    metric: str
    """Named as in our results: top1, box/AP, mask/AP, mIoU, J&F, J_mean, F_mean."""
    value: float
    """In percent."""
    doubts: tuple[str, ...] = ()
    """Why the number may stand for something else than its row says, as far as is known."""


def paper_numbers() -> list[PaperNumber]:
    """Every number of tables 1 to 5, in the order in which the paper prints them."""
    found = []
    for table, content in _content["tables"].items():
        columns = [column.split() for column in content["columns"]]
        for method, size, epochs, *values in content["rows"]:
            for (task, metric), value in zip(columns, values, strict=True):
                if value is not None:
                    place = [table, method, size, epochs, task]
                    doubts = tuple(one["text"] for one in _content["doubts"] if place in one["of"])
                    row = (table, method, ARCHITECTURES[size], epochs)
                    found.append(PaperNumber(*row, task, metric, value, doubts))
    return found
