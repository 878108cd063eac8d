import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import nn

from cmt_mae.evaluate.features import Features
from cmt_mae.evaluate.lars import LARS
from cmt_mae.evaluate.sweep import (
    Head,
    Heads,
    LinearProtocol,
    Training,
    cached_steps,
    fit_training,
    head_accuracy,
    make_heads,
    published,
    train_heads,
)

CPU = torch.device("cpu")


def blobs(n: int, classes: int, dim: int, seed: int, spread: float = 1.0) -> Features:
    """Gaussian clouds on two feature spaces; the centres do not depend on the seed."""
    fixed = torch.Generator().manual_seed(99)
    centres = 3 * torch.randn(classes, dim, generator=fixed)
    turn = torch.randn(dim, dim + 3, generator=fixed)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    x = centres[labels] + spread * torch.randn(n, dim, generator=generator)
    return Features({"a": x, "b": x @ turn}, labels)


def train(heads, training, features, classes, seed=0):
    dims = {pool: values.shape[1] for pool, values in features.pools.items()}
    return train_heads(
        heads,
        training,
        cached_steps(features, training, seed),
        dims=dims,
        classes=classes,
        steps_per_epoch=len(features) // training.batch_size,
        seed=seed,
        device=CPU,
    )


GRID = [
    Head(pool, blr, wd, norm)  # deliberately not in the order of the groups
    for blr in (0.05, 0.5)
    for wd in (0.0, 0.01)
    for norm in (True, False)
    for pool in ("b", "a")
]


def alone(head: Head, training: Training, features: Features, classes: int, seed: int):
    """The same head with torch's own modules, one epoch after the other."""
    x = features.pools[head.pool]
    linear = nn.Linear(x.shape[1], classes)
    generator = torch.Generator().manual_seed(seed)
    if training.init == "trunc_normal":
        nn.init.trunc_normal_(linear.weight, std=0.01, generator=generator)
    else:
        nn.init.normal_(linear.weight, std=0.01, generator=generator)
    nn.init.zeros_(linear.bias)
    norm = nn.BatchNorm1d(x.shape[1], affine=False, eps=1e-6) if head.norm else nn.Identity()
    model = nn.Sequential(norm, linear)
    lr = head.blr * training.batch_size / 256
    kind = LARS if training.optimizer == "lars" else torch.optim.SGD
    optimizer = kind(linear.parameters(), lr=lr, momentum=0.9, weight_decay=head.weight_decay)
    per_epoch = len(x) // training.batch_size
    order = torch.Generator().manual_seed(seed)
    for epoch in range(training.epochs):
        rows = torch.randperm(len(x), generator=order)
        for step in range(per_epoch):
            now = rows[step * training.batch_size : (step + 1) * training.batch_size]
            at = epoch + (step / per_epoch if training.lr_by == "step" else 0)
            share = min(1.0, at / training.warmup_epochs) if training.warmup_epochs else 1.0
            if at >= training.warmup_epochs:
                length = training.epochs - training.warmup_epochs
                done = (at - training.warmup_epochs) / length
                share = (1 + math.cos(math.pi * done)) / 2
            optimizer.param_groups[0]["lr"] = lr * share
            optimizer.zero_grad()
            F.cross_entropy(model(x[now]), features.labels[now]).backward()
            optimizer.step()
    return model.eval()


