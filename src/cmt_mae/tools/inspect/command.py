"""``cmt-mae explain``: which pictures are made of what. Networks run in look.py."""

import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import Progress

from cmt_mae.core.errors import InputError
from cmt_mae.core.text import printable
from cmt_mae.tools.inspect import of_images
from cmt_mae.tools.inspect.opened import NothingToShow, Opened
from cmt_mae.tools.inspect.settings import KINDS, OF_IMAGES, ExplainConfig

MAKERS: dict[str, Callable[[Opened], None]] = {kind: getattr(of_images, kind) for kind in KINDS}


def explain(config: ExplainConfig) -> dict[str, Any]:
    """Make the pictures; returns {"written": paths, "left_out": {kind: reason}}.

    Raises InputError for what the user can fix; pictures made before stay.
    """
    config.check()
    opened = Opened(config)
    wanted = config.what or OF_IMAGES
    console = Console(stderr=True)
    quiet = not config.progress or not console.is_terminal
    bar = Progress(console=console, disable=quiet, transient=True)
    with bar:
        task = bar.add_task("", total=len(wanted))
        for number, kind in enumerate(wanted, start=1):
            bar.update(task, description=kind)
            try:
                MAKERS[kind](opened)
            except NothingToShow as error:
                if config.what:  # it was asked for by name
                    raise InputError(f"--what {kind}: {error}") from error
                opened.left_out[kind] = str(error)
            bar.update(task, completed=number)
    for kind, reason in opened.left_out.items():
        print(f"left out {kind}: {printable(reason)}", file=sys.stderr)
    size = sum(path.stat().st_size for path in opened.written) / 1e6
    names = printable(", ".join(path.name for path in opened.written))
    where = printable(str(config.folder()))
    print(
        f"wrote {len(opened.written)} pictures, {size:.1f} MB, in {where}: {names}", file=sys.stderr
    )
    return {"written": [str(path) for path in opened.written], "left_out": opened.left_out}
