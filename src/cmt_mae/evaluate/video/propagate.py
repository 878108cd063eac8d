"""Labels carried to the next frame: each patch asks the nearest features of earlier frames (spec 9.1)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cmt_mae.evaluate.video.protocol import VideoProtocol

STRIP = 8
"""Patches across a strip of queries. Wider strips compare with more patches that are too far away;
narrower ones make slow products. Measured at 30 x 52 patches; does not change the result."""


@dataclass
class _Strip:
    """Neighbouring columns of the target frame, and the columns of a context frame near them."""

    queries: slice
    keys: slice
    far: Tensor
    """(n queries, n keys): 0 inside the neighbourhood, -inf outside."""


@dataclass
class _Compared:
    """Similarities of a strip's queries to one part of the context."""

    similarity: Tensor
    """(S, n, m): to the m keys of each of S frames."""
    far: Tensor | None
    """(n, m): 0 or -inf; None: every key counts."""
    labels: Tensor
    """(S, m, K): soft labels of the keys."""

    def of(self, rows: Tensor) -> _Compared:
        """The same for some of the queries."""
        far = None if self.far is None else self.far[rows]
        return _Compared(self.similarity[:, rows], far, self.labels)


class Propagation:
    """The context of one video: features and soft labels of its first and latest frames.

    Similarities are only computed in strips around each query's neighbourhood, never between all
    patches, and only the kept ones are exponentiated. The result is that of the published
    loop within float error; memory does not grow with the video.
    """

    def __init__(self, features: Tensor, labels: Tensor, protocol: VideoProtocol) -> None:
        """Begin with the first frame.

        Args:
            features: (rows, columns, D), l2-normalised.
            labels: (K, rows, columns), soft or one-hot; class 0 is the background.
        """
        self.protocol = protocol
        # Strips cut the longer side; a key strip is then contiguous in memory and needs no copy.
        self.turned = features.shape[1] > features.shape[0]
        first, soft = self._inward(features), self._inward(labels.permute(1, 2, 0))
        slots = 1 + protocol.context
        self.features = first.new_empty((slots, *first.shape))
        self.labels = soft.new_empty((slots, *soft.shape))
        kept = slots if protocol.padded else 1
        self.features[:kept], self.labels[:kept] = first, soft
        self.used, self.next = kept, 1
        shape = (first.shape[0], first.shape[1])
        self.strips = make_strips(shape, protocol.radius, protocol.window, first.device)

    def _inward(self, grid: Tensor) -> Tensor:
        """(rows, columns, X) with the longer side first."""
        return grid.transpose(0, 1) if self.turned else grid

    @torch.no_grad()
    def step(self, features: Tensor) -> Tensor:
        """Soft labels (K, rows, columns) of the next frame from its features (rows, columns, D).

        The frame and its labels join the context; the oldest frame but the first leaves it.
        """
        target = self._inward(features)
        soft = torch.cat([self._strip(target, strip) for strip in self.strips])
        labels = (soft.transpose(0, 1) if self.turned else soft).permute(2, 0, 1)
        self.remember(features, labels)
        return labels

    def remember(self, features: Tensor, labels: Tensor) -> None:
        """Write a frame (rows, columns, D) and its labels (K, rows, columns) over the oldest one."""
        if not self.protocol.context:
            return
        soft = self._inward(labels.permute(1, 2, 0))
        if not self.protocol.soft_queue:
            soft = F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype)
        self.features[self.next], self.labels[self.next] = self._inward(features), soft
        self.used = max(self.used, self.next + 1)
        self.next = 1 + self.next % self.protocol.context

    def _strip(self, target: Tensor, strip: _Strip) -> Tensor:
        """Labels (strip's lines, shorter side, K) of the queries in one strip."""
        queries = target[strip.queries]
        flat = queries.reshape(-1, queries.shape[-1])
        near = slice(0 if self.protocol.limit_first else 1, self.used)
        parts = []
        if not self.protocol.limit_first:
            parts.append(self._compare(flat, slice(0, 1), slice(None), None))
        if near.stop > near.start:
            parts.append(self._compare(flat, near, strip.keys, strip.far))
        soft = vote(parts, self.protocol)
        return soft.reshape(*queries.shape[:2], -1)

    def _compare(
        self, queries: Tensor, frames: slice, keys: slice, far: Tensor | None
    ) -> _Compared:
        """Cosine similarities of queries (n, D) to some lines of some context frames."""
        bank = self.features[frames, keys].flatten(1, 2)
        similarity = torch.bmm(queries.expand(len(bank), -1, -1), bank.transpose(1, 2))
        return _Compared(similarity, far, self.labels[frames, keys].flatten(1, 2))


