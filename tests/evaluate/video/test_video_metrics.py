"""J and F against vos-benchmark (a port of the official code), spec 12.6 and hand counts."""


import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from skimage.morphology import disk

from cmt_mae.core.errors import InputError
from cmt_mae.evaluate.video.metrics import (
    boundary_measure,
    dilate,
    jaccard,
    outlines,
    score_frame,
    statistics,
)


def oracle(predicted, truth, objects):
    """vos-benchmark's J and F of one frame."""
    from vos_benchmark.evaluator import Evaluator

    evaluator = Evaluator()
    evaluator.feed_frame(predicted, truth)
    j = [evaluator.object_iou[i][0] if i in evaluator.object_iou else 1.0 for i in objects]
    f = [evaluator.boundary_f[i][0] if i in evaluator.boundary_f else 1.0 for i in objects]
    return np.array(j, float), np.array(f, float)


def check(predicted, truth, objects):
    ours, theirs = score_frame(predicted, truth, objects), oracle(predicted, truth, objects)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(ours[1], theirs[1], rtol=0, atol=1e-12)


def square(shape, top, left, side):
    mask = np.zeros((1, *shape), bool)
    mask[0, top : top + side, left : left + side] = True
    return mask


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_noise_equals_vos_benchmark(data):
    """Masks of single pixels everywhere: the hardest outlines."""
    shape = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    ids = hnp.arrays(np.uint8, shape, elements=st.integers(0, 3))
    check(data.draw(ids), data.draw(ids), (1, 2, 3))


def blobs(rng, shape, count):
    """Overlapping ellipses, rectangles and lines, some cut by the border."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    ids = np.zeros(shape, np.uint8)
    for i in range(1, count + 1):
        cy, cx = rng.uniform(0, shape[0]), rng.uniform(0, shape[1])
        ry, rx = rng.uniform(1, shape[0] / 2), rng.uniform(1, shape[1] / 2)
        kind = rng.integers(4)
        if kind == 0:
            ids[((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1] = i
        elif kind == 1:
            ids[(abs(y - cy) < ry) & (abs(x - cx) < rx)] = i
        elif kind == 2:
            ids[abs((y - cy) * rx - (x - cx) * ry) < 40] = i
    return ids  # kind 3: the object is missing


@pytest.mark.parametrize("shape", [(120, 200), (200, 120), (97, 101), (480, 854)])
def test_shapes_equal_vos_benchmark(shape):
    """Moved, torn and missing objects at sizes whose radius is 2 to 8 pixels."""
    rng = np.random.default_rng(shape[0])
    for _ in range(4 if shape[0] == 480 else 25):
        truth = blobs(rng, shape, 4)
        predicted = np.roll(truth, rng.integers(-12, 13, 2), (0, 1))
        predicted[rng.random(shape) < rng.choice([0, 0.02])] = rng.integers(5)
        check(predicted, truth, (1, 2, 3, 4))


SMALL, LARGE = (20, 20), (480, 854)


@pytest.mark.parametrize(
    ("shape", "side", "at", "shift", "j", "f"),
    [
        (SMALL, 10, 5, 1, 0.8181818, 1.0),
        (SMALL, 10, 5, 2, 0.6666667, 0.55),
        (SMALL, 10, 5, 3, 0.5384615, 0.5),
        (LARGE, 100, 200, 4, 0.9230769, 1.0),
        (LARGE, 100, 200, 8, 0.8518519, 1.0),
        (LARGE, 100, 200, 9, 0.8348624, 0.54),
        (LARGE, 100, 200, 20, 0.6666667, 0.485),
    ],
)
def test_shifted_squares_of_the_specification(shape, side, at, shift, j, f):
    truth, moved = square(shape, at, at, side), square(shape, at, at + shift, side)
    assert jaccard(moved, truth)[0] == pytest.approx(j, abs=1e-7)
    assert boundary_measure(moved, truth)[0] == pytest.approx(f, abs=1e-4)


def test_other_values_of_the_specification():
    truth, eroded, empty = (
        square(SMALL, 5, 5, 10),
        square(SMALL, 7, 7, 6),
        np.zeros((1, 20, 20), bool),
    )
    assert (jaccard(eroded, truth)[0], boundary_measure(eroded, truth)[0]) == (0.36, 0)
    assert (jaccard(empty, empty)[0], boundary_measure(empty, empty)[0]) == (1, 1)
    for pair in ((empty, truth), (truth, empty)):
        assert (jaccard(*pair)[0], boundary_measure(*pair)[0]) == (0, 0)
    full = ~empty
    assert boundary_measure(full, full)[0] == 1
    assert np.count_nonzero(outlines(truth)) == 40
    corner = np.zeros((1, 4, 5), bool)
    corner[0, 1:3, 1:4] = True
    drawn = ["".join(map(str, row)) for row in outlines(corner)[0].astype(int)]
    assert drawn == ["11110", "10010", "11110", "00000"]
    assert statistics([1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]) == pytest.approx((0.65, 0.625, 0.5))


def test_void_pixels_do_not_count():
    truth, predicted, void = (np.zeros((2, 200, 200), bool) for _ in range(3))
    truth[:, 100:150, 100:150] = True
    void[:, 50:100, 100:150] = True
    predicted[:, 50:150, 100:150] = True
    assert jaccard(predicted, truth, void).tolist() == [1, 1]
    assert boundary_measure(predicted, truth, void).tolist() == [1, 1]
    assert jaccard(predicted, truth).tolist() == [0.5, 0.5]


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(bool, st.tuples(st.integers(1, 3), st.integers(1, 15), st.integers(1, 15))),
    st.integers(0, 9),
)
def test_dilation_is_a_disc(maps, radius):
    grown = dilate(maps, radius)
    padded = np.pad(maps, ((0, 0), (radius, radius), (radius, radius)))
    wanted = np.zeros_like(maps)
    for dy, dx in zip(*disk(radius).nonzero(), strict=True):
        wanted |= padded[:, dy : dy + maps.shape[1], dx : dx + maps.shape[2]]
    np.testing.assert_array_equal(grown, wanted)


def test_missing_objects_are_empty_and_extra_ones_refused():
    truth = np.array([[0, 1], [2, 0]], np.uint8)
    j, f = score_frame(np.array([[0, 1], [0, 0]], np.uint8), truth, (1, 2))
    assert j.tolist() == [1, 0]
    assert f.shape == (2,)
    with pytest.raises(InputError, match=r"holds object 3, but the sequence has only \[1, 2\]"):
        score_frame(np.array([[0, 3], [2, 0]], np.uint8), truth, (1, 2))
    with pytest.raises(InputError, match="has 3 x 2 pixels, the true one 2 x 2"):
        score_frame(np.zeros((2, 3), np.uint8), truth, (1, 2))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 48, 300])
def test_statistics_of_any_length(count):
    values = np.linspace(0.9, 0.1, count)
    mean, recall, decay = statistics(values)
    assert mean == pytest.approx(values.mean())
    assert recall == (values > 0.5).mean()
    assert (decay > 0) == (count > 1)
