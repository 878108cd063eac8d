"""Tables in Markdown, for `compare` and `ablate`."""

import re
from collections.abc import Sequence

from cmt_mae.core.text import printable

HTML = {"<": "&lt;", ">": "&gt;"}


def escaped(text: object) -> str:
    """``text`` so that Markdown shows it as it is, in a table's cell too."""
    plain = re.sub(r"&(?=#?\w+;)", "&amp;", printable(str(text)))
    signs = r"[\\`*{}\[\]<>|#~$]|(?<!\w)_|_(?!\w)"  # inside a word an underscore is one
    return re.sub(signs, lambda sign: HTML.get(sign[0], f"\\{sign[0]}"), plain)


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A table of cells that are Markdown already; all columns but the first ``words`` hold numbers."""
    rule = ["---"] * words + ["---:"] * (len(heads) - words)
    return "\n".join("| " + " | ".join(line) + " |" for line in (heads, rule, *rows))