def make_strips(
    shape: tuple[int, int], radius: int, window: str, device: torch.device
) -> list[_Strip]:
    """Strips that cover a grid, cut across its first side, with their neighbourhoods.

    Args:
        shape: sides of the grid in patches.
        radius: 0 = no limit.
    """
    long, short = shape
    strips = []
    for start in range(0, long, STRIP):
        stop = min(start + STRIP, long)
        keys = slice(max(0, start - radius), min(long, stop + radius)) if radius else slice(0, long)
        i = (
            torch.arange(start, stop)[:, None, None, None]
            - torch.arange(keys.start, keys.stop)[:, None]
        )
        j = torch.arange(short)[:, None, None] - torch.arange(short)
        if not radius:
            apart = torch.zeros_like(i + j, dtype=torch.bool)
        elif window == "square":
            apart = torch.maximum(i.abs(), j.abs()) > radius
        else:
            apart = i**2 + j**2 >= radius**2
        apart = apart.flatten(0, 1).flatten(1)
        far = torch.zeros(apart.shape).masked_fill_(apart, -torch.inf)
        strips.append(_Strip(slice(start, stop), keys, far.to(device)))
    return strips


def vote(parts: list[_Compared], protocol: VideoProtocol) -> Tensor:
    """Soft labels (n, K): the labels of each query's nearest keys, weighted by exp(similarity / T).

    The k nearest are found among the k + 1 key places that are nearest in any frame: no other place
    can hold one. The one more tells whether others tie with the k-th.
    """
    k = protocol.topk
    labels = torch.cat([part.labels.flatten(0, 1) for part in parts])
    found, offset = [], 0
    for part in parts:
        values, places = _candidates(part, k + 1)
        found.append((values, places + offset))
        offset += part.labels.shape[0] * part.labels.shape[1]
    values, places = (torch.cat(both, dim=1) for both in zip(*found, strict=True))
    best, which = values.topk(min(k + 1, values.shape[1]), dim=1)
    kept = best[:, :k]
    if protocol.softmax_over == "kept":
        total = (kept / protocol.temperature).logsumexp(1, keepdim=True)
    else:
        total = _log_total(parts, protocol.temperature)
    weights = (kept / protocol.temperature - total).exp()
    nearest = labels[places.gather(1, which[:, :k])]
    soft = (weights[:, :, None] * nearest).sum(1)
    if protocol.keep_ties and best.shape[1] > k:
        tied = ((best[:, k] == best[:, k - 1]) & best[:, k].isfinite()).nonzero().squeeze(1)
        if len(tied):
            soft[tied] = _vote_with_ties(parts, tied, best[tied, k - 1], protocol)
    return soft


def _candidates(part: _Compared, k: int) -> tuple[Tensor, Tensor]:
    """Similarities (n, S * k) at the k places nearest in any frame, and the rows of their labels."""
    frames, _, m = part.similarity.shape
    highest = part.similarity.amax(0)
    if part.far is not None:
        highest += part.far
    value, place = highest.topk(min(k, highest.shape[1]), dim=1)
    everywhere = place.expand(frames, -1, -1)
    values = part.similarity.gather(2, everywhere)
    values = values.masked_fill(value.isinf(), -torch.inf)  # fewer than k places are near
    rows = everywhere + torch.arange(frames, device=place.device)[:, None, None] * m
    return values.transpose(0, 1).flatten(1), rows.transpose(0, 1).flatten(1)


