"""What ``cmt-mae evaluate`` prints of a result: its numbers and the protocol behind them."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cmt_mae.core.text import printable


def show_result(result: Any, whole: bool = False) -> None:
    """The numbers and the protocol behind them, on stderr, so that stdout stays for --json.

    whole: every setting of the protocol, not only its name.
    Text objects: nothing in a name is taken for markup or for a terminal's commands.
    """

    def shown(text: str) -> Text:
        return Text(printable(text))

    protocol = result.protocol
    over = result.over(protocol["headline"])
    title = (
        f"{result.task}, protocol {protocol['name']}, {result.backbone['name']} ({result.network})"
    )
    title += f", {over}" if over else ""
    table = Table(title=shown(title))
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    for metric, value in result.metrics.items():
        mark = " *" if metric == protocol["headline"] else ""
        ends = result.interval(metric)
        table.add_row(
            shown(metric + mark),
            f"{value:.2f}",
            f"of {result.over(metric)}" if ends is None else f"{ends[0]:.1f} to {ends[1]:.1f}",
        )
    console = Console(stderr=True)
    console.print(table)
    sequences = result.details.get("sequences")
    if result.task == "davis" and sequences:
        console.print(sequence_table(sequences))
    pool = f" (here of {result.details['pool']})" if "pool" in result.details else ""
    changed = len(protocol.get("differs") or [])
    about = f"; {changed} difference(s) from the protocol" if changed else ""
    about += "; --protocols shows every setting"
    if whole:
        settings = (
            f"{k} {f'{v:.4g}' if isinstance(v, float) else v}"
            for k, v in protocol.items()
            if k not in ("name", "headline")
        )
        about = f". protocol: {', '.join(settings)}"
    console.print(shown(f"* the number to quote{pool}{about}"), style="dim")
    console.print(f"{result.seconds:.1f} s, seed {result.seed}", style="dim")


def sequence_table(rows: list[dict[str, Any]]) -> Table:
    """J and F of each video of a DAVIS result."""
    table = Table()
    table.add_column("sequence")
    for name in ("objects", "J&F", "J_mean", "F_mean"):
        table.add_column(name, justify="right")
    for row in rows:
        values = [f"{row[name]:.2f}" for name in ("J&F", "J_mean", "F_mean")]
        table.add_row(Text(printable(row["name"])), str(len(row["objects"])), *values)
    return table
