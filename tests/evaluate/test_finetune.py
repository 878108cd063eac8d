"""Fine-tuning's parts against timm, scikit-learn, torch and the table of the protocols."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    top_k_accuracy_score,
)
from timm.data.mixup import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

from cmt_mae.backbones import Backbone, load_backbone
from cmt_mae.core.errors import InputError
from cmt_mae.data.augment import Erased
from cmt_mae.engine.processes import make_accelerator
from cmt_mae.evaluate import finetune_accuracy
from cmt_mae.evaluate.features import forward_parts, normalise
from cmt_mae.evaluate.finetune import FinetuneConfig, collate, to_device
from cmt_mae.evaluate.finetune_accuracy import accuracy, class_facts, predict
from cmt_mae.evaluate.finetune_model import Classifier, save_classifier
from cmt_mae.evaluate.finetune_protocols import (
    FinetuneProtocol,
    differences,
    fit_batch,
    published,
    resolve,
)
from tiny import tiny_vit

SIZES = {"img_size": (32, 32), "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 4}
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("vit_tiny_patch16_224", {}),
    ("vit_tiny_patch16_224", {"reg_tokens": 2, "no_embed_class": True}),
    ("vit_base_patch16_clip_quickgelu_224", {}),
    ("vit_base_patch16_siglip_gap_224", {}),
    ("vit_base_patch16_siglip_224", {"global_pool": "avg"}),  # as it is read from SigLIP's files
    ("eva02_tiny_patch14_224", {}),
    ("vit_small_patch16_dinov3", {}),
    ("beit_base_patch16_224", {}),
]


def make(path: Path, architecture: str, more: dict[str, Any]) -> Backbone:
    """A random small network of this kind, through its file."""
    return load_backbone(tiny_vit(path, architecture, noise=0.1, depth=4, num_heads=4, **more))


@pytest.fixture
def vit_backbone(vit: str) -> Backbone:
    return load_backbone(vit)


def trained_a_little(model: Classifier) -> Classifier:
    """The head starts at 2e-5: give it weights that show a difference."""
    torch.manual_seed(1)
    with torch.no_grad():
        model.backbone.head.weight.normal_()  # type: ignore[union-attr, operator]
        model.backbone.fc_norm.apply(  # type: ignore[union-attr, operator]
            lambda m: [p.add_(0.3 * torch.randn_like(p)) for p in m.parameters(recurse=False)]
        )
    return model.eval()


@pytest.mark.parametrize(("architecture", "more"), KINDS)
@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_the_files_rebuild_it_in_timm_and_as_a_backbone(
    tmp_path: Path, architecture: str, more: dict[str, Any], pool: Any
) -> None:
    backbone = make(tmp_path / "b.safetensors", architecture, more)
    if pool == "cls" and not backbone.has_cls:
        with pytest.raises(InputError, match="no class token; use mean"):
            Classifier(backbone, 7, pool="cls")
        return
    model = trained_a_little(Classifier(backbone, 7, pool=pool, drop_path=0.3))
    save_classifier(tmp_path, model, backbone, ["x"] * 7, "here")
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        ours = model.logits(normalise(images, backbone))
        file = tmp_path / "classifier.safetensors"
        with safe_open(file, "pt") as opened:
            header = json.loads(opened.metadata()["cmt_mae_classifier"])
        theirs = timm.create_model(
            header["architecture"], checkpoint_path=str(file), **header["kwargs"]
        ).eval()
        torch.testing.assert_close(theirs(normalise(images, backbone)), ours, atol=1e-5, rtol=1e-4)
        again = load_backbone(str(tmp_path / "backbone.safetensors"))
        pooled = forward_parts(again, images, [pool])[pool]
        torch.testing.assert_close(model.backbone.head(pooled), ours, atol=1e-5, rtol=1e-4)  # type: ignore[union-attr, operator]


def test_mean_pool_starts_from_the_pretrained_blocks_and_a_fresh_norm(tmp_path: Path) -> None:
    backbone = make(tmp_path / "b.safetensors", "vit_tiny_patch16_224", {})
    model = Classifier(backbone, 5).eval()
    vit: Any = model.backbone
    before: Any = backbone.model
    assert isinstance(vit.norm, torch.nn.Identity)
    assert (vit.fc_norm.weight == 1).all()
    assert (vit.fc_norm.bias == 0).all()
    assert vit.fc_norm.eps == before.norm.eps == 1e-6
    assert vit.head.weight.abs().max() <= 4e-5 * 3
    assert 1e-5 < vit.head.weight.std() < 3e-5
    assert (vit.head.bias == 0).all()
    assert not (before.norm.weight == 1).all()  # untouched
    own, given = vit.state_dict(), before.state_dict()
    shared = [name for name in given if not name.startswith("norm.")]
    assert all(torch.equal(own[name], given[name]) for name in shared)
    assert own.keys() - set(shared) == {
        "fc_norm.weight",
        "fc_norm.bias",
        "head.weight",
        "head.bias",
    }
    with_cls: Any = Classifier(backbone, 5, pool="cls").backbone
    assert torch.equal(with_cls.norm.weight, before.norm.weight)
    assert isinstance(with_cls.fc_norm, torch.nn.Identity)


def test_a_distilled_network_is_trained_too() -> None:
    model = timm.create_model(
        "deit_tiny_distilled_patch16_224", num_classes=0, **{**SIZES, "img_size": 32}
    )
    backbone = Backbone(
        model, "deit_tiny_distilled_patch16_224", dict(SIZES), (0.5,) * 3, (0.5,) * 3, (32, 32), None, "a test",
        None, "0", True, 2,
    )  # fmt: skip
    tuned = Classifier(backbone, 4)
    loss = tuned({"images": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 3])})["loss"]
    loss.backward()
    assert loss.item() == pytest.approx(np.log(4), abs=1e-3)
    missing = [n for n, p in tuned.named_parameters() if p.grad is None]
    assert not missing


@pytest.mark.parametrize(
    ("architecture", "total"),
    [("vit_base_patch16_224", 86_567_656), ("vit_large_patch16_224", 304_326_632)],
)
def test_parameter_counts_of_spec_12_1(architecture: str, total: int) -> None:
    """Encoder with its positions (85,798,656 and 303,301,632) and a head of 1000 classes."""
    with torch.device("meta"):
        vit = timm.create_model(architecture, num_classes=0)
        backbone = Backbone(
            vit, architecture, {}, (0.5,) * 3, (0.5,) * 3, (224, 224), None, "a test", None, "0", True, 1
        )  # fmt: skip
        model = Classifier(backbone, 1000, drop_path=0.1)
    assert sum(p.numel() for p in model.parameters()) == total
    assert all(p.requires_grad for p in model.parameters())
    rates = [block.drop_path1 for block in model.backbone.blocks]  # type: ignore[union-attr]
    assert getattr(rates[-1], "drop_prob", 0) == pytest.approx(0.1)
    assert getattr(rates[0], "drop_prob", 0) == 0


@pytest.mark.parametrize("count", [0, 1, 3, "all"])
@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_frozen_layers_stay_as_they_were(vit_backbone: Backbone, count: Any, pool: Any) -> None:
    torch.manual_seed(0)
    model = Classifier(vit_backbone, 4, pool=pool, drop_path=0.5, frozen_layers=count).train()
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    # a block may be skipped by its stochastic depth, and the head starts at all but 0
    for _ in range(6):
        batch = {"images": torch.randn(8, 3, 32, 32), "labels": torch.arange(8) % 4}
        model(batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    same = {
        n.removeprefix("backbone.")
        for n, p in model.named_parameters()
        if torch.equal(p, before[n])
    }
    frozen = 0 if count == 0 else 3 if count == "all" else count
    expected = {
        n.removeprefix("backbone.")
        for n in before
        if (frozen and n.split(".")[1] in ("patch_embed", "cls_token", "pos_embed"))
        or any(n.startswith(f"backbone.blocks.{i}.") for i in range(frozen))
        or (count == "all" and n.startswith("backbone.norm."))
    }  # fmt: skip
    assert same == expected
    with pytest.raises(InputError, match="frozen_layers 4: the backbone has 3 blocks"):
        Classifier(vit_backbone, 4, frozen_layers=4)


def test_losses_are_timms(vit_backbone: Backbone) -> None:
    model = trained_a_little(Classifier(vit_backbone, 5, smoothing=0.1))
    images, labels = torch.randn(6, 3, 32, 32), torch.tensor([0, 4, 2, 2, 1, 3])
    logits = model.logits(images)
    hard = model({"images": images, "labels": labels})["loss"]
    torch.testing.assert_close(hard, LabelSmoothingCrossEntropy(0.1)(logits, labels))
    soft = torch.rand(6, 5).softmax(1)
    mixed = model({"images": images, "labels": soft})["loss"]
    torch.testing.assert_close(mixed, SoftTargetCrossEntropy()(logits, soft))


def test_to_device_normalises_then_erases_then_mixes(vit_backbone: Backbone) -> None:
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = [
        {"image": torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8), "label": i, "erased": None,
         "mixing": int(rng.integers(2**32))}
        for i in range(4)
    ]  # fmt: skip
    patch = torch.randn(3, 5, 6)
    rows[2]["erased"] = Erased(1, 7, patch)
    batch = collate(rows)
    assert batch["mixing"] == rows[0]["mixing"]
    plain = to_device(batch, vit_backbone, torch.device("cpu"), None)
    expected = normalise(torch.stack([r["image"] for r in rows]), vit_backbone)
    expected[2, :, 1:6, 7:13] = patch
    assert torch.equal(plain["images"], expected)
    assert plain["labels"].tolist() == [0, 1, 2, 3]

    mixup = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=4)
    state = np.random.get_state()[1].copy()  # type: ignore[index]
    mixed = to_device(batch, vit_backbone, torch.device("cpu"), mixup)
    again = to_device(batch, vit_backbone, torch.device("cpu"), mixup)
    assert (np.random.get_state()[1] == state).all()  # type: ignore[index]
    np.random.seed(batch["mixing"])
    images, targets = mixup(expected.clone(), torch.arange(4))
    assert torch.equal(mixed["images"], images)
    assert torch.equal(again["images"], images)
    assert torch.equal(mixed["labels"], targets)
    assert not torch.equal(images, expected)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))


def test_images_are_cropped_as_maes_build_transform_does(
    vit_backbone: Backbone, monkeypatch
) -> None:
    """crop_pct is 224 / 256 up to 224 pixels and 1 above; Resize gets int(size / crop_pct)."""
    ratios: list[float] = []

    def seen(*_: Any, resize_ratio: float, **__: Any) -> Any:
        ratios.append(resize_ratio)
        raise InterruptedError

    monkeypatch.setattr(finetune_accuracy, "eval_batches", seen)
    model, accelerator = Classifier(vit_backbone, 7), make_accelerator("cpu", "fp32")
    sizes = {192: 219, 224: 256, 240: 240, 448: 448}
    for size in sizes:
        backbone = replace(vit_backbone, img_size=(size, size))
        with pytest.raises(InterruptedError):
            predict(model, None, backbone, accelerator, batch_size=1, workers=0, timeout_s=1.0)
    assert [round(size * ratio) for size, ratio in zip(sizes, ratios, strict=True)] == [*sizes.values()]


@pytest.mark.parametrize("classes", [2, 5, 9])
def test_accuracy_is_scikit_learns(classes: int) -> None:
    rng = np.random.default_rng(classes)
    labels = rng.integers(0, classes, 300)
    logits = rng.normal(size=(300, classes)) + 1.5 * np.eye(classes)[labels]
    best = torch.from_numpy(logits).sort(dim=1, descending=True).indices[:, : min(5, classes)]
    metrics, confusion = accuracy(best, torch.from_numpy(labels), classes)
    guess = best[:, 0].numpy()
    assert metrics["top1"] == pytest.approx(100 * accuracy_score(labels, guess))
    assert metrics["class_mean"] == pytest.approx(100 * balanced_accuracy_score(labels, guess))
    assert (confusion.numpy() == confusion_matrix(labels, guess)).all()
    if classes > 5:
        assert metrics["top5"] == pytest.approx(100 * top_k_accuracy_score(labels, logits, k=5))
    else:
        assert "top5" not in metrics
    names = [f"c{i}" for i in range(classes)]
    details = class_facts(confusion, names)
    cells = details["confusion"]
    again = np.zeros((classes, classes), int)
    again[cells["truth"], cells["prediction"]] = cells["count"]
    assert (again == confusion.numpy()).all()
    assert sum(c["images"] for c in details["classes"]) == 300
    for i, row in enumerate(details["classes"]):
        assert row["top1"] == pytest.approx(100 * (guess[labels == i] == i).mean())


def test_a_class_without_validation_images() -> None:
    metrics, confusion = accuracy(torch.tensor([[0], [2], [2]]), torch.tensor([0, 2, 0]), 3)
    # 1/2 and 1 of the two classes that have images
    assert metrics["class_mean"] == pytest.approx(75)
    row = class_facts(confusion, ["a", "b", "c"])["classes"][1]
    assert row == {"name": "b", "images": 0, "top1": None}


def test_table_of_spec_6_3() -> None:
    """epochs, batch, blr, layer decay, drop path, warm-up of B and L."""
    table = {
        "mae": ((100, 1024, 5e-4, 0.65, 0.1, 5), (50, 1024, 1e-3, 0.75, 0.2, 5)),
        "milan": ((100, 1024, 1e-4, 0.65, 0.1, 5), (100, 1024, 1e-4, 0.75, 0.2, 5)),
        "dbot": ((100, 1024, 3e-4, 0.75, 0.1, 5), (50, 1024, 3e-4, 0.75, 0.25, 5)),
        "ibot": ((100, 1024, 1e-3, 0.65, 0.2, 20), (50, 1024, 1e-3, 0.75, 0.4, 5)),
        "paper256": ((100, 256, 5e-4, 0.65, 0.1, 5), (50, 256, 1e-3, 0.75, 0.2, 5)),
    }
    for name, rows in table.items():
        for width, row in zip((768, 1024), rows, strict=True):
            recipe = published(name, width)  # type: ignore[arg-type]
            found = (
                recipe.epochs,
                recipe.batch_size,
                recipe.blr,
                recipe.layer_decay,
                recipe.drop_path,
            )
            assert (*found, recipe.warmup_epochs) == row, (name, width)
            common = asdict(recipe)
            assert common["rand_augment"] == "rand-m9-mstd0.5-inc1"
            values = [
                common[k]
                for k in ("mixup", "cutmix", "smoothing", "erasing", "weight_decay", "min_lr")
            ]
            assert values == [0.8, 1.0, 0.1, 0.25, 0.05, 1e-6]
            assert (recipe.pool, recipe.smallest_crop, recipe.ema_decay) == ("mean", 0.08, 0)
    assert published("mae", 768).lr == pytest.approx(2e-3)  # 5e-4 * 1024 / 256
    assert published("paper256", 768).lr == published("paper256", 768).blr
    assert published("ibot", 768).lr == pytest.approx(4e-3)
    assert published("mae", 192) == published("mae", 768)
    assert published("mae", 1280) == replace(published("mae", 1024), drop_path=0.3)  # ViT-H
    with pytest.raises(InputError, match="one of mae, paper256, milan, dbot, ibot, quick"):
        published("best", 768)  # type: ignore[arg-type]


def test_every_number_can_be_given() -> None:
    given: dict[str, Any] = {
        "epochs": 7, "batch_size": 32, "blr": 0.1, "layer_decay": 0.5, "drop_path": 0.3, "warmup_epochs": 2.0,
        "min_lr": 1e-7, "weight_decay": 0.2, "rand_augment": "none", "mixup": 0.1, "cutmix": 0.2,
        "smoothing": 0.3, "erasing": 0.4, "smallest_crop": 0.5, "pool": "cls", "ema_decay": 0.9,
    }  # fmt: skip
    assert resolve(FinetuneConfig(**given), 768, 10_000) == FinetuneProtocol(**given)
    assert given.keys() == asdict(published("mae", 768)).keys()
    said = differences(FinetuneConfig(**given), FinetuneProtocol(**given), 768, 10_000)
    for name in given.keys() - {"batch_size"}:
        assert any(line.startswith(f"{name} {given[name]} instead of") for line in said), name
    assert any(line.startswith("batch 32 instead of 1024 (as asked)") for line in said)
    assert differences(FinetuneConfig(), published("mae", 768), 768, 1_281_167) == []


def test_fit_to_the_set() -> None:
    assert resolve(FinetuneConfig(), 768, 1_281_167) == published("mae", 768)
    small = resolve(FinetuneConfig(), 768, 947)
    assert small.batch_size == 896
    assert small.lr == pytest.approx(5e-4 * 896 / 256)
    assert resolve(FinetuneConfig(epochs=10), 768, 5000).warmup_epochs == pytest.approx(0.5)
    sizes = {n: fit_batch(1024, n) for n in (2, 3, 31, 32, 100, 255, 256, 300, 1023, 1024, 9999)}
    expected = [2, 2, 30, 32, 96, 248, 256, 256, 960, 1024, 1024]
    assert list(sizes.values()) == expected
    with pytest.raises(InputError, match="needs 2 or more"):
        fit_batch(1024, 1)
    said = differences(FinetuneConfig(), small, 384, 947)
    assert "(947 training images)" in said[1]
    assert "100 optimizer steps in all, which is little" in said[-1]
    assert "width 384" in said[0]
