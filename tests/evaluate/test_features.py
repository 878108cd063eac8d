import io
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file
from torchvision import transforms

import cmt_mae.evaluate.features as features_module
from cmt_mae.backbones import Backbone, load_backbone
from cmt_mae.core.errors import InputError
from cmt_mae.data.sources import open_source
from cmt_mae.evaluate.features import (
    data_facts,
    default_pools,
    extract,
    forward_parts,
    open_labelled,
    pool_parts,
    start_processes,
)
from programs import start
from tiny import tiny_vit, write_pictures

CPU = torch.device("cpu")


def wrap(model: torch.nn.Module) -> Backbone:
    """A backbone around any timm network with a 32 x 32 input."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return Backbone(
        model=model.eval(),
        architecture="test",
        kwargs={},
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.25, 0.3),
        img_size=(32, 32),
        proj=None,
        source="a test",
        licence=None,
        digest="0" * 64,
        has_cls=bool(getattr(model, "cls_token", None) is not None),
        prefix_tokens=model.num_prefix_tokens,
    )


def test_equal_timm_on_torchvision_crops(vit, pictures):
    backbone, source = load_backbone(vit), open_source(f"{pictures}/val")
    ours = extract(backbone, source, device=CPU, pools=("cls", "mean", "cls+mean"), batch_size=4)
    crop = transforms.Compose(
        [
            transforms.Resize(37, transforms.InterpolationMode.BICUBIC),  # round(32 * 256 / 224)
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize((0.5, 0.4, 0.3), (0.2, 0.25, 0.3)),
        ]
    )
    files = sorted((Path(pictures) / "val").glob("*/*.png"))
    x = torch.stack([crop(Image.open(file).convert("RGB")) for file in files])
    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **kwargs).eval()
    model.load_state_dict(load_file(vit))
    with torch.no_grad():
        tokens = model.forward_features(x)
    cls, mean = tokens[:, 0], tokens[:, 1:].mean(1)
    # the crop may differ from Pillow's by one grey level in a few pixels
    torch.testing.assert_close(ours.pools["cls"], cls, rtol=0, atol=0.01)
    torch.testing.assert_close(ours.pools["mean"], mean, rtol=0, atol=0.01)
    assert torch.equal(ours.pools["cls+mean"][:, :48], ours.pools["cls"])
    assert torch.equal(ours.pools["cls+mean"][:, 48:], ours.pools["mean"])
    assert ours.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert cls.std(0).mean() > 0.1  # the pictures do differ


SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
NETWORKS = {
    "class token": ("vit_tiny_patch16_224", SMALL),
    "registers": ("vit_tiny_patch16_224", {**SMALL, "reg_tokens": 2}),
    "no class token": ("vit_tiny_patch16_224", {**SMALL, "class_token": False, "global_pool": ""}),
    "norm after pooling": ("vit_tiny_patch16_224", {**SMALL, "global_pool": "avg"}),
    "beit": ("beit_base_patch16_224", {**SMALL, "global_pool": "token"}),
    "eva": ("eva02_tiny_patch14_224", {**SMALL, "global_pool": "token"}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_parts_equal_timm(name):
    architecture, kwargs = NETWORKS[name]
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=0, **kwargs)
    backbone = wrap(model)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    x = transforms.functional.normalize(images / 255, backbone.mean, backbone.std)
    blocks: list[torch.Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda *args: blocks.append(args[-1]))
    with torch.no_grad():
        tokens, pooled = model.forward_features(x), model(x)
        last = [model.fc_norm(model.norm(t))[:, 0] for t in blocks[1:3]]
    parts = ["mean", "cls", "blocks2"] if backbone.has_cls else ["mean"]
    found = forward_parts(backbone, images, parts)
    mean = model.fc_norm(tokens[:, model.num_prefix_tokens :].mean(1))
    torch.testing.assert_close(found["mean"], mean, rtol=1e-5, atol=1e-5)
    assert tokens.shape[1] - model.num_prefix_tokens == 16
    if name == "norm after pooling":
        torch.testing.assert_close(found["mean"], pooled, rtol=1e-5, atol=1e-5)
    elif backbone.has_cls:
        torch.testing.assert_close(found["cls"], pooled, rtol=1e-5, atol=1e-5)
    else:
        assert default_pools(backbone) == ("mean",)
    if backbone.has_cls:
        expected = torch.cat(last, 1)
        torch.testing.assert_close(found["blocks2"], expected, rtol=1e-5, atol=1e-5)
    half = forward_parts(backbone, images, ["mean"], "bf16")["mean"]
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, mean, rtol=0.1, atol=0.1)


def test_batches_workers_and_mode_change_nothing(vit, pictures):
    backbone, source = load_backbone(vit), open_source(f"{pictures}/val")
    backbone.model.train()
    with Progress(console=Console(file=io.StringIO())) as progress:
        first = extract(backbone, source, device=CPU, batch_size=15, progress=progress)
        assert progress.finished
    assert backbone.model.training
    second = extract(backbone, source, device=CPU, batch_size=2, workers=1)
    for pool, values in first.pools.items():
        torch.testing.assert_close(values, second.pools[pool], rtol=1e-5, atol=1e-5)
    assert torch.equal(first.labels, second.labels)
    wide = extract(load_backbone(vit, img_size=48), source, device=CPU)
    assert (wide.pools["cls"] - first.pools["cls"]).abs().max() > 0.01


def test_cache(vit, pictures, tmp_path, monkeypatch):
    passes: list[int] = []
    real = features_module.eval_batches

    def counted(*args, **kwargs):
        passes.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(features_module, "eval_batches", counted)
    val, train = open_source(f"{pictures}/val"), open_source(f"{pictures}/train")
    settings = {"device": CPU, "cache": tmp_path / "cache", "pools": ("cls", "cls+mean")}

    def run(backbone: Backbone, source=val, **changes):
        before = len(passes)
        found = extract(backbone, source, **(settings | changes))
        return found, len(passes) - before

    backbone = load_backbone(vit)
    first, count = run(backbone)
    assert count == 1
    again, count = run(load_backbone(vit))
    assert count == 0
    assert all(torch.equal(first.pools[p], again.pools[p]) for p in first.pools)
    assert torch.equal(first.labels, again.labels)
    _, count = run(backbone, pools=("mean",))  # a part of what is there
    assert count == 0
    new, count = run(backbone, pools=("mean", "blocks2"))
    assert count == 1
    assert set(new.pools) == {"mean", "blocks2"}
    other = load_backbone(tiny_vit(tmp_path / "other.safetensors", seed=1))
    changed, count = run(other)
    assert count == 1
    assert not torch.allclose(changed.pools["cls"], first.pools["cls"])
    for change in ({"source": train}, {"precision": "bf16"}):
        assert run(backbone, **change)[1] == 1
    assert run(load_backbone(vit, img_size=48))[1] == 1
    assert run(replace(backbone, mean=(0, 0, 0)))[1] == 1
    assert not list((tmp_path / "cache").glob("*.tmp"))
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="delete the file"):
        run(backbone)
    (tmp_path / "taken").write_text("")
    with pytest.raises(InputError, match="another --cache"):
        run(backbone, cache=tmp_path / "taken")


def test_damaged_weights_are_told(vit, pictures):
    backbone = load_backbone(vit)
    with torch.no_grad():
        backbone.model.blocks[1].mlp.fc1.bias[3] = torch.nan  # type: ignore[index]
    with pytest.raises(InputError, match="not finite"):
        extract(backbone, open_source(f"{pictures}/val"), device=CPU)


def test_impossible_pools(vit):
    backbone = load_backbone(vit)
    assert pool_parts("cls+blocks3", backbone) == ["cls", "blocks3"]
    for pool, message in (
        ("max", "unknown pool"),
        ("cls+", "unknown pool"),
        ("blocks0", "unknown pool"),
        ("blocks4", "has 3 blocks"),
    ):
        with pytest.raises(InputError, match=message):
            pool_parts(pool, backbone)
    with pytest.raises(InputError, match="no class token"):
        pool_parts("cls+mean", replace(backbone, has_cls=False))


def test_classes_and_labels(pictures, tmp_path):
    train, val = open_labelled(pictures)
    described = data_facts(pictures, train, val)
    assert {k: described[k] for k in ("train", "val", "classes")} == {
        "train": 27,
        "val": 15,
        "classes": 3,
    }
    assert len(described["fingerprint"]) == 64
    write_pictures(tmp_path / "more" / "train", 2, 0)
    write_pictures(tmp_path / "more" / "val", 2, 0, violet=(120, 20, 160))
    with pytest.raises(InputError, match="violet"):
        open_labelled(str(tmp_path / "more"))
    for split in ("train", "val"):
        (tmp_path / "bare" / split).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "bare" / split / "a.png")
    with pytest.raises(InputError, match="no label"):
        open_labelled(str(tmp_path / "bare"))
    with pytest.raises(InputError):
        open_labelled(str(tmp_path / "nowhere"))


class Stub:
    """A source with given labels and class names."""

    looked_for = "labels"

    def __init__(self, labels: list[int | None], classes: list[str] | None) -> None:
        self.labels, self.classes = labels, classes

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"image{index}"

    def label(self, index: int) -> int | None:
        return self.labels[index]


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        (Stub([0, 1], ["a", "b"]), Stub([0], ["a", "c"]), "only in train: b; only in val: c"),
        (Stub([0, 1], ["a", "b"]), Stub([0], ["b", "a"]), "another order"),
        (Stub([0, 1], None), Stub([0, 7], None), r"train lacks \(7\)"),
        (Stub([0, None], None), Stub([0], None), "image1 has no label"),
        (Stub([0, 1], ["a", "b"]), Stub([None], ["a", "b"]), "image0 has no label"),
        (Stub([0, -1], None), Stub([0], None), "image1 has no label"),
        (Stub([0, 10**9], None), Stub([0], None), r"label 1000000000 among 2 different"),
    ],
)
def test_splits_that_do_not_fit(monkeypatch, train, val, message):
    splits = {"train": train, "val": val}
    monkeypatch.setattr(features_module, "open_split", lambda _, split, *__: splits[split])
    with pytest.raises(InputError, match=message) as error:
        open_labelled("data")
    assert "\n" not in str(error.value)


def test_devices():
    assert start_processes("cpu") == (CPU, 0, 1)
    with pytest.raises(InputError, match="auto, cpu or cuda"):
        start_processes("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no GPU"):
            start_processes("cuda")


TWO = """
import sys, torch
import cmt_mae.evaluate.features as f
from cmt_mae.backbones import load_backbone
from cmt_mae.data.sources import open_source
from cmt_mae.evaluate import KnnConfig, LinearConfig, evaluate_knn, evaluate_linear
vit, data, out = sys.argv[1:]
torch.set_num_threads(1)
f.GATHER_ROWS = 3                                   # several rounds, unequal shares
where = f.start_processes("cpu")
assert where.world == 2
one = open_source(data + "/one")                    # the second process has no image
for name, source in (("val", open_source(data + "/val")), ("one", one)):
    found = f.extract(load_backbone(vit), source, device=where.device, batch_size=4,
                      rank=where.rank, world=where.world)
    torch.save((found.pools, found.labels), f"{out}/{name}{where.rank}.pt")
