from dataclasses import replace

import pytest
import torch
from PIL import Image
from torchvision import transforms

import cmt_mae.evaluate.linear as linear_module
from cmt_mae.backbones import load_backbone
from cmt_mae.core.errors import InputError
from cmt_mae.data.loader import CropSettings, pretrain_batches
from cmt_mae.data.sources import open_source
from cmt_mae.evaluate import LinearConfig, Result, evaluate_linear
from cmt_mae.evaluate.features import extract, start_processes
from cmt_mae.evaluate.linear import augmented_steps, plan, summary
from cmt_mae.evaluate.sweep import published


def config(vit: str, pictures: str, **changes) -> LinearConfig:
    return LinearConfig(vit, pictures, **({"device": "cpu", "workers": 0, "protocol": "mae"} | changes))


def test_sweep_end_to_end(vit, pictures, tmp_path):
    settings = config(vit, pictures, protocol="sweep", out=str(tmp_path), epochs=20)
    result = evaluate_linear(settings)
    assert result.protocol["name"] == "sweep-cached"
    assert result.headline == result.metrics["default/top1"] == result.details["heads"][0]["top1"]
    assert result.metrics["best/top1"] == 100 == result.details["best"]["top1"]
    heads = result.details["heads"]
    assert len(heads) == 72
    assert {head["pool"] for head in heads} == {"cls", "mean", "cls+mean"}
    for pool in ("cls", "mean", "cls+mean"):
        first = next(head for head in heads if head["pool"] == pool)
        assert (first["blr"], first["weight_decay"], first["norm"]) == (0.01, 0.0, True)
        assert result.metrics[f"{pool}/top1"] == first["top1"]
    assert heads[0]["lr"] == pytest.approx(0.01 * 27 / 256)
    assert "top5" not in result.metrics  # there are only 3 classes
    (file,) = (tmp_path / "results").iterdir()
    assert Result.load(file) == result


def test_same_seed_same_result(vit, pictures, tmp_path):
    settings = config(vit, pictures, epochs=30, cache=str(tmp_path))
    first, again = evaluate_linear(settings), evaluate_linear(settings)
    assert first.details == again.details
    assert first.protocol == again.protocol
    other = evaluate_linear(config(vit, pictures, epochs=30, cache=str(tmp_path), seed=1))
    assert other.details != first.details
    assert other.identity() != first.identity()


def test_the_protocol_says_what_was_done(vit, pictures):
    mae = evaluate_linear(config(vit, pictures, epochs=9)).protocol
    assert mae["name"] == "mae-cached"
    assert (mae["optimizer"], mae["batch_size"], mae["warmup_epochs"]) == ("lars", 27, 1.0)
    assert mae["pools"] == ["cls", "mean"]
    differs = " ".join(mae["differs"])
    for part in ("centre crop", "batch 27 instead of 16384 (27 training", "9 epochs instead of 90"):
        assert part in differs
    ibot = evaluate_linear(config(vit, pictures, protocol="ibot", epochs=5, pools=("blocks2",)))
    assert "best of 45 heads" in ibot.protocol["quoted"]
    assert ibot.headline == ibot.metrics["best/top1"] == 100 >= ibot.metrics["default/top1"]
    only = evaluate_linear(config(vit, pictures, epochs=1, pools=("mean",), blr=(0.3,)))
    assert set(only.metrics) == {"top1"}
    assert only.protocol["quoted"] == "the only head"


def test_which_head_is_quoted():
    """Six heads by hand: 2 features x 3 rates; the best is not the default."""
    protocol = replace(published("mae", 768, True), pools=("cls", "mean"))
    tops = [(60, 90), (70, 91), (65, 92), (50, 80), (75, 85), (40, 70)]
    table = [{"top1": float(a), "top5": float(b)} for a, b in tops]
    expected = {"default/top1": 60, "best/top1": 75, "cls/top1": 60, "mean/top1": 50}
    assert summary(table, protocol) == {"top1": 60, "top5": 90} | expected
    best = replace(protocol, takes_best=True)
    assert summary(table, best) == {"top1": 75, "top5": 85} | expected
    assert summary([{"top1": 60.0}], replace(protocol, pools=("cls",))) == {"top1": 60}


