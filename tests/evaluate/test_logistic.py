"""Logistic regression on frozen features, against scikit-learn's."""

import numpy as np
import pytest
import torch
from rich.progress import Progress
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import cmt_mae.evaluate.logistic as logistic
from cmt_mae.core.errors import InputError
from cmt_mae.engine import progress as engine_progress
from cmt_mae.evaluate import LinearConfig, evaluate_linear
from cmt_mae.evaluate.features import Features
from cmt_mae.evaluate.logistic import STRENGTHS, fit_logistic, logistic_probe, make_folds, search

CPU, QUIET = torch.device("cpu"), Progress(disable=True)


@pytest.fixture(scope="module")
def digits() -> tuple[Features, Features]:
    """Handwritten digits as two features, the second one worse; 300 to train on, 400 to look at."""
    x, y = load_digits(return_X_y=True)
    rows = np.random.default_rng(0).permutation(len(x))[:700]
    x, y = torch.from_numpy(x[rows]).float(), torch.from_numpy(y[rows]).long()
    pools = {"part": x[:, 24:32].contiguous(), "whole": x}
    parts = [
        Features({k: v[s] for k, v in pools.items()}, y[s]) for s in (slice(300), slice(300, None))
    ]
    return parts[0], parts[1]


@pytest.mark.parametrize("strength", [1e-3, 1e-1, 10.0])
def test_the_minimum_is_scikit_learns(digits, strength):
    train, val = digits
    x, y = train.pools["whole"], train.labels
    assert (x.std(0) == 0).any()  # the corners of the pictures are always empty
    ours = fit_logistic(x, y, 10, strength)
    theirs = make_pipeline(
        StandardScaler(), LogisticRegression(C=strength, tol=1e-8, max_iter=10000)
    ).fit(x.double().numpy(), y.numpy())
    scale = np.abs(theirs[-1].coef_).max()
    assert np.abs(ours.weight.numpy() - theirs[-1].coef_).max() < 0.01 * scale
    seen = val.pools["whole"]
    probability = ours.logits(seen).softmax(1).numpy()
    assert np.abs(probability - theirs.predict_proba(seen.double().numpy())).max() < 0.02
    again = fit_logistic(x, y, 10, strength, start=fit_logistic(x, y, 10, 1e-5))
    torch.testing.assert_close(again.weight, ours.weight, rtol=0, atol=0.01 * scale)


def test_within_one_point_of_scikit_learns_cross_validation(digits):
    train, val = digits
    metrics, details = logistic_probe(train, val, 10, 0, CPU, QUIET)
    grid = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)),
        {"logisticregression__C": STRENGTHS[::2]},
        cv=5,
    ).fit(train.pools["whole"].numpy(), train.labels.numpy())
    theirs = 100 * grid.score(val.pools["whole"].numpy(), val.labels.numpy())
    assert abs(metrics["top1"] - theirs) <= 1
    assert details["quoted"]["pool"] == "whole"
    assert metrics["whole/top1"] == metrics["top1"] > metrics["part/top1"] + 10
    assert metrics["top5"] > metrics["top1"]


def test_the_choice_does_not_look_at_validation_labels(digits):
    train, val = (Features({"part": one.pools["part"]}, one.labels) for one in digits)
    wrong = Features(val.pools, val.labels.flip(0))
    choices = [logistic_probe(train, v, 10, 0, CPU, QUIET)[1] for v in (val, wrong)]
    assert choices[0]["search"] == choices[1]["search"]
    assert choices[0]["quoted"]["C"] == choices[1]["quoted"]["C"]
    assert choices[1]["quoted"]["top1"] < 20


def test_folds_hold_every_image_once_and_every_class_evenly(monkeypatch):
    labels = [0] * 50 + [1] * 25 + [2] * 3
    folds = make_folds(labels, 0)
    assert sorted(np.concatenate(folds).tolist()) == list(range(78))
    counts = np.stack([np.bincount(np.array(labels)[fold], minlength=3) for fold in folds])
    assert (counts.max(0) - counts.min(0) <= 1).all()
    assert not np.array_equal(folds[0], make_folds(labels, 1)[0])
    assert len(make_folds([0, 1, 0], 0)) == 3
    monkeypatch.setattr(logistic, "ONE_FOLD_FROM", 78)
    (only,) = make_folds(labels, 0)
    assert np.array_equal(only, folds[0])


def test_the_search_ends_where_nothing_gets_better():
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2
    x = labels[:, None] + 0.1 * torch.randn(60, 4, generator=rng)  # right at every strength
    table = search(x, labels, 2, 0, lambda: None)
    assert [row["held_out_top1"] for row in table] == [100.0] * (1 + logistic.PATIENCE)


def test_it_is_the_default_and_refuses_what_trains_heads(vit, pictures, capsys, monkeypatch):
    monkeypatch.setattr(engine_progress, "LINE_SECONDS", 0.0)
    settings = {"device": "cpu", "workers": 0}
    result = evaluate_linear(LinearConfig(vit, pictures, **settings))
    assert result.protocol["name"] == "logistic"
    assert result.headline == 100
    assert set(result.metrics) == {"top1", "cls/top1", "mean/top1", "cls+mean/top1"}
    assert [row["pool"] for row in result.details["heads"]] == ["cls", "mean", "cls+mean"]
    lines = capsys.readouterr().err.splitlines()  # no terminal here: lines and no bar
    assert "features of train: 1 of 1" in lines
    assert any(line.startswith("logistic regression on cls: ") for line in lines)
    evaluate_linear(LinearConfig(vit, pictures, progress=False, **settings))
    assert capsys.readouterr().err == ""
    for change in ({"augment": True}, {"epochs": 5}, {"blr": (0.1,)}):
        with pytest.raises(InputError, match="add --protocol mae"):
            evaluate_linear(LinearConfig(vit, pictures, **settings, **change))
