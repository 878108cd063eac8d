"""Pictures that run networks on images."""

import sys

import numpy as np
import torch
from torch import Tensor

from cmt_mae.method.frozen import as_shares
from cmt_mae.tools.inspect.aim import auc, object_patches, read_objects
from cmt_mae.tools.inspect.attention import attention_sheet, growth_sheet, heads_sheet, masks_sheet
from cmt_mae.tools.inspect.canvas import LARGEST, Sheet
from cmt_mae.tools.inspect.colours import explained, fit_basis, likeness
from cmt_mae.tools.inspect.features import (
    Predicted,
    features_sheet,
    neighbours_sheet,
    predictions_sheet,
    reconstruction_sheet,
)
from cmt_mae.tools.inspect.images import Album, cut
from cmt_mae.tools.inspect.look import Inspector, every_rule, hidden, overlap
from cmt_mae.tools.inspect.neighbours import embed, make_gallery, nearest
from cmt_mae.tools.inspect.networks import Networks, Run, Who
from cmt_mae.tools.inspect.opened import NothingToShow, Opened
from cmt_mae.tools.inspect.settings import ExplainConfig


def attention(opened: Opened) -> None:
    """A_t, A_s, A_c and the mask."""
    config = opened.config
    sheet = attention_of(opened.look, config.alpha, config.layer, config.rule, config.seed)
    opened.save(sheet.figure, "attention")


def attention_of(
    look: Inspector,
    alpha: float | None = None,
    layer: int = 0,
    rule: str = "",
    seed: int = 0,
    largest: float = LARGEST,
) -> Sheet:
    """A_t, A_s, A_c and the mask; alpha, layer and rule: default the run's; largest: inches, width of a cell."""
    networks = look.networks
    maps = look.maps(alpha, layer)
    rule = rule or networks.config.mask.rule
    mask = hidden(look, rule, scores=look.scores(alpha, layer), seed=seed)
    titles = {
        "student": student_title(networks),
        "collab": rf"both $A_c$, $\alpha$ = {networks.alpha if alpha is None else alpha:g}",
    }
    notes = overlap_notes(maps)
    title = f"{networks.name}: attention{of_layer(layer)}, hidden patches by rule {rule}"
    shown = look.inputs.shown
    return attention_sheet(shown, maps, mask.mask, networks.grid, title, titles, notes, largest)


def heads(opened: Opened) -> None:
    """Each head's map, a figure per network."""
    look = opened.look
    for who in look.networks.known():
        maps, grid = look.head_maps(who, opened.config.layer)
        title = f"{look.networks.name}: heads of the {called(who, look.networks)}{of_layer(opened.config.layer)}"
        opened.save(heads_sheet(look.inputs.shown, maps, grid, title).figure, f"heads_{who}")


def growth(opened: Opened) -> None:
    """The student's attention at checkpoints in a row."""
    if not opened.config.run:
        raise NothingToShow("a plain backbone has no checkpoints: give --run")
    run = opened.run
    steps, two_stages = chosen_steps(run, opened.config), run.config.needs_momentum()
    columns: dict[str, Tensor] = {}
    notes: dict[str, list[str]] = {}
    for step in steps:
        networks = run.at(step)
        look = Inspector(networks, opened.inputs(networks))
        maps = look.maps(layer=opened.config.layer)
        if "teacher" in maps and not columns:
            columns["teacher $A_t$"] = maps["teacher"]
        name = f"step {step}"
        if two_stages:
            name += "\n(momentum)" if networks.momentum else "\n(student)"
        columns[name] = maps["student"]
        if found := overlap_notes(maps):
            notes[name] = found["student"]
    title = f"{run.folder.name}: how the student's attention grows"
    grid = look.networks.grid
    opened.save(growth_sheet(look.inputs.shown, columns, grid, title, notes).figure, "growth")


def masks(opened: Opened) -> None:
    """What every rule hides."""
    look = opened.look
    masks = {rule: mask.mask for rule, mask in every_rule(look, opened.config.seed).items()}
    networks, own = look.networks, look.networks.config.mask.rule
    guide = guide_of(networks)
    hidden_count, patches = networks.n_mask, networks.grid[0] * networks.grid[1]
    title = f"{networks.name}: {hidden_count} of {patches} patches hidden by each rule, guided by {guide}"
    sheet = masks_sheet(
        look.inputs.shown, masks, networks.grid, title, own if networks.learner else ""
    )
    opened.save(sheet.figure, "masks")


def features(opened: Opened) -> None:
    """Three principal axes of the features of each network, over all images together."""
    look, layer = opened.look, opened.config.layer
    shown: dict[str, tuple[Tensor, tuple[int, int]]] = {}
    for who in look.networks.known():
        tokens, grid = look.features(who, layer)
        name = f"{called(who, look.networks)}\n{grid[0]} x {grid[1]}, {tokens.shape[-1]} ch."
        shown[name] = (fit_basis(tokens).colours(tokens), grid)
    title = f"{look.networks.name}: features{of_layer(layer)}, principal axes as red, green, blue"
    opened.save(features_sheet(look.inputs.shown, shown, title).figure, "features")


