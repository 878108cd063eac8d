"""Label propagation against spec 12.7, a plain loop over pairs, and its published quirks one by one."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from benchmarks.davis import PublishedLoop
from hypothesis import given, settings
from hypothesis import strategies as st

from cmt_mae.evaluate.video.propagate import (
    Propagation,
    decide,
    first_labels,
    make_strips,
    stretch,
)
from cmt_mae.evaluate.video.protocol import PRESETS, VideoProtocol

DINO = VideoProtocol(**PRESETS["dino"])


def plain(features, labels, protocol: VideoProtocol):
    """All frames' soft labels by loops over target patches and context keys, in float64."""
    rows, columns = features.shape[1:3]
    soft = [labels.permute(1, 2, 0).double()]
    for t in range(1, len(features)):
        recent = [i for i in range(t - protocol.context, t) if i > 0]
        if protocol.padded:
            recent = [0] * (protocol.context - len(recent)) + recent
        frame = torch.empty_like(soft[0])
        for y in range(rows):
            for x in range(columns):
                keys = []
                for number, c in enumerate([0, *recent]):
                    for i in range(rows):
                        for j in range(columns):
                            limited = protocol.radius and (number > 0 or protocol.limit_first)
                            if limited and not near(i - y, j - x, protocol):
                                continue
                            s = (features[t, y, x].double() @ features[c, i, j].double()).item()
                            keys.append((s, soft[c][i, j]))
                frame[y, x] = weigh(keys, protocol)
        soft.append(frame)
    return torch.stack(soft[1:]).permute(0, 3, 1, 2)


def near(dy, dx, protocol):
    if protocol.window == "square":
        return max(abs(dy), abs(dx)) <= protocol.radius
    return math.hypot(dy, dx) < protocol.radius


def weigh(keys, protocol):
    keys = sorted(keys, key=lambda key: -key[0])
    kept = keys[: protocol.topk]
    if protocol.keep_ties:
        kept = [key for key in keys if key[0] >= kept[-1][0]]
    over = kept if protocol.softmax_over == "kept" else keys
    total = sum(math.exp(s / protocol.temperature) for s, _ in over)
    return sum(math.exp(s / protocol.temperature) / total * label for s, label in kept)


def ours(features, labels, protocol):
    propagation = Propagation(features[0], labels, protocol)
    return torch.stack([propagation.step(one) for one in features[1:]])


def video(frames, rows, columns, seed=0, width=6, classes=3):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(frames, rows, columns, width, generator=generator)
    labels = torch.randint(classes, (rows, columns), generator=generator)
    return F.normalize(features, dim=-1), F.one_hot(labels, classes).permute(2, 0, 1).float()


def test_worked_example_of_the_specification():
    """Spec 12.7: DINO's function on a 2 x 3 grid with two context frames."""
    frames = [
        torch.sin(0.7 * torch.arange(24) + s).reshape(6, 4).reshape(2, 3, 4) for s in range(3)
    ]
    frames = [F.normalize(frame, dim=-1) for frame in frames]
    one = torch.tensor([[1.0, 1, 0], [1, 0, 0]])
    two = torch.tensor([[1.0, 0, 0], [1, 1, 0]])
    propagation = Propagation(
        frames[0], torch.stack([one, 1 - one]), replace(DINO, radius=1, topk=2)
    )
    propagation.remember(frames[1], torch.stack([two, 1 - two]))
    soft = propagation.step(frames[2])
    wanted = torch.tensor([[1, 0, 0], [0, 0.462689, 0.230124]])
    torch.testing.assert_close(soft[0], wanted, atol=1e-6, rtol=0)
    torch.testing.assert_close(soft.sum(0), torch.ones(2, 3))


def neighbours(grid, radius, window="square"):
    """Neighbour count of every patch, from the strips."""
    counts = torch.zeros(grid)
    for strip in make_strips(grid, radius, window, torch.device("cpu")):
        counts[strip.queries] = strip.far.isfinite().sum(1).reshape(-1, grid[1]).float()
    return counts


def test_neighbourhoods_of_the_specification():
    assert neighbours((2, 3), 1).flatten().tolist() == [4, 6, 4, 4, 6, 4]
    counts = neighbours((52, 30), 12)
    assert (counts[0, 0], counts[26, 15]) == (169, 625)
    assert counts.mean().item() == pytest.approx(435.6, abs=0.05)
    disc = neighbours((52, 30), 12, "disc")[26, 15]
    y, x = np.mgrid[-12:13, -12:13]
    assert disc == (np.hypot(y, x) < 12).sum() == 437
    assert neighbours((5, 4), 0).tolist() == [[20.0] * 4] * 5


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_equals_a_plain_loop(data):
    """Any grid, wide or tall, any mixture of the quirks."""
    frames, rows, columns = (data.draw(st.integers(*r)) for r in ((2, 5), (1, 5), (1, 12)))
    if data.draw(st.booleans()):
        rows, columns = columns, rows
    protocol = replace(
        DINO,
        context=data.draw(st.integers(0, 3)),
        padded=data.draw(st.booleans()),
        radius=data.draw(st.integers(0, 3)),
        window=data.draw(st.sampled_from(["square", "disc"])),
        limit_first=data.draw(st.booleans()),
        topk=data.draw(st.integers(1, 8)),
        temperature=data.draw(st.sampled_from([0.05, 0.1, 0.7])),
        softmax_over=data.draw(st.sampled_from(["kept", "neighbourhood"])),
        keep_ties=data.draw(st.booleans()),
    )
    if protocol.padded:  # copies of the first frame tie with each other, or not, by rounding
        protocol = replace(protocol, keep_ties=False)
    features, labels = video(frames, rows, columns, seed=data.draw(st.integers(0, 99)))
    wanted = plain(features, labels, protocol).float()
    torch.testing.assert_close(ours(features, labels, protocol), wanted, atol=2e-5, rtol=0)