evaluate_knn(KnnConfig(vit, data, out=out, k=(3,), device="cpu", workers=0))
evaluate_linear(LinearConfig(
    vit, data, out=out, augment=True, protocol="dino", epochs=3, pools=("mean",), blr=(1.0,),
    batch_size=18, forward_batch=3, device="cpu", workers=0))
torch.distributed.destroy_process_group()
"""


def test_two_processes_count_every_image_once(vit, pictures, tmp_path):
    from cmt_mae.evaluate import KnnConfig, LinearConfig, Result, evaluate_knn, evaluate_linear

    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "val"):
        (data / split).symlink_to(Path(pictures) / split)
    (data / "one" / "red").mkdir(parents=True)
    Image.new("RGB", (40, 40), (200, 30, 30)).save(data / "one" / "red" / "a.png")
    (tmp_path / "two.py").write_text(TWO)
    done = start(tmp_path / "two.py", vit, str(data), str(tmp_path), processes=2)
    assert done.returncode == 0, done.stderr
    for name in ("val", "one"):
        alone = extract(load_backbone(vit), open_source(str(data / name)), device=CPU)
        for rank in range(2):
            pools, labels = torch.load(tmp_path / f"{name}{rank}.pt")
            assert torch.equal(labels, alone.labels)
            for pool, values in alone.pools.items():
                torch.testing.assert_close(pools[pool], values, rtol=1e-5, atol=1e-5)
    results = [Result.load(file) for file in (tmp_path / "results").iterdir()]
    together = {result.task: result for result in results}
    assert len(results) == len(together) == 2
    assert together["knn"].hardware["processes"] == 2
    knn = evaluate_knn(KnnConfig(vit, str(data), k=(3,), device="cpu", workers=0))
    assert together["knn"].metrics == pytest.approx(knn.metrics)
    settings = {"protocol": "dino", "epochs": 3, "pools": ("mean",), "blr": (1.0,)}
    settings |= {"augment": True, "batch_size": 18, "forward_batch": 3}
    settings |= {"device": "cpu", "workers": 0}
    linear = evaluate_linear(LinearConfig(vit, str(data), **settings))
    assert together["linear"].protocol == linear.protocol
    (ours,), (theirs,) = together["linear"].details["heads"], linear.details["heads"]
    assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)
