"""``cmt-mae explain``: which pictures are made of what; networks run in look.py, drawing is in report/."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from cmt_mae.errors import InputError
from cmt_mae.explain.images import Inputs, Photo, cut, read_photos
from cmt_mae.explain.look import Look, every_rule, hidden, overlap
from cmt_mae.explain.networks import Networks, Run, open_backbone
from cmt_mae.explain.settings import OF_FILES, OF_IMAGES, ExplainConfig
from cmt_mae.report.attention import attention_sheet, growth_sheet, heads_sheet, masks_sheet
from cmt_mae.text import printable


def explain(config: ExplainConfig) -> dict[str, Any]:
    """Make the pictures; returns {"written": paths, "left_out": {kind: reason}}.

    Raises InputError for what the user can mend; pictures made before stay.
    """
    config.check()
    maker = Pictures(config)
    wanted = config.what or [
        *(OF_IMAGES if config.images else ()),
        *(OF_FILES if config.run else ()),
    ]
    bar = Progress(console=Console(stderr=True), disable=not config.progress, transient=True)
    with bar:
        task = bar.add_task("", total=len(wanted))
        for number, kind in enumerate(wanted, start=1):
            bar.update(task, description=kind)
            try:
                maker.make(kind)
            except NotHere as error:
                if config.what:  # it was asked for by name
                    raise InputError(f"--what {kind}: {error}") from error
                maker.left_out[kind] = str(error)
            bar.update(task, completed=number)
    for kind, reason in maker.left_out.items():
        print(f"left out {kind}: {printable(reason)}", file=sys.stderr)
    for path in maker.written:
        print(f"wrote {printable(str(path))}", file=sys.stderr)
    return {"written": [str(path) for path in maker.written], "left_out": maker.left_out}


class NotHere(InputError):
    """A picture that this run, backbone or image set has nothing for."""


class Pictures:
    """One call of explain: what was read is kept for the next picture."""

    def __init__(self, config: ExplainConfig) -> None:
        self.config = config
        self.written: list[Path] = []
        self.left_out: dict[str, str] = {}
        self._run: Run | None = None
        self._look: Look | None = None
        self._photos: list[Photo] | None = None

    def make(self, kind: str) -> None:
        """One kind of picture. Raises NotHere where there is nothing to show."""
        makers: dict[str, Callable[[], None]] = {
            "attention": self.attention,
            "heads": self.heads,
            "growth": self.growth,
            "masks": self.masks,
        }
        makers[kind]()

    def run(self) -> Run:
        """The run directory, opened once."""
        if self._run is None:
            config = self.config
            self._run = Run(
                config.run, teacher=config.teacher, grid_align=config.grid_align, size=config.size
            )
        return self._run

    def look(self) -> Look:
        """The networks of the last checkpoint (or of the backbone) on the images."""
        if self._look is None:
            config = self.config
            if config.run:
                networks = self.run().at(max(config.checkpoints, default=None))
            else:
                networks = open_backbone(
                    config.backbone, key=config.key or None, teacher=config.teacher,
                    grid_align=config.grid_align, size=config.size,
                )  # fmt: skip
            self._look = Look(networks, self.inputs(networks))
        return self._look

    def inputs(self, networks: Networks) -> Inputs:
        """The images, cut for these networks."""
        if self._photos is None:
            channels = len(networks.stats[0])
            self._photos = read_photos(self.config.images, channels, self.config.count)
        return cut(self._photos, networks)

    def save(self, sheet: Any, name: str) -> None:
        """Write a figure in every format."""
        self.written += sheet.save(self.config.folder() / name, self.config.formats)

    def attention(self) -> None:
        """A_t, A_s, A_c and the mask."""
        config, look = self.config, self.look()
        networks = look.networks
        maps = look.maps(config.alpha, config.layer)
        rule = config.rule or networks.config.mask.rule
        alpha = networks.weights.mask if config.alpha is None else config.alpha
        mask = hidden(look, rule, scores=look.scores(config.alpha, config.layer), seed=config.seed)
        titles = {
            "student": student_title(networks),
            "collab": rf"both $A_c$, $\alpha$ = {alpha:g}",
        }
        notes = overlap_notes(maps)
        title = f"{networks.name}: attention{of_layer(config.layer)}, hidden patches by {rule}"
        shown = look.inputs.shown
        self.save(
            attention_sheet(shown, maps, mask.mask, networks.grid, title, titles, notes),
            "attention",
        )

    def heads(self) -> None:
        """Each head's map, a figure a network."""
        look = self.look()
        for who in ("teacher", "student"):
            if who == "teacher" and look.networks.teacher is None:
                continue
            maps, grid = look.head_maps(who, self.config.layer)  # type: ignore[arg-type]
            title = f"{look.networks.name}: heads of the {who}{of_layer(self.config.layer)}"
            self.save(heads_sheet(look.inputs.shown, maps, grid, title), f"heads_{who}")

    def masks(self) -> None:
        """What every rule hides."""
        look = self.look()
        masks = {rule: mask.mask for rule, mask in every_rule(look, self.config.seed).items()}
        networks, own = look.networks, look.networks.config.mask.rule
        guide = (
            "A_c" if networks.momentum else "A_t" if networks.teacher else "the student's attention"
        )
        hidden_count, patches = networks.n_mask, networks.grid[0] * networks.grid[1]
        title = f"{networks.name}: {hidden_count} of {patches} patches hidden by each rule, guided by {guide}"
        self.save(
            masks_sheet(
                look.inputs.shown, masks, networks.grid, title, own if networks.learner else ""
            ),
            "masks",
        )

    def growth(self) -> None:
        """The student's attention at checkpoints in a row."""
        if not self.config.run:
            raise NotHere("a plain backbone has no checkpoints: give --run")
        run = self.run()
        steps = chosen_steps(run, self.config)
        columns: dict[str, Tensor] = {}
        notes: dict[str, list[str]] = {}
        for step in steps:
            networks = run.at(step)
            look = Look(networks, self.inputs(networks))
            maps = look.maps(layer=self.config.layer)
            if "teacher" in maps and not columns:
                columns["teacher $A_t$\n"] = maps["teacher"]
            name = f"step {step}" + ("\n(momentum)" if networks.momentum else "\n(student)")
            columns[name] = maps["student"]
            if found := overlap_notes(maps):
                notes[name] = found["student"]
        title = f"{run.folder.name}: how the student's attention grows"
        grid = look.networks.grid
        self.save(growth_sheet(look.inputs.shown, columns, grid, title, notes), "growth")


