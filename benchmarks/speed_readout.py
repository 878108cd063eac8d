"""Reading a backbone out: features, k-NN and a sweep of linear heads, against plain loops and scikit-learn."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, v2

from benchmarks.speed_timing import OURS, Comparison, Options, alternate
from cmt_mae.backbones import Backbone, load_backbone
from cmt_mae.data.sources import open_source
from cmt_mae.evaluate.features import Features, extract
from cmt_mae.evaluate.knn import knn_predict
from cmt_mae.evaluate.sweep import Head, Training, cached_steps, train_heads, warmup_cosine

BACKBONES = {
    "small": "embedded",
    "vits16": "vit_small_patch16_224",
    "vitb16": "vit_base_patch16_224",
}
CPU = torch.device("cpu")


# --- features --------------------------------------------------------------------------------------


def compare_features(options: Options) -> Iterator[dict[str, Any]]:
    """Class token and mean of patches of labelled photos, image files to (N, D)."""
    for size in options.sizes:
        torch.manual_seed(0)
        name = BACKBONES[size]
        backbone = load_backbone(name, pretrained=name == "embedded")
        count = 8 if options.quick else {"small": 160}.get(size, 32)
        with tempfile.TemporaryDirectory() as folder:
            copy_some(options.shared / "data" / "imagenette" / "val", Path(folder), count)
            source = open_source(folder)
            found: dict[str, Tensor] = {}

            def ours(
                backbone: Backbone = backbone, source: Any = source, found: Any = found
            ) -> None:
                features = extract(
                    backbone, source, device=CPU, pools=("cls", "mean"), batch_size=16, workers=0
                )
                found[OURS] = features.pools["mean"]

            plain = plain_features(backbone, Path(folder), found)
            comparison = Comparison(
                "features", f"features/{size}",
                f"Features of {len(source)} photos of Imagenette by {name} at {backbone.img_size[0]} px, batches "
                "of 16, no loader processes; plain: ImageFolder, v2.Resize and CenterCrop on PIL images, a loop "
                "over forward_features.",
                len(source), facts={"dtype": "fp32"},
            )  # fmt: skip
            seconds = alternate({OURS: ours, "plain loop": plain}, options.rounds, comparison.name)
            cosine = F.cosine_similarity(found[OURS], found["plain loop"]).min()
            comparison.facts["least_cosine_between_both"] = float(cosine)
            yield comparison.measured(seconds)


def copy_some(path: Path, folder: Path, count: int) -> None:
    """The first images of every class."""
    classes = sorted(p for p in path.iterdir() if p.is_dir())
    for each in classes:
        (folder / each.name).mkdir()
        for file in sorted(each.iterdir())[: max(1, count // len(classes))]:
            shutil.copy(file, folder / each.name / file.name)


def plain_features(
    backbone: Backbone, folder: Path, found: dict[str, Tensor]
) -> Callable[[], object]:
    """The usual evaluation loop."""
    side = backbone.img_size[0]
    transform = v2.Compose(
        [
            v2.Resize(round(side * 256 / 224), interpolation=InterpolationMode.BICUBIC),
            v2.CenterCrop(side),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(backbone.mean, backbone.std),
        ]
    )
    loader = DataLoader(ImageFolder(str(folder), transform), batch_size=16)
    model: Any = backbone.model

    @torch.no_grad()
    def run() -> None:
        means = []
        for images, _ in loader:
            tokens = model.forward_features(images)
            means.append(tokens[:, backbone.prefix_tokens :].mean(1))
        found["plain loop"] = torch.cat(means)

    return run


# --- k-NN --------------------------------------------------------------------------------------------


def clusters(n: int, width: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features of overlapping classes, so that neighbours matter."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(0, classes, (n,), generator=generator)
    return centres[labels] + 4 * torch.randn(n, width, generator=generator), labels


def compare_knn(options: Options) -> Iterator[dict[str, Any]]:
    """Weighted k-NN by cosine, exact, against KNeighborsClassifier."""
    from sklearn.neighbors import KNeighborsClassifier

    n, m = (500, 100) if options.quick else (20_000, 2_000)
    (train, labels), (test, _) = clusters(n, 384, 100, 0), clusters(m, 384, 100, 1)
    answers: dict[str, Any] = {}

    def ours() -> None:
        answers[OURS] = knn_predict(train, labels, test, k=[20], temperature=0.07, classes=100)[20][
            :, 0
        ]

    def theirs() -> None:
        model = KNeighborsClassifier(
            20, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
        )
        model.fit(train.numpy(), labels.numpy())
        answers["scikit-learn"] = torch.from_numpy(model.predict(test.numpy()))

    comparison = Comparison(
        "knn", "knn",
        f"The class of {m} queries by the 20 most similar of {n} features (width 384, 100 classes), votes "
        "weighted by exp(cosine / 0.07). scikit-learn: KNeighborsClassifier, cosine, brute force, same weights.",
        m, unit="queries", target={"scikit-learn": 1.0},
    )  # fmt: skip
    seconds = alternate({OURS: ours, "scikit-learn": theirs}, options.rounds, comparison.name)
    same = (answers[OURS] == answers["scikit-learn"]).double().mean()
    comparison.facts["share_of_equal_answers"] = float(same)
    yield comparison.measured(seconds)


# --- sweep --------------------------------------------------------------------------------------------


def compare_sweep(options: Options) -> Iterator[dict[str, Any]]:
    """All heads of a sweep in one pass against one training after the other."""
    n, classes = (256, 10) if options.quick else (4096, 10)
    training = Training("sgd", 1 if options.quick else 5, 128, warmup_epochs=1)
    x, labels = clusters(n, 384, classes, 0)
    features = Features({"mean": x}, labels)
    rates = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
    heads = [
        Head("mean", blr, wd, norm) for norm in (True, False) for blr in rates for wd in (0.0, 1e-3)
    ]
    weights: dict[str, list[Tensor]] = {}

    def ours() -> None:
        trained, _ = train_heads(
            heads, training, cached_steps(features, training, 0), dims={"mean": 384}, classes=classes,
            steps_per_epoch=n // training.batch_size, seed=0, device=CPU,
        )  # fmt: skip
        weights[OURS] = [w.detach() for w in trained.weights]

    def one_by_one() -> None:
        weights["one by one"] = [plain_head(head, training, features, classes) for head in heads]

    comparison = Comparison(
        "sweep", "sweep",
        f"{len(heads)} linear heads (6 rates x 2 weight decays x with and without BatchNorm) on {n} features of "
        f"width 384, {training.epochs} epochs of SGD in batches of {training.batch_size}; one by one: the plain "
        "loop with BatchNorm1d, Linear and torch.optim.SGD for each, same first weights and order.",
        len(heads), unit="heads", target={"one by one": 5.0},
    )  # fmt: skip
    seconds = alternate({OURS: ours, "one by one": one_by_one}, options.rounds, comparison.name)
    pairs = zip(weights[OURS], weights["one by one"], strict=True)
    comparison.facts["largest_difference_of_weights"] = max(
        float((a - b).abs().max()) for a, b in pairs
    )
    yield comparison.measured(seconds)


def plain_head(head: Head, training: Training, features: Features, classes: int) -> Tensor:
    """Train one head as anyone would; its weights."""
    x, labels = features.pools["mean"], features.labels
    linear = nn.Linear(x.shape[1], classes)
    nn.init.trunc_normal_(linear.weight, std=0.01, generator=torch.Generator().manual_seed(0))
    nn.init.zeros_(linear.bias)
    norm = nn.BatchNorm1d(x.shape[1], affine=False, eps=1e-6)
    model = nn.Sequential(norm, linear) if head.norm else linear
    lr = head.blr * training.batch_size / 256
    optimizer = torch.optim.SGD(
        model.parameters(), lr, momentum=0.9, weight_decay=head.weight_decay
    )
    generator = torch.Generator().manual_seed(0)
    steps = len(x) // training.batch_size
    step = 0
    for _ in range(training.epochs):
        order = torch.randperm(len(x), generator=generator)[: steps * training.batch_size]
        for rows in order.split(training.batch_size):
            share = warmup_cosine(step / steps, training.epochs, training.warmup_epochs)
            optimizer.param_groups[0]["lr"] = lr * share
            loss = F.cross_entropy(model(x[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    return linear.weight.detach()
