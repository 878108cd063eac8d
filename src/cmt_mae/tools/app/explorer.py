"""What the page shows, without the page: networks kept open, one image looked at, pictures from controls."""

import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cmt_mae.core.backbone_facts import BackboneFacts, NoFacts
from cmt_mae.core.errors import InputError
from cmt_mae.data.sources import limits_of
from cmt_mae.method.masking import Mask, count_masked
from cmt_mae.tools.inspect.attention import attention_sheet, in_units
from cmt_mae.tools.inspect.canvas import (
    Picture,
    Scale,
    as_picture,
    at_pixels,
    common_scale,
    over,
    save,
    without,
)
from cmt_mae.tools.inspect.colours import fit_basis, similar_to
from cmt_mae.tools.inspect.images import Photo, cut, read_image
from cmt_mae.tools.inspect.look import Inspector, hidden
from cmt_mae.tools.inspect.networks import NO_TEACHER, Networks, Run, open_backbone

OWN_TEACHER = "the run's own"
TILES = {
    "photo": "image", "teacher": "teacher A_t", "student": "student A_s", "collab": "both A_c",
    "visible": "visible patches", "student_features": "features of the student",
    "teacher_features": "features of the teacher",
}  # fmt: skip
"""Name of a picture -> what stands over it."""
OPEN_NETWORKS, OPEN_LOOKS = 4, 8  # kept at a time

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Choice:
    """Which networks are looked at."""

    network: str
    """A run directory or a backbone, by its name in the list."""
    step: int | None = None
    """Of a checkpoint; None: the newest."""
    teacher: str = OWN_TEACHER


@dataclass(frozen=True)
class Controls:
    """What the sliders say."""

    alpha: float = 0.3
    """Weight of the student in A_c, 0..1."""
    ratio: float = 0.75
    """Hidden share, in (0, 1)."""
    rule: str = "sampled_high"
    temperature: float = 1.0
    layer: int = 0
    """Block, from 1; 0: the last."""
    head: int = 0
    """From 1; 0: all together."""
    seed: int = 0


@dataclass
class View:
    """Pictures of one image."""

    tiles: dict[str, Pixels]
    """Some of TILES -> uint8 (H, W, 3)."""
    seconds: float
    """From the controls to the pictures."""
    note: str
    """One line: what is shown."""


@dataclass
class Likeness:
    """Where two backbones see the same as at one patch."""

    pictures: list[Pixels]
    """The image with the patch marked, then the map of each backbone over it."""
    darkest: list[float]
    """Cosine, or less, of the first colour of each map; the last colour is 1."""
    seconds: float


