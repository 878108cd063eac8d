"""Nearest neighbours of images among others, by the mean of their patch tokens around the gallery's mean.

Mean patch tokens of one network point nearly the same way: without the mean taken off, every cosine is 1.00.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from torch.nn import functional as F

from cmt_mae.tools.inspect.images import Inputs, Photo, cut
from cmt_mae.tools.inspect.look import Inspector
from cmt_mae.tools.inspect.networks import Networks, Who

AT_ONCE = 32
"""Images in a forward pass."""


@dataclass
class Gallery:
    """N images in which neighbours are looked for."""

    names: list[str]
    kinds: list[str]
    """Class names; "" without."""
    shown: Tensor
    """uint8 (N, C, kH, kW), as ``Inputs.shown``."""
    vectors: dict[Who, Tensor]
    """(N, D), one of each network."""


def embed(networks: Networks, inputs: Inputs) -> dict[Who, Tensor]:
    """One vector for each image (B, D), of each network."""
    look = Inspector(networks, inputs)
    return {who: look.pooled(who) for who in networks.known()}


def make_gallery(networks: Networks, photos: Iterable[Photo]) -> Gallery:
    """Read, cut and embed the photos, a few at a time."""
    names: list[str] = []
    kinds: list[str] = []
    shown: list[Tensor] = []
    vectors: dict[Who, list[Tensor]] = {}
    for some in chunks(photos):
        inputs = cut(some, networks)
        names += inputs.names
        kinds += [photo.kind for photo in some]
        shown.append(inputs.shown)
        for who, found in embed(networks, inputs).items():
            vectors.setdefault(who, []).append(found)
    return Gallery(
        names, kinds, torch.cat(shown), {who: torch.cat(parts) for who, parts in vectors.items()}
    )


def chunks(photos: Iterable[Photo]) -> Iterator[list[Photo]]:
    """Lists of at most AT_ONCE."""
    rest = iter(photos)
    while some := list(islice(rest, AT_ONCE)):
        yield some


def nearest(
    gallery: Gallery, who: Who, queries: Tensor, names: list[str], count: int
) -> tuple[Tensor, Tensor]:
    """Numbers (B, k) and cosines (B, k) of the nearest images, nearest first; an image is not its own neighbour.

    queries (B, D); names: of the queries, by which one that is in the gallery is known. Cosines are those of the
    vectors after the gallery's mean was taken off, in -1..1.
    """
    mean = gallery.vectors[who].mean(0)
    likeness = (
        F.normalize(queries - mean, dim=-1) @ F.normalize(gallery.vectors[who] - mean, dim=-1).T
    )
    for row, name in enumerate(names):
        for column, other in enumerate(gallery.names):
            if other == name or other.endswith("/" + name):
                likeness[row, column] = -2.0
    k = min(count, max(1, len(gallery.names) - 1))
    found = likeness.topk(k, dim=1)
    return found.indices, found.values
