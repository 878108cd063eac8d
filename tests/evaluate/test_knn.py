import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

import cmt_mae.evaluate.knn as knn
from cmt_mae.core.errors import InputError
from cmt_mae.evaluate import KnnConfig, Result, evaluate_knn
from cmt_mae.evaluate.features import Features
from cmt_mae.evaluate.knn import knn_predict, nearest, pool_by_train

TEMPERATURE = 0.07


@pytest.fixture(scope="module")
def digits():
    x, y = load_digits(return_X_y=True)
    x = torch.tensor(x, dtype=torch.float32) + 0.01 * torch.randn(
        x.shape, generator=torch.Generator().manual_seed(0)
    )
    return x[:1000], torch.tensor(y[:1000]), x[1000:1400], torch.tensor(y[1000:1400])


def test_equals_scikit_learn(digits):
    x, y, queries, _ = digits
    ours = knn_predict(x, y, queries, k=(1, 10, 20), temperature=TEMPERATURE)
    for k, ranked in ours.items():
        theirs = KNeighborsClassifier(
            n_neighbors=k, metric="cosine", weights=lambda d: np.exp((1 - d) / TEMPERATURE)
        ).fit(x, y)
        share = theirs.predict_proba(queries)
        assert (ranked[:, 0].numpy() == theirs.predict(queries)).all()
        # the votes of the five ranked classes fall, and none left out has more than the fifth
        picked = np.take_along_axis(share, ranked.numpy(), 1)
        assert (np.diff(picked, axis=1) <= 1e-6).all()
        np.testing.assert_allclose(picked, -np.sort(-share, axis=1)[:, :5], atol=1e-6)


def test_small_chunks_change_nothing(digits, monkeypatch):
    x, y, queries, _ = digits
    whole = knn_predict(x, y, queries, k=(20,))[20]
    monkeypatch.setattr(knn, "SIMILARITIES", 7 * len(x))
    assert torch.equal(whole, knn_predict(x, y, queries, k=(20,))[20])


def test_votes_worked_out_by_hand():
    """Class 0 once at similarity 1, class 1 twice at .9: temperature decides who wins."""
    near, far = [0.9, (1 - 0.81) ** 0.5], [-1.0, 0.0]
    train = torch.tensor([[1.0, 0.0], near, near, far])
    labels = torch.tensor([0, 1, 1, 2])
    query = torch.tensor([[5.0, 0.0]])
    # exp(-.1 / T) * 2 against 1: equal at T = .1 / ln 2 = .1443
    for temperature, winner in ((0.14, 0), (0.15, 1)):
        ranked = knn_predict(train, labels, query, k=(3,), temperature=temperature)[3]
        assert ranked.tolist() == [[winner, 1 - winner, 2]]
    assert knn_predict(train, labels, query, k=(1,), temperature=1e-4)[1].tolist() == [[0, 1, 2]]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_nearest_is_a_stable_sort(data):
    rows, columns = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 12))
    values = st.lists(st.integers(0, 4), min_size=columns, max_size=columns)
    similarity = torch.tensor([data.draw(values) for _ in range(rows)]) / 4
    k = data.draw(st.integers(1, columns))
    found, index = nearest(similarity, k)
    for row in range(rows):
        expected = sorted(range(columns), key=lambda j: -similarity[row, j].item())[:k]
        assert index[row].tolist() == expected
        assert torch.equal(found[row], similarity[row, expected])


def test_equal_votes_go_to_the_lower_class():
    train = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    ranked = knn_predict(train, torch.tensor([3, 1]), torch.tensor([[1.0, 0.0]]), k=(1, 2))
    assert ranked[2].tolist()[0][:2] == [1, 3]
    assert ranked[1].tolist()[0][0] == 3  # the earlier of two equal neighbours


@pytest.mark.parametrize("k", [(), (0,), (10, 21)])
def test_impossible_k(k):
    with pytest.raises(InputError, match="between 1 and the 20 training images"):
        knn_predict(torch.randn(20, 2), torch.zeros(20, dtype=torch.int64), torch.randn(1, 2), k=k)
    with pytest.raises(InputError, match="temperature"):
        knn_predict(
            torch.randn(2, 2), torch.tensor([0, 1]), torch.randn(1, 2), k=(1,), temperature=0
        )


def test_evaluate(vit, pictures, tmp_path):
    config = KnnConfig(vit, pictures, out=str(tmp_path), k=(3, 5), device="cpu", workers=0)
    result = evaluate_knn(config)
    assert set(result.metrics) == {
        "top1", *(f"{p}/k{k}/top1" for p in ("cls", "mean", "cls+mean") for k in (3, 5))
    }
    pool = result.details["pool"]
    assert result.details["held_out_top1"][pool] == max(result.details["held_out_top1"].values())
    assert result.headline == result.metrics[f"{pool}/k5/top1"]
    assert result.metrics["mean/k5/top1"] == 100
    assert (result.data["train"], result.data["val"], result.data["classes"]) == (27, 15, 3)
    (file,) = (tmp_path / "results").iterdir()
    assert Result.load(file) == result
    assert evaluate_knn(config).identity() == result.identity()


def test_the_pool_to_quote_is_chosen_by_training_images_alone(vit, pictures):
    """Of two pools one tells the classes apart; what the validation images say of them does not matter."""
    torch.manual_seed(0)
    labels = torch.arange(100) % 4
    good = torch.eye(4)[labels] + 0.1 * torch.randn(100, 4)
    train = Features({"noise": torch.randn(100, 4), "good": good}, labels)
    scores = pool_by_train(train, 5, 0.07)
    assert scores["good"] == 100.0
    assert scores["noise"] < 60
    assert pool_by_train(train, 5, 0.07) == scores
    tiny = Features({"a": good[:4], "b": good[:4]}, labels[:4])
    assert pool_by_train(tiny, 20, 0.07) == {"a": 0.0, "b": 0.0}, "too few to choose by"
    given = evaluate_knn(KnnConfig(vit, pictures, pools=("mean", "cls"), k=(3,), device="cpu", workers=0))
    assert given.protocol["headline"] == "mean/k3/top1"


def test_evaluate_refuses_first(vit, pictures):
    with pytest.raises(InputError, match="27 training images"):
        evaluate_knn(KnnConfig(vit, pictures, k=(28,), device="cpu", workers=0))
    with pytest.raises(InputError, match=r"device is .tpu.: give one"):
        evaluate_knn(KnnConfig(vit, pictures, device="tpu"))