def predictions(opened: Opened) -> None:
    """Predicted features beside their targets, in the colours of the target's axes."""
    look = opened.look
    targets = {name: one for name, one in look.targets().items() if name != "pixel"}
    if not targets:
        raise NothingToShow("no features are predicted here (reconstruction shows pixels)")
    rule, mask = opened.mask()
    said = look.predictions(mask)
    only_hidden = look.networks.config.target.tokens == "masked"
    counted = mask.mask if only_hidden else torch.ones_like(mask.mask)
    predicted = {}
    for name, target in targets.items():
        basis, shown = fit_basis(target), "student" if name == "momentum" else name
        cosine = likeness(said[name] - basis.mean, target - basis.mean)
        share = [
            explained(one[where], wanted[where], basis.mean)
            for one, wanted, where in zip(said[name], target, counted, strict=True)
        ]
        predicted[shown] = Predicted(
            basis.colours(target), basis.colours(said[name]), cosine, share
        )
    networks = look.networks
    title = f"{networks.name}: predicted features, hidden by rule {rule}; colours: the target's principal axes"
    sheet = predictions_sheet(
        look.inputs.shown, predicted, mask.mask, counted, networks.grid, title
    )
    opened.save(sheet.figure, "predictions")


def reconstruction(opened: Opened) -> None:
    """Predicted pixels."""
    look = opened.look
    if "pixel" not in look.targets():
        raise NothingToShow("this run predicts no pixels")
    rule, mask = opened.mask()
    networks = look.networks
    title = f"{networks.name}: pixels predicted at patches hidden by rule {rule}"
    if networks.config.target.norm == "mae":
        title += " (each keeps its own mean and contrast)"
    made = look.reconstruction(mask)
    sheet = reconstruction_sheet(look.inputs.images, mask.mask, made, networks.grid, title)
    opened.save(sheet.figure, "reconstruction")


def neighbours(opened: Opened) -> None:
    """The images most like each, a figure per network."""
    look, config = opened.look, opened.config
    networks, names = look.networks, look.inputs.names
    album = Album([config.gallery] if config.gallery else config.images)
    gallery = make_gallery(networks, album.read(len(networks.stats[0]), config.gallery_size))
    if len(gallery.names) < 2:
        raise NothingToShow("neighbours need more images: give --gallery FOLDER")
    queries = embed(networks, look.inputs)
    kinds = opened.kinds()
    for who in networks.known():
        numbers, cosines = nearest(gallery, who, queries[who], names, config.columns)
        found = [
            [(gallery.shown[n], gallery.kinds[n], c) for n, c in zip(*row, strict=True)]
            for row in zip(numbers.tolist(), cosines.tolist(), strict=True)
        ]
        whose = called(who, networks)
        title = f"{networks.name}: nearest of {len(gallery.names)} images by the {whose}'s features"
        title += " (cosine around their mean)"
        sheet = neighbours_sheet(look.inputs.shown, kinds, found, title)
        opened.save(sheet.figure, f"neighbours_{who}")


def aim(opened: Opened) -> None:
    """Objects, and how each map finds them: AUC of an image under its map."""
    config = opened.config
    if not config.data:
        raise NothingToShow("give images with known objects with --data")
    networks = opened.networks
    images = read_objects(config.data, config.count)
    look = Inspector(networks, cut([photo for photo, _ in images], networks))
    objects = np.stack([object_patches(mask, networks).ravel() for _, mask in images])
    maps = look.maps(config.alpha, config.layer)
    notes = {
        name: [
            f"AUC {auc(one.numpy(), here):.2f}" if 0 < here.sum() < here.size else "no AUC"
            for one, here in zip(scores, objects, strict=True)
        ]
        for name, scores in maps.items()
    }
    shown = {"objects": as_shares(torch.from_numpy(objects).float()), **maps}
    title = f"{networks.name}: attention{of_layer(config.layer)} on objects (AUC: 0.5 is chance)"
    mask = hidden(look, networks.config.mask.rule, scores=look.scores(config.alpha, config.layer))
    titles = {"objects": "objects", "student": student_title(networks)}
    sheet = attention_sheet(
        look.inputs.shown, shown, mask.mask, networks.grid, title, titles, notes
    )
    opened.save(sheet.figure, "aim")


def chosen_steps(run: Run, config: ExplainConfig) -> list[int]:
    """Steps of ``growth``, rising; says so in one line where few checkpoints are left."""
    known = run.steps()
    if not known:
        raise NothingToShow(f"no checkpoint is left in {run.folder}/checkpoints")
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


def called(who: Who, networks: Networks) -> str:
    """In titles: a plain backbone is not called student."""
    return "backbone" if who == "student" and networks.step is None else who


def guide_of(networks: Networks) -> str:
    """Whose attention the guided rules follow here, as ``Inspector.scores``."""
    if networks.teacher is None or networks.alpha == 1:
        return f"the attention of the {called('student', networks)}"
    return "A_t" if networks.alpha == 0 else f"A_c (alpha {networks.alpha:g})"


def student_title(networks: Networks) -> str:
    """What A_s is here: only the momentum student's map is mixed in."""
    name = called("student", networks)
    if networks.momentum or networks.learner is None or networks.teacher is None:
        return f"{name} $A_s$"
    return f"{name} (not\nmixed in) $A_s$"


def overlap_notes(maps: dict[str, Tensor]) -> dict[str, list[str]]:
    """Under each student's map: how much of its top quarter is the teacher's."""
    if "teacher" not in maps:
        return {}
    return {"student": [f"overlap {share:.2f}" for share in overlap(maps).tolist()]}


def of_layer(layer: int) -> str:
    """For titles."""
    return f" of block {layer}" if layer else ""
