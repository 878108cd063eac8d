"""What the site has beyond Markdown: formulas as drawings, functions of the source, the list of results.

Two fences: ``math`` (LaTeX, which GitHub shows too) and ``function`` (a dotted name; the site shows the source as
it is now, with file and line). A name that does not exist fails the build.
"""

import ast
import html
import io
import re
import zlib
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.font_manager import FontProperties
from matplotlib.mathtext import math_to_image
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS, MORE = "Results measured here", "More"


def on_config(config: Any) -> Any:
    """Called by mkdocs: add the fences, and to the navigation every page that mkdocs.yml does not name."""
    fences = [
        {"name": "math", "class": "math", "format": math},
        {"name": "function", "class": "function", "format": function},
    ]
    config["mdx_configs"].setdefault("pymdownx.superfences", {})["custom_fences"] = fences
    named = str(config["nav"])
    docs = REPOSITORY / "docs"
    others = [p.name for p in sorted(docs.glob("*.md")) if f"'{p.name}'" not in named]
    results = [f"results/{p.name}" for p in sorted((docs / "results").glob("*.md"))]
    results.sort(key=lambda name: name != "results/index.md")
    for entry in config["nav"]:
        if RESULTS in entry:
            entry[RESULTS] = results
        if MORE in entry:
            entry[MORE] += others
    return config


def math(source: str, *_: Any, **__: Any) -> str:
    """LaTeX -> an SVG drawing, the same in every browser (MathML looks as good as the reader's fonts)."""
    formula = " ".join(source.split()).replace(r"\frac", r"\dfrac")
    drawn = io.StringIO()
    with rc_context({"mathtext.fontset": "cm", "svg.fonttype": "path", "svg.hashsalt": formula}):
        math_to_image(f"${formula}$", drawn, format="svg", prop=FontProperties(size=15))
    text = drawn.getvalue()
    text = text[text.index("<svg") :].replace("#000000", "currentColor")  # of the page's theme
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>m{zlib.crc32(formula.encode()):x}-", text)  # apart on one page
    return f'<div class="formula" role="img" aria-label="{html.escape(formula)}">{text}</div>'


def function(source: str, *_: Any, **__: Any) -> str:
    """``cmt_mae.method.attention.mix_attention`` -> its source in colours, under its file and line."""
    path, line, text = find(source.strip())
    code = highlight(text, PythonLexer(), HtmlFormatter(nowrap=True))
    title = html.escape(f"{path.relative_to(REPOSITORY)}, line {line}")
    return (
        f'<div class="highlight"><span class="filename">{title}</span>'
        f"<pre><span></span><code>{code}</code></pre></div>"
    )


def find(name: str) -> tuple[Path, int, str]:
    """File, line and text of a function or method by its dotted name. Raises LookupError where there is none."""
    parts = name.split(".")
    for split in range(len(parts) - 1, 0, -1):
        path = REPOSITORY.joinpath("src", *parts[:split]).with_suffix(".py")
        if path.is_file():
            break
    else:
        raise LookupError(f"{name}: no such module in src/")
    text = path.read_text(encoding="utf-8")
    body: list[ast.stmt] = ast.parse(text).body
    node: Any = None
    for part in parts[split:]:
        node = next((n for n in body if getattr(n, "name", None) == part), None)
        if node is None:
            raise LookupError(f"{name}: {path.relative_to(REPOSITORY)} has no {part}")
        body = node.body
    lines = text.splitlines()[node.lineno - 1 : node.end_lineno]
    indent = len(lines[0]) - len(lines[0].lstrip())
    return path, node.lineno, "\n".join(line[indent:] for line in lines)