def test_augmented_probe(vit, pictures):
    settings = config(
        vit, pictures, protocol="dino", augment=True, pools=("mean",), blr=(1.0,), epochs=12,
        batch_size=16, forward_batch=5,
    )  # fmt: skip
    result = evaluate_linear(settings)
    assert result.headline == 100
    assert result.protocol["name"] == "dino"
    assert result.protocol["batch_size"] == 15  # three forward passes of 5
    assert any("torchvision's law" in line for line in result.protocol["differs"])


def test_augmented_steps_are_new_crops_of_the_right_images(vit, pictures):
    """The noise-free feature of an image's class colour is near, and no crop comes twice."""
    settings = config(
        vit, pictures, augment=True, epochs=2, batch_size=9, forward_batch=3, pools=("mean",)
    )
    backbone, source = load_backbone(vit), open_source(f"{pictures}/train")
    protocol, training = plan(settings, backbone, len(source), 1)
    where = start_processes("cpu")
    steps = list(augmented_steps(settings, training, backbone, source, protocol.pools, where))
    assert len(steps) == 6
    assert all(labels.shape == (9,) for _, labels in steps)
    for epoch in (steps[:3], steps[3:]):
        labels = torch.cat([labels for _, labels in epoch])
        assert labels.bincount().tolist() == [9, 9, 9]
    still = extract(backbone, source, device=where.device, pools=("mean",))
    centres = torch.stack([still.pools["mean"][still.labels == c].mean(0) for c in range(3)])
    crops = torch.cat([x["mean"] for x, _ in steps])
    nearest = torch.cdist(crops, centres).argmin(1)
    assert torch.equal(nearest, torch.cat([labels for _, labels in steps]))
    assert len(crops.unique(dim=0)) == 54
    again = list(augmented_steps(settings, training, backbone, source, protocol.pools, where))
    assert all(torch.equal(a[0]["mean"], b[0]["mean"]) for a, b in zip(steps, again, strict=True))


def test_flips_are_left_to_right(vit, pictures, monkeypatch):
    settings = config(
        vit, pictures, augment=True, epochs=1, batch_size=27, forward_batch=27, pools=("mean",)
    )
    backbone, source = load_backbone(vit), open_source(f"{pictures}/train")
    protocol, training = plan(settings, backbone, len(source), 1)
    seen: list[torch.Tensor] = []

    def look(_backbone, images, parts, _precision):
        seen.append(images)
        return {part: torch.zeros(len(images), 1) for part in parts}

    monkeypatch.setattr(linear_module, "forward_parts", look)
    where = start_processes("cpu")
    list(augmented_steps(settings, training, backbone, source, protocol.pools, where))
    crops = CropSettings((32, 32), scale=(0.08, 1.0))
    sizes = {"batch_size": 27, "micro_batch": 27, "noise_length": 0, "seed": 0}
    batch = next(pretrain_batches(source, crops, **sizes))
    flip = batch["flip"].tolist()
    assert 0 < sum(flip) < 27
    for ours, image, turned in zip(seen[0], batch["images"], flip, strict=True):
        expected = transforms.functional.hflip(image) if turned else image
        assert torch.equal(ours, expected)


def test_bad_settings(vit, pictures, tmp_path):
    for change, message in (
        ({"protocol": "mea"}, "did you mean mae"),
        ({"epochs": 0}, "epochs is 0: give a"),
        ({"batch_size": 1}, "2 or more"),
        ({"pools": ("max",)}, "unknown pool"),
        ({"protocol": "dino"}, "has 3 blocks"),  # DINO's feature of a small ViT needs four
        ({"augment": True, "forward_batch": 0}, "forward_batch is 0: give a"),
    ):
        with pytest.raises(InputError, match=message) as error:
            evaluate_linear(config(vit, pictures, **change))
        assert "\n" not in str(error.value)
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (40, 40), (90 * i, 0, 0)).save(
                    tmp_path / split / name / f"{i}.png"
                )
    (tmp_path / "train" / "a" / "0.png").write_bytes(b"this is no picture")
    for augment in (True, False):
        with pytest.raises(InputError, match=r"a/0\.png"):
            evaluate_linear(config(vit, str(tmp_path), augment=augment, epochs=1, batch_size=4))