@pytest.mark.parametrize(
    "training",
    [
        Training("sgd", 3, 32, warmup_epochs=1.5),
        Training("sgd", 3, 50, lr_by="epoch", init="normal"),
        Training("lars", 3, 32, warmup_epochs=1),
    ],
)
@pytest.mark.parametrize("classes", [4, 70])
def test_side_by_side_equals_one_by_one(training, classes):
    features, test = blobs(150, classes, 6, seed=0), blobs(90, classes, 6, seed=1)
    together, _ = train(GRID, training, features, classes, seed=5)
    with torch.no_grad():
        logits = together(test.pools)
    for i, head in enumerate(GRID):
        one = alone(head, training, features, classes, seed=5)
        torch.testing.assert_close(together.weights[i], one[1].weight, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(together.biases[i], one[1].bias, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            expected = one(test.pools[head.pool])
        torch.testing.assert_close(logits[:, i], expected, rtol=1e-4, atol=1e-4)


def test_a_head_that_diverges_harms_no_other():
    features, test = blobs(120, 7, 5, seed=0), blobs(70, 7, 5, seed=1)
    training = Training("sgd", 40, 40)
    calm, wild = Head("a", 0.3, norm=False), Head("a", 1e30, 1e6, norm=False)
    both, losses = train([calm, wild], training, features, 7)
    single, _ = train([calm], training, features, 7)
    assert not both.weights[1].isfinite().all()
    assert math.isnan(losses[1])
    torch.testing.assert_close(both.weights[0], single.weights[0], rtol=1e-5, atol=1e-6)
    good, bad = head_accuracy(both, test, CPU)
    assert good["top1"] > 90
    assert bad == {"top1": 0, "top5": 0}


def test_accuracy_counts_every_image_once():
    model = Heads([Head("a", 1, norm=False), Head("a", 1, norm=False)], {"a": 7}, 7, "normal", 0)
    with torch.no_grad():
        model.weights[0].copy_(torch.eye(7))  # the highest feature is the class
        model.weights[1].copy_(-torch.eye(7))
    x = torch.rand(23, 7, generator=torch.Generator().manual_seed(0))
    labels = x.argmax(1)
    labels[:5] = x[:5].argsort(1, descending=True)[:, 4]  # fifth place: top5 only
    labels[5:7] = x[5:7].argmin(1)  # last place
    first, second = head_accuracy(model.eval(), Features({"a": x}, labels), CPU, chunk=4)
    assert first == pytest.approx({"top1": 100 * 16 / 23, "top5": 100 * 21 / 23})
    assert second["top1"] == pytest.approx(100 * 2 / 23)


def test_mae_protocol_agrees_with_logistic_regression():
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float32), torch.tensor(y)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    fit, rest = order[:1300], order[1300:]
    features, test = Features({"cls": x[fit]}, y[fit]), Features({"cls": x[rest]}, y[rest])
    protocol = replace(published("mae", 192, True), pools=("cls",), blrs=(0.1,))
    training = fit_training(protocol, 1300, epochs=None, batch_size=None, cached=True)
    assert (training.batch_size, training.epochs) == (1300, 2308)
    heads, _ = train(make_heads(protocol), training, features, 10)
    ours = head_accuracy(heads, test, CPU)[0]["top1"]
    theirs = LogisticRegression(max_iter=3000).fit(x[fit] / 16, y[fit])
    assert abs(ours - 100 * theirs.score(x[rest] / 16, y[rest])) < 3


def test_published_numbers():
    mae = published("mae", 768, True)
    assert mae.training == Training("lars", 90, 16384, warmup_epochs=10)
    assert make_heads(mae)[0] == Head("cls", 0.1, 0.0, True)
    assert mae.blrs[0] * mae.training.batch_size / 256 == pytest.approx(6.4)
    assert published("mae", 1024, True).training.epochs == 50
    assert published("milan", 768, True).blrs[0] == 0.05
    assert published("milan", 1024, True).blrs[0] == 0.02
    assert published("dino", 384, True).pools == ("blocks4",)
    assert published("dino", 768, True).pools == ("cls+mean",)
    assert published("mae", 768, False).pools == published("dino", 768, False).pools == ("mean",)
    rates = published("ibot", 768, True).blrs
    assert len(rates) == len(set(rates)) == 45
    assert (rates[0], min(rates), max(rates)) == (0.001, 0.0001, 9.0)
    assert len(make_heads(published("sweep", 768, True))) == 72


def test_fit_to_the_set():
    def fit(n: int, cached: bool = True, own: LinearProtocol | None = None, **given) -> Training:
        settings = {"epochs": None, "batch_size": None} | given
        return fit_training(own or published("mae", 768, True), n, cached=cached, **settings)

    assert fit(1_281_167) == Training("lars", 90, 16384, warmup_epochs=10)
    small = fit(9469)
    assert (small.batch_size, small.epochs) == (9469, 317)
    assert small.warmup_epochs == pytest.approx(317 / 9)
    assert fit(9469, cached=False).epochs == 90
    assert fit(9469, epochs=90).epochs == 90
    assert fit(9469, batch_size=512).batch_size == 512
    assert fit(2).epochs == 30_000
    assert fit(9469, own=published("ibot", 768, True)).epochs == 100
    for wrong in ({"n": 1}, {"n": 9, "batch_size": 1}, {"n": 9, "epochs": 0}):
        with pytest.raises(Exception, match="linear probe"):
            fit(**wrong)
