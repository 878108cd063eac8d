"""Records -> one HTML page. Everything foreign goes through jinja2's autoescape or the JSON filter below."""

import base64
import hashlib
import json
from datetime import UTC, datetime
from importlib import metadata, resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from cmt_mae.core.run_reader import RunRecord
from cmt_mae.core.text import printable
from cmt_mae.tools.diagnose.verdict import judge
from cmt_mae.tools.report import charts as chart_list
from cmt_mae.tools.report.page import facts
from cmt_mae.tools.report.page.cost import cost
from cmt_mae.tools.report.page.pictures import Shown, embedded, linked
from cmt_mae.tools.report.page.results import results_table

MAX_BYTES = 5_000_000
"""Of the page."""
RESERVE = 50_000
LISTED = 200
"""Bad images and warnings that are listed; the rest is counted."""


def page(records: list[RunRecord], live: str = "") -> str:
    """The page of one run, or of several side by side.

    live: the stamp of the files where `watch` serves it: with pictures by address, and updating by itself.
    """
    content = content_of(records, live)
    pictures: list[list[Shown]] = [[] for _ in records]
    if live:
        pictures = [linked(record) for record in records]
        return fill(content, pictures)
    room = MAX_BYTES - RESERVE - len(fill(content, pictures).encode())
    each = max(2, 12 // len(records))
    for place, record in enumerate(records):
        share = max(0, room) // (len(records) - place)
        pictures[place], notes = embedded(record, share, each)
        content["runs"][place]["notes"] += notes
        room -= sum(len(p.source) for p in pictures[place])
    return fill(content, pictures)


def content_of(records: list[RunRecord], live: str) -> dict[str, Any]:
    """Everything that the template shows, but pictures."""
    table = results_table(records)
    runs = []
    for place, record in enumerate(records):
        runs.append(
            {
                "place": place,
                "label": record.label,
                "path": printable(str(record.path)),
                "verdict": judge(record),
                "repeat": facts.repeat(record),
                "warnings": record.warnings[-LISTED:],
                "warnings_left": max(0, len(record.warnings) - LISTED),
                "bad_images": record.bad_images[:LISTED],
                "bad_images_left": max(0, len(record.bad_images) - LISTED),
                "problems": record.problems,
                "notes": [],
                "step": record.last_step,
                "total": record.total_steps,
            }
        )
    charts = chart_list.charts(records)
    return {
        "title": ", ".join(record.label for record in records),
        "live": live,
        "runs": runs,
        "charts": charts,
        "samples": {c["key"]: [chart_list.sampled(t) for t in c["tables"]] for c in charts},
        "plot": plot_data(records, charts),
        "ran": side_by_side([facts.what_ran(record) for record in records]),
        "cost": side_by_side([cost(record) for record in records]),
        "differences": facts.differences(records) if len(records) > 1 else [],
        "settings": facts.all_settings(records),
        "results": table,
        "version": metadata.version("cmt-mae"),
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def side_by_side(pairs: list[list[tuple[str, str]]]) -> list[dict[str, Any]]:
    """One line per label with the text of every run, "" where a run has none."""
    texts = [dict(one) for one in pairs]
    names = dict.fromkeys(name for one in texts for name in one)
    return [{"name": name, "values": [one.get(name, "") for one in texts]} for name in names]


def plot_data(records: list[RunRecord], charts: list[dict[str, Any]]) -> dict[str, Any]:
    """What the script draws."""
    switches = []
    for record in records:
        per = record.plan("steps_per_epoch") or 1
        in_epochs = bool(charts) and charts[0]["x_name"] == "epoch"
        switch = record.switch_step
        switches.append(None if switch is None else switch / per if in_epochs else switch)
    return {
        "runs": [record.label for record in records],
        "switches": switches,
        "x_end": max((t["x"][-1] for chart in charts for t in chart["tables"]), default=0),
        "charts": [
            {
                **{k: chart[k] for k in ("key", "title", "unit", "chance", "x_name")},
                "tables": [
                    {"run": t["run"], "x": t["x"], "steps": t["steps"], "lines": t["lines"]}
                    for t in chart["tables"]
                ],
            }
            for chart in charts
        ],
    }


def fill(content: dict[str, Any], pictures: list[list[Shown]]) -> str:
    """The template with its content, style and scripts inside; a policy in its head forbids any other source."""
    script, chart_library = asset("page.js"), asset("uplot.min.js")
    licence = asset("uplot.LICENSE.txt").replace("*/", "")
    library = f"/*\nuPlot\n{licence}\n*/\n{chart_library}"
    styles = asset("uplot.min.css") + asset("page.css")
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src {sha(library)} {sha(script)}",
            f"style-src {sha(styles)}",
            "img-src 'self' data:" if content["live"] else "img-src data:",
            "connect-src 'self'" if content["live"] else "connect-src 'none'",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(asset),
    )
    environment.filters["json_script"] = json_script
    return environment.get_template("page.html").render(
        **content,
        pictures=pictures,
        policy=policy,
        library=Markup(library),
        script=Markup(script),
        styles=Markup(styles),
    )


def json_script(content: Any) -> Markup:
    """JSON that can stand inside <script type="application/json">: nothing in it ends the element."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


def sha(text: str) -> str:
    """A source of a content security policy: this text and no other."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def asset(name: str) -> str:
    """A file of this package."""
    return (resources.files("cmt_mae.tools.report.page") / "assets" / name).read_text(
        encoding="utf-8"
    )