def _log_total(parts: list[_Compared], temperature: float) -> Tensor:
    """(n, 1): log of the sum of exp(similarity / T) over the whole neighbourhood."""
    sums = []
    for part in parts:
        scaled = part.similarity / temperature
        scaled = scaled if part.far is None else scaled + part.far
        sums.append(scaled.logsumexp((0, 2)))
    return torch.stack(sums, dim=1).logsumexp(1, keepdim=True)


def _vote_with_ties(
    parts: list[_Compared], rows: Tensor, least: Tensor, protocol: VideoProtocol
) -> Tensor:
    """Labels (len(rows), K) of queries where more than k keys are at least as near as the k-th."""
    scaled = []
    for part in (part.of(rows) for part in parts):
        drop = part.similarity < least[:, None]
        if part.far is not None:
            drop |= part.far.isinf()
        scaled.append((part.similarity / protocol.temperature).masked_fill(drop, -torch.inf))
    if protocol.softmax_over == "kept":
        sums = [s.logsumexp((0, 2)) for s in scaled]
        total = torch.stack(sums, dim=1).logsumexp(1, keepdim=True)
    else:
        total = _log_total([part.of(rows) for part in parts], protocol.temperature)
    weighted = [(s - total).exp() @ part.labels for s, part in zip(scaled, parts, strict=True)]
    return torch.cat(weighted).sum(0)


def first_labels(
    mask: NDArray[np.uint8], classes: list[int], grid: tuple[int, int], how: str
) -> Tensor:
    """The first mask at grid size: (K, rows, columns) float32, one map a class.

    Args:
        mask: uint8 (H, W) of object ids.
        classes: the id of each map, 0 (the background) first.
        how: nearest = the mask resized as Pillow does, then one-hot; linear = one-hot maps, resized
            bilinearly without antialias.
    """
    ids = torch.tensor(classes)[:, None, None]
    if how == "nearest":
        small = Image.fromarray(mask).resize((grid[1], grid[0]), Image.Resampling.NEAREST)
        return (torch.from_numpy(np.array(small)) == ids).float()
    maps = (torch.from_numpy(mask.copy()) == ids).float()
    return F.interpolate(maps[None], size=grid, mode="bilinear", align_corners=False)[0]


def decide(
    soft: Tensor,
    classes: list[int],
    size: tuple[int, int],
    frame: tuple[int, int],
    protocol: VideoProtocol,
) -> NDArray[np.uint8]:
    """Object ids uint8 (H, W) of a frame from soft labels (K, rows, columns).

    Args:
        classes: the id of each map.
        size: height and width of the network's input.
        frame: height and width of the frame.
    """
    at = size if protocol.upsample == "patch" else frame
    maps = F.interpolate(soft[None], size=at, mode="bilinear", align_corners=False)[0]
    if protocol.min_max:
        maps = stretch(maps)
    best = maps.argmax(0).to("cpu")
    ids = torch.tensor(classes, dtype=torch.uint8)[best].numpy()
    if at == frame:
        return ids
    resized = Image.fromarray(ids).resize((frame[1], frame[0]), Image.Resampling.NEAREST)
    return np.array(resized)


def stretch(maps: Tensor) -> Tensor:
    """Each map (K, H, W) to 0..1, as DINO's norm_mask; a map without any positive value stays.

    A map that is the same everywhere becomes 0, where the script divides 0 by 0.
    """
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    span = (high - low).where(high > low, torch.ones_like(high))
    return torch.where(high > 0, (maps - low) / span, maps)
