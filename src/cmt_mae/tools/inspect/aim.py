"""Aim: does the attention that guides a mask lie on objects? A guided mask can do nothing where it does not.

Measured on images whose objects are known, beside what costs nothing: chance, and a spot in the middle.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata

from cmt_mae.core.errors import InputError
from cmt_mae.data.centre import center_crop
from cmt_mae.data.coco import open_coco
from cmt_mae.data.davis import open_davis, read_frame, read_mask
from cmt_mae.data.decode import IMAGE_SUFFIXES, decode_image
from cmt_mae.data.files import read_file
from cmt_mae.data.source import BadImage
from cmt_mae.method.masking import GUIDED
from cmt_mae.tools.inspect.images import Photo, cut
from cmt_mae.tools.inspect.look import Inspector, hidden
from cmt_mae.tools.inspect.networks import Networks, Who

AT_ONCE = 16
"""Images in a forward pass."""
DRAWS = 4
"""Masks drawn of each image for ``hidden_more``."""
COVERED = 0.5
"""A patch with at least this share of its pixels on objects is a patch of an object."""
SURE = 2.0
"""Standard errors from which a difference counts."""
CENTRE = "a spot in the middle"

Annotated = tuple[Photo, np.ndarray]
"""An image and where its objects are: bool (H, W)."""


@dataclass
class Aim:
    """How well one map finds objects, over n images that hold patches of both kinds."""

    name: str
    auc: float
    """Mean over images of the probability that a patch of an object ranks above one of the background, 0..1."""
    error: float
    """Standard error of ``auc`` over the images."""
    n: int
    each: list[float]
    """AUC of each image, in the images' order."""
    hidden_more: float | None = None
    """P(hidden | object) - P(hidden | background) under the run's rule and ratio, -1..1; None: not drawn from."""


def read_objects(path: str, count: int) -> list[Annotated]:
    """At most ``count`` images with their objects, evenly chosen.

    From COCO's layout (val, crowds left out), DAVIS's (first frames), or a folder with images/ and masks/ (PNG of
    the same name, 0 is background).

    Raises InputError where the folder is none of these, or a file in it cannot be read.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise InputError(f"{path}: no such folder of images with objects; check the path")
    if (root / "annotations").is_dir() and list((root / "annotations").glob("instances_*.json")):
        split = open_coco(root, "val")
        with_objects = np.flatnonzero(split.counts)
        return [_from_coco(split, int(index)) for index in _evenly(with_objects, count)]
    if (root / "Annotations").is_dir():
        videos = [video for video in open_davis(path) if video.objects]
        return [
            (Photo(v.name, read_frame(v.frames[0])), read_mask(v.masks[0]) > 0)
            for v in _evenly(videos, count)
        ]
    if (root / "images").is_dir() and (root / "masks").is_dir():
        files = sorted(f for f in (root / "images").iterdir() if f.suffix.lower() in IMAGE_SUFFIXES)
        return [_from_folder(file, root / "masks") for file in _evenly(files, count)]
    raise InputError(
        f"{path} has no objects to look for: give a folder in COCO's layout (annotations/instances_val2017.json), "
        "in DAVIS's (JPEGImages/, Annotations/), or with images/ and masks/"
    )


def _evenly(items: Sequence[Any] | np.ndarray, count: int) -> list[Any]:
    places = np.unique(np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int))
    return [items[place] for place in places.tolist()] if len(items) else []


def _from_coco(split: Any, index: int) -> Annotated:
    example = split.example(index)
    pixels = example.image.permute(1, 2, 0).numpy()
    return Photo(split.names[index], pixels), example.masks.amax(0).numpy() > 0


def _from_folder(file: Path, masks: Path) -> Annotated:
    try:
        pixels = decode_image(read_file(file), 3)
        mask = decode_image(read_file(masks / f"{file.stem}.png"), 1)[:, :, 0]
    except BadImage as error:
        raise InputError(f"{file} or its mask: {error}; fix or remove it") from error
    if mask.shape != pixels.shape[:2]:
        raise InputError(f"{file} and its mask in {masks} differ in size: make them equal")
    return Photo(file.name, pixels), mask > 0


def object_patches(mask: np.ndarray, networks: Networks) -> np.ndarray:
    """Which patches (rows, columns) of the networks' centre crop lie on objects; mask bool (H, W)."""
    crop = center_crop(mask[:, :, None].astype(np.uint8) * 255, networks.size, 1.0)[:, :, 0] / 255
    rows, columns = networks.grid
    shares = crop.reshape(rows, crop.shape[0] // rows, columns, crop.shape[1] // columns).mean(
        (1, 3)
    )
    return np.asarray(shares >= COVERED)


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve of scores (N,) for positive (N,) bool, both kinds there; ties count a half."""
    ranks, many = rankdata(scores), int(positive.sum())
    return float((ranks[positive].sum() - many * (many + 1) / 2) / (many * (len(scores) - many)))


def centre_prior(grid: tuple[int, int]) -> np.ndarray:
    """A map (L,) that is highest in the middle of the grid, whatever the image."""
    rows, columns = (np.abs(np.linspace(-1, 1, side)) for side in grid)
    return np.asarray(-np.hypot(rows[:, None], columns[None]).ravel())


Maps = Callable[[Inspector], torch.Tensor]
"""Inspector of B images -> scores (B, L) on the student's grid."""


