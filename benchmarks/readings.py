"""Loading images and reading networks out, against public code: loader, features, k-NN, linear heads, J and F."""

import itertools
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import timm.data
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, v2

from benchmarks.timing import OURS, Comparison, alternate
from cmt_mae.backbones import Backbone, load_backbone
from cmt_mae.data import jpeg
from cmt_mae.data.loader import CropSettings, pretrain_batches
from cmt_mae.data.pack import PackConfig, pack
from cmt_mae.data.sources import open_source
from cmt_mae.evaluate.features import Features, extract
from cmt_mae.evaluate.knn import knn_predict
from cmt_mae.evaluate.sweep import Head, Training, cached_steps, train_heads, warmup_cosine
from cmt_mae.evaluate.video.metrics import score_frame

BACKBONES = {
    "small": "embedded",
    "vits16": "vit_small_patch16_224",
    "vitb16": "vit_base_patch16_224",
}
CPU = torch.device("cpu")


# --- features --------------------------------------------------------------------------------------


def compare_features(options: Any) -> Iterator[dict[str, Any]]:
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
            seconds = alternate({OURS: ours, "plain loop": plain}, options.rounds)
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


def compare_knn(options: Any) -> Iterator[dict[str, Any]]:
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
    seconds = alternate({OURS: ours, "scikit-learn": theirs}, options.rounds)
    same = (answers[OURS] == answers["scikit-learn"]).double().mean()
    comparison.facts["share_of_equal_answers"] = float(same)
    yield comparison.measured(seconds)


# --- sweep --------------------------------------------------------------------------------------------


def compare_sweep(options: Any) -> Iterator[dict[str, Any]]:
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
    seconds = alternate({OURS: ours, "one by one": one_by_one}, options.rounds)
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


# --- loader --------------------------------------------------------------------------------------

SIZE = 224
SCALE = (0.2, 1.0)
MOSAIC = (4000, 3000)
WHOLE = "ours, whole pictures"
PILLOW = "ours, by Pillow"
PACKED = "ours, packed"


def compare_loader(options: Any) -> Iterator[dict[str, Any]]:
    """Random crops of 224 px from full-size photos, packed arrays, Imagenette, and pictures of 12 megapixels."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    data = options.shared / "data"
    try:
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            count = 20 if options.quick else 60
            yield photos_entry(data / "photos", count, folder, options, 224, 256)
            yield photos_entry(data / "photos", count, folder, options, 96, 128)
            yield imagenette_entry(data / "imagenette/train", 20 if options.quick else 240, options)
            yield camera_entry(data / "photos", 1 if options.quick else 10, folder, options)
    finally:
        torch.set_num_threads(threads)


HOW = (
    "random crops (scale 0.2 to 1, bicubic, flip) as uint8 batches, in one process with one thread. "
    "torchvision: ImageFolder, v2.RandomResizedCrop on PIL images. timm: its create_loader. Both stop at uint8 "
    "here, which spares them the normalisation that they usually do in the loader. "
)


def photos_entry(
    path: Path, count: int, folder: Path, options: Any, size: int, packed: int
) -> dict[str, Any]:
    """Photos of the usual size of ImageNet, each means alone, and the same photos packed."""
    view, pack_path = folder / "view", folder / f"packed{packed}"
    if not view.exists():  # ImageFolder wants class folders
        view.mkdir()
        (view / "all").symlink_to(path, target_is_directory=True)
    pack(PackConfig(data=str(path), out=str(pack_path), size=packed, workers=0))
    contestants = {
        OURS: ours(path, count, size=size),
        WHOLE: with_patch("read_header", lambda *_: None, ours(path, count, size=size)),
        PILLOW: with_patch("simplejpeg", None, ours(path, count, size=size)),
        PACKED: ours(pack_path, count, size=size),
        "torchvision": torchvision_loader(view, count, size=size),
        "timm": timm_loader(view, count, size=size),
    }
    comparison = Comparison(
        "loader", f"loader/photos_{size}px",
        f"Crops of {size} px of {count} photos of about 500 x 375 px, 20 a batch: {HOW}'{WHOLE}' decodes no part, "
        f"'{PILLOW}' does without simplejpeg, '{PACKED}' reads what `cmt-mae pack --size {packed}` made of them.",
        count, target={"torchvision": 2.0}, facts={"size": size, "packed_size": packed},
    )  # fmt: skip
    entry = comparison.measured(alternate(contestants, options.rounds))
    rows = entry["contestants"]
    pairs = zip(rows["torchvision"]["seconds"], rows[PACKED]["seconds"], strict=True)
    entry["facts"]["packed_over_torchvision"] = statistics.median(a / b for a, b in pairs)
    entry["facts"]["packed_over_torchvision_wanted"] = 20.0
    return entry


def imagenette_entry(path: Path, count: int, options: Any) -> dict[str, Any]:
    """Pictures of just the size wanted."""
    contestants = {
        OURS: ours(path, count),
        "torchvision": torchvision_loader(path, count),
        "timm": timm_loader(path, count),
    }
    comparison = Comparison(
        "loader", "loader/imagenette",
        f"Crops of {SIZE} px of {count} pictures of 224 x 224 px, 20 a batch: {HOW}", count,
        target={"torchvision": 2.0}, facts={"size": SIZE},
    )  # fmt: skip
    return comparison.measured(alternate(contestants, options.rounds))


def camera_entry(path: Path, count: int, folder: Path, options: Any) -> dict[str, Any]:
    """Pictures as large as a camera's: mosaics of photos, for no such photos are at hand."""
    view = folder / "camera"
    mosaics(path, view / "all", count)
    contestants = {
        OURS: ours(view, count, batch=count),
        "ours, not shrunk": ours(view, count, batch=count, shrink=False),
        "torchvision": torchvision_loader(view, count, batch=count),
        "timm": timm_loader(view, count, batch=count),
    }
    comparison = Comparison(
        "loader", "loader/camera",
        f"Crops of {SIZE} px of {count} JPEG mosaics of photos, {MOSAIC[0]} x {MOSAIC[1]} px, {count} a batch: "
        f"{HOW}'ours, not shrunk' decodes the rows of a crop at full size.",
        count, target={"torchvision": 2.0}, facts={"size": SIZE},
    )  # fmt: skip
    return comparison.measured(alternate(contestants, options.rounds))