class Explorer:
    """Everything the page asks for. Networks and looks at images are kept, so that a slider costs little."""

    def __init__(
        self,
        runs: list[str],
        backbones: list[str],
        teachers: list[str],
        facts: BackboneFacts | None = None,
    ) -> None:
        """Names that the page offers; nothing else is opened. facts: what files of the backbones do not say.

        Raises InputError for a folder that is no run.
        """
        self.facts = facts or NoFacts()
        self.runs, self.backbones = list(dict.fromkeys(runs)), list(dict.fromkeys(backbones))
        for run in self.runs:
            if not (Path(run) / "config.yaml").is_file():
                raise InputError(f"{run} holds no run (no config.yaml): give run directories")
        self.names = [*self.runs, *self.backbones]
        self.teachers = [OWN_TEACHER, NO_TEACHER, *dict.fromkeys(teachers)]
        self.networks = lru_cache(OPEN_NETWORKS)(self._open)
        self.look = lru_cache(OPEN_LOOKS)(self._look)
        self._run = lru_cache(OPEN_NETWORKS)(Run)

    def steps(self, name: str) -> list[int]:
        """Steps of a run's checkpoints, oldest first; none for a backbone."""
        return self._run(name).steps() if name in self.runs else []

    def limits(self, choice: Choice) -> tuple[int, int]:
        """How many blocks and heads every network of the choice has."""
        networks = self.networks(choice)
        models = [networks.student] + ([networks.teacher.model] if networks.teacher else [])
        return (
            min(len(model.blocks) for model in models),
            min(int(model.blocks[-1].attn.num_heads) for model in models),
        )

    def start(self, choice: Choice) -> Controls:
        """The controls as the run has them."""
        networks = self.networks(choice)
        mask = networks.config.mask
        alpha = networks.weights.mask if networks.momentum else networks.config.alpha
        return Controls(alpha=alpha, ratio=mask.ratio, rule=mask.rule, temperature=mask.temperature)

    def view(self, choice: Choice, image: str, controls: Controls) -> View:
        """Maps, mask and features of one image file. Raises InputError for what cannot be shown."""
        begin = time.perf_counter()
        look = self.look(choice, image)
        layers, heads = self.limits(choice)
        layer, head = min(controls.layer, layers) % layers, min(controls.head, heads)
        with torch.inference_mode():
            maps = look.maps(controls.alpha, layer, head - 1)
            mask = self.mask(look, controls, layer, head - 1)
            tiles = self._tiles(look, maps, mask, layer)
        drawn = {name: (255 * one).round().astype(np.uint8) for name, one in tiles.items()}
        patches = look.networks.grid[0] * look.networks.grid[1]
        note = (
            f"{look.networks.name}: {mask.ids_mask.shape[1]} of {patches} patches hidden by '{controls.rule}', "
            f"{f'block {layer}' if layer else 'last block'}, {f'head {head}' if head else f'all {heads} heads'}; "
            "one colour scale for all maps: bright is attended"
        )
        return View(drawn, time.perf_counter() - begin, note)

    def mask(self, look: Inspector, controls: Controls, layer: int, head: int) -> Mask:
        """What the rule hides at this ratio, temperature and mixture."""
        rows, columns = look.networks.grid
        return hidden(
            look, controls.rule, scores=look.scores(controls.alpha, layer, head),
            n_mask=count_masked(rows * columns, controls.ratio), temperature=controls.temperature,
            seed=controls.seed,
        )  # fmt: skip

    def picture(self, choice: Choice, image: str, controls: Controls, folder: Path) -> Path:
        """Maps and mask as one PNG of publication size, with a colour bar."""
        look = self.look(choice, image)
        layers, heads = self.limits(choice)
        layer, head = min(controls.layer, layers) % layers, min(controls.head, heads) - 1
        maps = look.maps(controls.alpha, layer, head)
        mask = self.mask(look, controls, layer, head)
        title = f"{look.networks.name}, alpha {controls.alpha:g}, {controls.rule}, hidden {controls.ratio:.0%}"
        sheet = attention_sheet(look.inputs.shown, maps, mask.mask, look.networks.grid, title)
        return save(sheet.figure, folder / "attention", ["png"])[0]

    def similarity(
        self, first: Choice, second: Choice, image: str, place: tuple[float, float], stretch: bool
    ) -> Likeness:
        """Cosine of every patch with the one at ``place``, by the features of two networks.

        place: (down, right) in 0..1. stretch: the colours of each map begin at its lowest value, not at 0.
        """
        begin = time.perf_counter()
        pictures: list[Picture] = []
        darkest: list[float] = []
        for choice in (first, second):
            look = self.look(choice, image)
            tokens, grid = look.features("student")
            row, column = (min(int(at * n), n - 1) for at, n in zip(place, grid, strict=True))
            near = similar_to(tokens, row * grid[1] + column)[0].reshape(grid).numpy()
            photo = as_picture(look.inputs.shown[0])
            if not pictures:
                pictures.append(marked(photo, (row, column), grid))
            darkest.append(float(near.min()) if stretch else 0.0)
            above = (near - darkest[-1]).clip(0) / max(1e-6, 1 - darkest[-1])
            pictures.append(
                marked(over(photo, above, Scale(1.0, clipped=False)), (row, column), grid)
            )
        drawn = [(255 * one).round().astype(np.uint8) for one in pictures]
        return Likeness(drawn, darkest, time.perf_counter() - begin)

    def _open(self, choice: Choice) -> Networks:
        """Raises InputError for a name that the page does not offer."""
        if choice.network not in self.names or choice.teacher not in self.teachers:
            raise InputError("this network is not in the list: start the app with it")
        teacher = "" if choice.teacher == OWN_TEACHER else choice.teacher
        if choice.network in self.runs:
            return self._run(choice.network, teacher=teacher).at(choice.step)
        return open_backbone(choice.network, teacher=teacher, facts=self.facts)

    def _look(self, choice: Choice, image: str) -> Inspector:
        networks = self.networks(choice)
        limits = limits_of("the image", [image])
        pixels = read_image(Path(image), networks.config.student.in_chans, limits)
        return Inspector(networks, cut([Photo("image", pixels)], networks))

    def _tiles(
        self, look: Inspector, maps: dict[str, torch.Tensor], mask: Mask, layer: int
    ) -> dict[str, Picture]:
        """Name -> picture, the maps in one colour scale."""
        grid = look.networks.grid
        photo = as_picture(look.inputs.shown[0])
        values = {name: in_units(one[0], grid) for name, one in maps.items()}
        scale = common_scale(list(values.values()))
        tiles = {"photo": photo} | {name: over(photo, one, scale) for name, one in values.items()}
        tiles["visible"] = without(photo, mask.mask[0].reshape(grid).numpy())
        for who in ("student", "teacher"):
            if who == "student" or look.networks.teacher is not None:
                tokens, own = look.features(who, layer)  # type: ignore[arg-type]
                colours = fit_basis(tokens).colours(tokens)[0].reshape(*own, 3).numpy()
                tiles[f"{who}_features"] = at_pixels(colours, *photo.shape[:2])
        return tiles


def marked(picture: Picture, cell: tuple[int, int], grid: tuple[int, int]) -> Picture:
    """The picture with a white and a black frame round one patch."""
    out = picture.copy()
    height, width = picture.shape[:2]
    top, bottom = (height * at // grid[0] for at in (cell[0], cell[0] + 1))
    left, right = (width * at // grid[1] for at in (cell[1], cell[1] + 1))
    inside = out[top:bottom, left:right].copy()
    thick = max(1, (bottom - top) // 10)
    for depth, grey in ((0, 1.0), (thick, 0.0)):
        out[top + depth : bottom - depth, left + depth : right - depth] = grey
    core = slice(2 * thick, -2 * thick), slice(2 * thick, -2 * thick)
    out[top:bottom, left:right][core] = inside[core]
    return out