def chosen_steps(run: Run, config: ExplainConfig) -> list[int]:
    """Steps of ``growth``, rising; says so in one line where few checkpoints are left."""
    known = run.steps()
    if not known:
        raise NotHere(f"no checkpoint is left in {run.folder}/checkpoints")
    if config.checkpoints:
        return sorted(set(config.checkpoints))
    if len(known) < 3:
        print(
            f"growth: {run.folder} keeps {len(known)} checkpoint(s), older ones were rotated away: "
            "pretrain --runtime.keep_every EPOCHS keeps more",
            file=sys.stderr,
        )
    every = sorted({0, *known})
    places = np.unique(np.linspace(0, len(every) - 1, min(config.columns, len(every))).round())
    return [every[int(place)] for place in places]


def student_title(networks: Networks) -> str:
    """What A_s is here: only the momentum student's map is mixed in."""
    if networks.momentum or networks.learner is None:
        return "student $A_s$"
    return "student (not\nmixed in) $A_s$" if networks.teacher else "student $A_s$"


def overlap_notes(maps: dict[str, Tensor]) -> dict[str, list[str]]:
    """Under each student's map: how much of its top quarter is the teacher's."""
    if "teacher" not in maps:
        return {}
    return {"student": [f"overlap {share:.2f}" for share in overlap(maps).tolist()]}


def of_layer(layer: int) -> str:
    """For titles."""
    return f" of block {layer}" if layer else ""
