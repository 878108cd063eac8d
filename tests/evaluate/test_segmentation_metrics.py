"""mIoU, mAcc, aAcc against torchmetrics and scikit-learn; sliding windows against a loop over pixels."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import confusion_matrix as sklearn_confusion
from torch import Tensor
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassJaccardIndex,
)

from cmt_mae.evaluate.miou import confusion_matrix, counts, intervals, scores
from cmt_mae.evaluate.segmentation_pictures import class_colours
from cmt_mae.evaluate.slide import resized_argmax, slide_logits, window_starts


@given(st.integers(2, 9), st.integers(1, 400), st.integers(0, 999), st.integers(1, 9))
@settings(deadline=None, max_examples=60)
def test_numbers_are_those_of_the_oracles(classes: int, n: int, seed: int, used: int) -> None:
    """Truth of the first ``used`` classes only: some are absent, or predicted and absent."""
    rng = np.random.default_rng(seed)
    truth = torch.from_numpy(rng.integers(-1, min(used, classes), n))
    prediction = torch.from_numpy(rng.integers(0, int(rng.integers(1, classes + 1)), n))
    found = confusion_matrix(prediction, truth, classes)
    oracle = MulticlassConfusionMatrix(classes, ignore_index=-1)(prediction, truth)
    assert torch.equal(found, oracle)
    labelled = truth >= 0
    if labelled.any():
        sk = sklearn_confusion(truth[labelled], prediction[labelled], labels=range(classes))
        assert np.array_equal(found.numpy(), sk)
    result = scores(found)
    iou = MulticlassJaccardIndex(classes, average="none", ignore_index=-1)(prediction, truth)
    recall = MulticlassAccuracy(classes, average="none", ignore_index=-1)(prediction, truth)
    present = [bool((truth == k).any()) for k in range(classes)]
    said = [bool((prediction[labelled] == k).any()) for k in range(classes)]
    kept = [k for k in range(classes) if present[k] or said[k]]
    for k in range(classes):
        assert math.isnan(result.iou[k]) == (k not in kept)
        assert math.isnan(result.accuracy[k]) == (not present[k])
    if not labelled.any():
        assert math.isnan(result.miou)
        assert math.isnan(result.aacc)
        return
    assert result.iou[kept].numpy() == pytest.approx(iou[kept].numpy(), abs=1e-6)
    assert result.miou == pytest.approx(iou[kept].double().mean().item(), abs=1e-6)
    assert result.macc == pytest.approx(recall[torch.tensor(present)].mean().item(), abs=1e-6)
    right = (prediction == truth)[labelled].double().mean().item()
    assert result.aacc == pytest.approx(right, abs=1e-12)


def test_intervals_over_images_are_scipys_bootstrap() -> None:
    """30 images of three classes, the third in few of them; each is right in a part of its own."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(-1, 2, (30, 16, 16), generator=generator)
    truth[:6, :8] = 2
    wrong = torch.rand(30, 1, 1, generator=generator) > torch.rand(30, 16, 16, generator=generator)
    prediction = torch.where(wrong, torch.randint(0, 3, truth.shape, generator=generator), truth.relu())
    confusions = torch.stack([confusion_matrix(p, t, 3) for p, t in zip(prediction, truth, strict=True)])
    found = intervals(torch.stack([counts(one) for one in confusions]))
    whole = scores(confusions.sum(0))
    for name in ("mIoU", "mAcc", "aAcc"):
        oracle = stats.bootstrap(
            (np.arange(30),),
            lambda rows, name=name: 100 * getattr(scores(confusions[rows].sum(0)), name.lower()),
            n_resamples=2000, vectorized=False, method="percentile", rng=1,
        ).confidence_interval  # fmt: skip
        assert found[name] == pytest.approx(list(oracle), abs=0.15 * (oracle.high - oracle.low))
        assert found[name][0] < 100 * getattr(whole, name.lower()) < found[name][1]
    alike = counts(confusions[0]).expand(5, 3, 3)
    assert intervals(alike)["mIoU"] == pytest.approx([100 * scores(confusions[0]).miou] * 2)
    assert intervals(alike[:1]) == {}


# --- windows ------------------------------------------------------------------------------------


def test_windows_of_the_protocol() -> None:
    assert window_starts(512, 512, 341) == [0]
    assert window_starts(683, 512, 341) == [0, 171]  # a second one moved back to the border
    assert window_starts(853, 512, 341) == [0, 341]
    assert window_starts(854, 512, 341) == [0, 341, 342]
    assert window_starts(1024, 512, 341) == [0, 341, 512]
    assert window_starts(300, 512, 341) == [0]


@given(st.integers(1, 200), st.integers(1, 60), st.data())
def test_windows_cover_a_side(length: int, window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, window))
    starts = window_starts(length, window, stride)
    seen = {p for s in starts for p in range(s, min(s + window, length))}
    assert seen == set(range(length))
    assert len(set(starts)) == len(starts)
    assert starts[-1] == max(0, length - window)
    assert all(b - a <= stride for a, b in itertools.pairwise(starts))


def test_logits_are_the_mean_over_the_windows_that_see_a_pixel() -> None:
    """A "network" whose answer depends on the place in the window, so that windows disagree."""
    torch.manual_seed(0)
    image, window, stride, classes = torch.randn(3, 30, 47), 16, 11, 4
    mix, place = torch.randn(classes, 3), torch.randn(classes, window, window)
    batches = []

    def predict(windows: Tensor) -> Tensor:
        batches.append(len(windows))
        out = torch.einsum("kc,bchw->bkhw", mix, windows)
        return out + place[:, : windows.shape[2], : windows.shape[3]]

    found = slide_logits(predict, image, classes, window, stride)
    tops, lefts = [0, 11, 14], [0, 11, 22, 31]
    assert sum(batches) == len(tops) * len(lefts)
    assert max(batches) <= 8
    for y, x in [(0, 0), (15, 15), (29, 46), (12, 40), (14, 31), (29, 0), (20, 25)]:
        answers = [
            mix @ image[:, y, x] + place[:, y - t, x - s]
            for t in tops
            for s in lefts
            if t <= y < t + window and s <= x < s + window
        ]
        assert len(answers) >= 1
        torch.testing.assert_close(found[:, y, x], torch.stack(answers).mean(0))


@given(st.integers(1, 40), st.integers(1, 30), st.integers(1, 30), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_argmax_of_resized_logits_a_few_classes_at_a_time(
    classes: int, height: int, width: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-3, 4, (classes, 7, 9), generator=generator).float()  # many ties
    size = (height, width)
    whole = F.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0]
    found = resized_argmax(logits, size)
    value = whole.gather(0, found[None])[0]
    assert torch.equal(value, whole.max(0).values)
    lower = torch.arange(classes)[:, None, None] < found
    assert not ((whole == value) & lower).any()  # ties: the lower class


def test_classes_have_colours_that_can_be_told_apart() -> None:
    colours = class_colours(150)
    assert np.array_equal(colours[:11], class_colours(11))
    apart = np.linalg.norm(colours[:, None] - colours[None], axis=2) + 9 * np.eye(150)
    assert apart.min() > 0.1
    assert apart[:20, :20].min() > 0.35