def mosaics(path: Path, out: Path, count: int) -> None:
    """``count`` pictures of MOSAIC pixels laid out with photos at their own size."""
    photos = [Image.open(file).convert("RGB") for file in sorted(path.iterdir())]
    out.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(count):
        whole = Image.new("RGB", MOSAIC)
        for left in range(0, MOSAIC[0], 500):
            for top in range(0, MOSAIC[1], 375):
                whole.paste(photos[random.integers(len(photos))], (left, top))
        whole.save(out / f"{number}.jpg", quality=90)


def with_patch(name: str, value: object, run: Callable[[], object]) -> Callable[[], object]:
    """The run with another value of ``cmt_mae.data.jpeg.NAME``, in the decoder and in the loader."""

    def patched() -> object:
        with mock.patch.object(jpeg, name, value):
            return run()

    return patched


def ours(
    path: Path, count: int, batch: int = 20, shrink: bool = True, size: int = SIZE
) -> Callable[[], object]:
    """Batches as `pretrain` reads them; an endless stream, so each run goes on where the last one stopped."""
    batches = pretrain_batches(
        open_source(str(path)), CropSettings((size, size), scale=SCALE, shrink=shrink),
        noise_length=0, seed=0, batch_size=batch, micro_batch=batch, workers=0,
    )  # fmt: skip
    return lambda: [next(batches) for _ in range(count // batch)]


def torchvision_loader(
    view: Path, count: int, batch: int = 20, size: int = SIZE
) -> Callable[[], object]:
    """The usual recipe of MAE, up to uint8."""
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=SCALE, interpolation=InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
        ]
    )
    loader = DataLoader(
        ImageFolder(str(view), transform), batch_size=batch, shuffle=True, num_workers=0, drop_last=True
    )  # fmt: skip
    return lambda: list(itertools.islice(loader, count // batch))


def timm_loader(view: Path, count: int, batch: int = 20, size: int = SIZE) -> Callable[[], object]:
    """timm's own pipeline with the same crops, up to the uint8 batch that its prefetcher would move."""
    loader = timm.data.create_loader(
        timm.data.ImageDataset(str(view)), (3, size, size), batch, is_training=True, scale=SCALE, hflip=0.5,
        color_jitter=0.0, interpolation="bicubic", num_workers=0, persistent_workers=False, use_prefetcher=True,
        device=torch.device("cpu"),
    )  # fmt: skip
    inner: Any = loader.loader  # type: ignore[union-attr]
    return lambda: list(itertools.islice(inner, count // batch))


# --- J and F -------------------------------------------------------------------------------------

SHAPE = (480, 854)
OBJECTS = (1, 2, 3)
Ids = NDArray[np.uint8]


def compare_masks(options: Any) -> Iterator[dict[str, Any]]:
    """Three objects of irregular outline in frames of DAVIS' size, one thread each."""
    frames = masks(2 if options.quick else 10)
    found: dict[str, NDArray[np.float64]] = {}

    def ours() -> None:
        scores = [score_frame(predicted, truth, OBJECTS) for predicted, truth in frames]
        found[OURS] = np.array(scores)

    def theirs() -> None:
        from vos_benchmark.evaluator import Evaluator

        rows = []
        for predicted, truth in frames:
            evaluator = Evaluator()
            evaluator.feed_frame(predicted, truth)
            rows.append(
                [
                    [evaluator.object_iou[i][0] for i in OBJECTS],
                    [evaluator.boundary_f[i][0] for i in OBJECTS],
                ]
            )
        found["vos-benchmark"] = np.array(rows)

    comparison = Comparison(
        "masks", "masks",
        f"J and F of {len(OBJECTS)} objects in {len(frames)} frames of {SHAPE[1]} x {SHAPE[0]} pixels, masks in "
        "memory, one thread (both go through sequences in several).",
        len(frames), unit="frames", facts={},
    )  # fmt: skip
    seconds = alternate({OURS: ours, "vos-benchmark": theirs}, options.rounds)
    comparison.facts["largest_difference_of_J_and_F"] = float(
        np.abs(found[OURS] - found["vos-benchmark"]).max()
    )
    yield comparison.measured(seconds)


def masks(count: int) -> list[tuple[Ids, Ids]]:
    """Truth: wavy ellipses; prediction: the same, moved and rescaled by up to a tenth."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    pairs = []
    for _ in range(count):
        pair = [np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)]
        for i in OBJECTS:
            centre = rng.uniform(0.2, 0.8, 2) * SHAPE
            size, waves, phase = rng.uniform(40, 120), rng.integers(3, 12), rng.uniform(0, 6)
            for ids, change in zip(pair, (0.0, 0.1), strict=True):
                dy, dx = y - centre[0] * (1 + change * rng.random()), x - centre[1]
                angle = np.arctan2(dy, dx)
                ids[
                    np.hypot(dy, dx)
                    < size * (1 + change) * (1 + 0.2 * np.sin(waves * angle + phase))
                ] = i
        pairs.append((pair[1], pair[0]))
    return pairs