@pytest.mark.parametrize("grid", [(13, 30), (30, 13), (7, 9)])
def test_equals_the_published_loop(grid):
    """The benchmark's baseline: all pairs, exp, mask, topk, division; more frames than the queue holds."""
    features, labels = video(12, *grid, seed=3, width=16)
    loop = PublishedLoop(features[0], labels)
    wanted = torch.stack([loop.step(one) for one in features[1:]])
    torch.testing.assert_close(ours(features, labels, DINO), wanted, atol=1e-5, rtol=0)


def exact_video(frames=4, rows=4, columns=9, seed=0):
    """Features along axes: similarities are exactly 0, 1 or -1, so ties abound and are exact."""
    generator = torch.Generator().manual_seed(seed)
    axis = torch.randint(3, (frames, rows, columns), generator=generator)
    sign = 2.0 * torch.randint(2, (frames, rows, columns, 1), generator=generator) - 1
    labels = torch.randint(2, (rows, columns), generator=generator)
    return F.one_hot(axis, 4).float() * sign, F.one_hot(labels, 2).permute(2, 0, 1).float()


@pytest.mark.parametrize("changes", [{}, {"limit_first": False}, {"softmax_over": "neighbourhood"}])
def test_ties_with_the_last_neighbour_are_all_kept(changes):
    protocol = replace(DINO, radius=2, context=2, **changes)
    features, labels = exact_video()
    torch.testing.assert_close(
        ours(features, labels, protocol),
        plain(features, labels, protocol).float(),
        atol=1e-6,
        rtol=0,
    )
    without = ours(features, labels, replace(protocol, keep_ties=False))
    assert not torch.allclose(without, ours(features, labels, protocol), atol=1e-3)


def test_hard_queue_lends_one_hot_labels():
    features, labels = video(3, 4, 5)
    propagation = Propagation(features[0], labels, replace(DINO, soft_queue=False))
    first = propagation.step(features[1])
    assert ((first > 0.01) & (first < 0.99)).any()  # what is returned stays soft
    assert set(propagation.labels[1].unique().tolist()) == {0, 1}


def test_first_labels():
    mask = np.zeros((8, 12), np.uint8)
    mask[:, 6:], mask[0, 0] = 2, 5
    near = first_labels(mask, [0, 2, 5], (2, 3), "nearest")
    assert near[1].tolist() == [
        [0, 1, 1],
        [0, 1, 1],
    ]  # Pillow's nearest takes column 6 for the middle
    assert near[2].sum() == 0  # object 5 has no patch; its map stays
    linear = first_labels(mask, [0, 2, 5], (2, 3), "linear")
    assert linear.sum(0).tolist() == [[1] * 3] * 2
    assert linear[1, 0].tolist() == [0, 0.5, 1]  # between columns 5 and 6


def test_linear_labels_equal_opencv():
    import cv2

    rng = np.random.default_rng(0)
    mask = rng.integers(0, 3, (37, 61), dtype=np.uint8)
    ours = first_labels(mask, [0, 1, 2], (4, 7), "linear").permute(1, 2, 0).numpy()
    onehot = (mask[:, :, None] == np.arange(3)).astype(np.float32)
    np.testing.assert_allclose(ours, cv2.resize(onehot, (7, 4)), atol=1e-5)


def test_stretch():
    """DINO's norm_mask: to 0..1 each, but a map without a positive value stays; constants do not divide."""
    maps = torch.tensor(
        [[[0.2, 0.6], [0.4, 0.2]], [[0.0, 0.0], [0.0, 0.0]], [[0.3, 0.3], [0.3, 0.3]]]
    )
    torch.testing.assert_close(
        stretch(maps), torch.tensor([[[0, 1], [0.5, 0]], [[0, 0], [0, 0]], [[0, 0], [0, 0]]])
    )


def test_decide_both_ways():
    """Two patches: the border lies half way; at the frame's size it is drawn finer than at the input's."""
    soft = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    for upsample in ("patch", "frame"):
        ids = decide(soft, [0, 7], (8, 16), (9, 17), replace(DINO, upsample=upsample))
        assert ids.shape == (9, 17)
        assert set(ids.flatten().tolist()) == {0, 7}
        assert (ids[:, :8] == 0).all()
        assert (ids[:, 9:] == 7).all()
    faint = torch.tensor([[[0.9, 0.7]], [[0.1, 0.3]]])
    stretched = decide(faint, [0, 1], (8, 16), (8, 16), DINO)
    assert stretched[0, -1] == 1  # only min-max lets the fainter class win
    assert (decide(faint, [0, 1], (8, 16), (8, 16), replace(DINO, min_max=False)) == 0).all()
