import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch

from cmt_mae.backbones import Backbone
from cmt_mae.core.errors import InputError
from cmt_mae.core.runs import environment
from cmt_mae.evaluate.result import Result, hardware, save_where


def make(**changes) -> Result:
    settings = {
        "task": "knn",
        "metrics": {"cls/k20/top1": np.float64(71.25), "AP small": math.nan},
        "protocol": {"name": "DINO (k-NN)", "headline": "cls/k20/top1", "k": (10, 20)},
        "backbone": {"name": "runs/a", "digest": "ab" * 32, "img_size": (224, 224)},
        "data": {"path": Path("data/x"), "fingerprint": "cd" * 32, "train": 10, "val": 4},
        "seed": 3,
        "versions": environment()["versions"],
        "hardware": hardware(torch.device("cpu")),
        "seconds": 1.5,
        "date": "2025-01-01T00:00:00+00:00",
        "details": {"table": [{"rate": torch.tensor(0.5), "ok": True, "n": np.int64(3)}]},
    }
    return Result(**(settings | changes))


def test_round_trip(tmp_path):
    result = make()
    path = result.save(tmp_path)
    assert re.fullmatch(r"knn-dino-k-nn-[0-9a-f]{10}\.json", path.name)
    assert path.parent == tmp_path / "results"
    back = Result.load(path)
    assert math.isnan(back.metrics.pop("AP small"))
    assert math.isnan(result.metrics.pop("AP small"))
    assert back == result
    assert back.headline == 71.25
    assert back.details == {"table": [{"rate": 0.5, "ok": True, "n": 3}]}
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_one_line_of_strict_json():
    line = make().to_json()
    assert "\n" not in line

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    read = json.loads(line, parse_constant=refuse)
    assert read["metrics"] == {"cls/k20/top1": 71.25, "AP small": None}
    assert read["protocol"]["k"] == [10, 20]
    assert read["data"]["path"] == "data/x"


def test_identity_names_what_was_measured():
    base = make().identity()
    same = make(date="later", seconds=9.0, hardware={}, data={**make().data, "path": "elsewhere"})
    assert same.identity() == base
    assert make(seed=4).identity() != base
    assert make(backbone={"digest": "other"}).identity() != base
    assert make(protocol={**make().protocol, "k": [10]}).identity() != base


def test_the_network_is_the_one_that_was_built():
    net = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=48, patch_size=8, embed_dim=96, depth=4, num_heads=3
    )
    backbone = SimpleNamespace(model=net, architecture="vit_tiny_patch16_224", img_size=(48, 48))
    assert Backbone.network.fget(backbone) == "ViT 96 x 4, patch 8, 48 px"
    old = make(backbone={"name": "runs/a", "architecture": "vit_small_patch16_224", "digest": "d"})
    old.backbone["img_size"] = [48, 64]
    assert old.network == "vit_small_patch16_224, 48 x 64 px"
    old.backbone["network"] = "ViT 96 x 4, patch 8, 48 px"
    assert old.network == "ViT 96 x 4, patch 8, 48 px"


def test_where_it_is_saved(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    assert save_where(make(), None, "vit_tiny_patch16_224") is None
    assert save_where(make(), None, str(run)) is None
    (run / "run.json").write_text("{}")
    path = save_where(make(), None, str(run))
    assert path is not None
    assert path.parent == run / "results"
    path = save_where(make(), str(tmp_path / "out"), str(run))
    assert path is not None
    assert path.parent == tmp_path / "out" / "results"


def test_refuses_what_is_no_result(tmp_path):
    with pytest.raises(ValueError, match="headline"):
        make(protocol={"name": "x"})
    with pytest.raises(ValueError, match="among the metrics"):
        make(protocol={"name": "x", "headline": "other"})
    (tmp_path / "a.json").write_text('{"task": "knn"')
    (tmp_path / "b.json").write_text('{"tasks": 1}')
    for name in ("a.json", "b.json", "missing.json"):
        with pytest.raises(InputError, match="not a result"):
            Result.load(tmp_path / name)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        make().save(tmp_path / "file")