def measure(
    networks: Networks, images: Sequence[Annotated], maps: dict[str, Maps], draw: set[str]
) -> list[Aim]:
    """The aim of each map, and of the centre prior last.

    draw: names of the maps from which masks are drawn too, by the run's own rule and ratio.
    Raises InputError where no image holds patches of both kinds.
    """
    found: dict[str, list[float]] = {name: [] for name in (*maps, CENTRE)}
    more: dict[str, list[float]] = {name: [] for name in draw}
    rule, centre = networks.config.mask.rule, centre_prior(networks.grid)
    for start in range(0, len(images), AT_ONCE):
        some = images[start : start + AT_ONCE]
        look = Inspector(networks, cut([photo for photo, _ in some], networks))
        positive = np.stack([object_patches(mask, networks).ravel() for _, mask in some])
        both = [row for row in range(len(some)) if 0 < positive[row].sum() < positive.shape[1]]
        for name, scores_of in maps.items():
            scores = scores_of(look).float()
            for row in both:
                found[name].append(auc(scores[row].numpy(), positive[row]))
            if name in draw:
                drawn = torch.stack([
                    hidden(look, rule, scores=scores, seed=start + seed).mask for seed in range(DRAWS)
                ]).float().mean(0).numpy()  # fmt: skip
                for row in both:
                    here = positive[row]
                    more[name].append(float(drawn[row][here].mean() - drawn[row][~here].mean()))
        found[CENTRE] += [auc(centre, positive[row]) for row in both]
    if not found[CENTRE]:
        raise InputError(
            "no image has both an object and background at this patch size: give others"
        )
    return [
        Aim(
            name, float(np.mean(values)), float(np.std(values) / max(1, len(values) - 1) ** 0.5), len(values),
            values, float(np.mean(more[name])) if name in more else None,
        )
        for name, values in found.items()
    ]  # fmt: skip


def aims_of(networks: Networks, images: Sequence[Annotated]) -> list[Aim]:
    """A_t, A_s and A_c as the run uses them, the other blocks beside the last, and the centre prior."""
    maps: dict[str, Maps] = {}
    for who in networks.known():
        if who == "teacher" or networks.step:
            maps[f"{who}"] = _raw(who, 0)
    if len(maps) == 2 and 0 < networks.alpha < 1:
        maps["both"] = lambda look: look.scores()
    if networks.teacher is not None:
        depth = len(networks.teacher.model.blocks)
        used = networks.config.teacher.attention_block % depth + 1
        for layer, name in ((depth, "last block"), (depth - 1, "block before the last")):
            if layer not in (0, used):
                maps[f"teacher, {name}"] = _raw("teacher", layer)
    guide = "both" if "both" in maps else "student" if networks.alpha == 1 else "teacher"
    guided = networks.config.mask.rule in GUIDED and guide in maps
    return measure(networks, images, maps, {guide} if guided else set())


def _raw(who: Who, layer: int) -> Maps:
    return lambda look: look.raw(who, layer)


def verdict(aims: Sequence[Aim]) -> tuple[bool, str]:
    """Whether guided masking can do anything here, and why, in one line. The first map with masks drawn guides."""
    centre = next(aim for aim in aims if aim.name == CENTRE)
    guide = guiding(aims)
    shown = f"AUC {guide.auc:.3f} ± {guide.error:.3f}, {CENTRE} {centre.auc:.3f}, chance 0.5, n = {guide.n} images"
    if guide.auc < 0.5 + SURE * guide.error:
        return (
            False,
            f"the map does not see objects ({shown}): guided masks are as good as random ones here",
        )
    gain, error = paired(guide, centre)
    if gain < -SURE * error:
        return (
            False,
            f"the map finds objects less well than {CENTRE} ({shown}): little for a guided mask to use",
        )
    how = "better than" if gain > SURE * error else "as well as"
    return True, f"the map finds objects {how} {CENTRE} ({shown}): a guided mask can act on them"


def guiding(aims: Sequence[Aim]) -> Aim:
    """The map that masks are drawn from; the first where none are."""
    return next((aim for aim in aims if aim.hidden_more is not None), aims[0])


def paired(first: Aim, second: Aim) -> tuple[float, float]:
    """Mean over the same images of AUC first - second, and its standard error."""
    gain = np.array(first.each) - np.array(second.each)
    return float(gain.mean()), float(gain.std() / max(1, len(gain) - 1) ** 0.5)


def better(aims: Sequence[Aim]) -> Aim | None:
    """The map that finds objects surely better than the one that guides; None: there is no such."""
    gains = {aim.name: paired(aim, guiding(aims)) for aim in aims if aim.name != CENTRE}
    sure = [
        aim for aim in aims if aim.name in gains and gains[aim.name][0] > SURE * gains[aim.name][1]
    ]
    return max(sure, key=lambda aim: aim.auc, default=None)
