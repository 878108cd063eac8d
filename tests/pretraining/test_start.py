"""A student that begins as a published network: its shape, its weights, and what cannot begin so."""

import json
from pathlib import Path

import pytest
import timm
import torch

from cmt_mae.backbones import load_backbone
from cmt_mae.backbones.save import save_backbone
from cmt_mae.core.errors import InputError
from cmt_mae.core.parsing import parse
from cmt_mae.method.vit import StudentConfig, build_student, encode_visible
from cmt_mae.pretraining.settings import PretrainConfig
from cmt_mae.tools.pretrain import pretrain
from tiny import Make, assert_same_state
from tiny import rows as metrics

SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8, "img_size": 32}
NETWORKS = {
    "deit": ("vit_tiny_patch16_224", {}),
    "of its name alone": ("vit_tiny_patch16_224", dict.fromkeys(SMALL) | {"img_size": 32}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"init_values": 0.5}),
    "clip": ("vit_base_patch16_clip_quickgelu_224", {}),
    "no place for the class token": ("vit_tiny_patch16_224", {"no_embed_class": True, "reg_tokens": 2}),
}


def without_none(kwargs: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in kwargs.items() if value is not None}


def write(path: Path, name: str, kwargs: dict[str, object], mean: float = 0.5) -> Path:
    torch.manual_seed(3)
    kwargs = without_none({**SMALL, **kwargs})
    model = timm.create_model(name, num_classes=0, **kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    save_backbone(
        path, model, architecture=name, kwargs=kwargs, mean=(mean,) * 3, std=(0.25,) * 3, img_size=32,
        licence="none", source="random weights of a test",
    )  # fmt: skip
    return path


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_student_of_any_vit_encodes_as_timm_does(kind: str, tmp_path: Path) -> None:
    name, kwargs = NETWORKS[kind]
    theirs = load_backbone(str(write(tmp_path / "net.safetensors", name, kwargs))).model
    network = json.dumps([name, without_none(SMALL | kwargs)])
    config = StudentConfig(preset="init_from", network=network, img_size=[32])
    student = build_student(config).eval()
    student.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 32, 32)
    tokens = theirs.forward_features(images)
    expected = torch.cat([tokens[:, :1], tokens[:, theirs.num_prefix_tokens :]], dim=1)
    found = encode_visible(student, images, torch.arange(expected.shape[1] - 1).repeat(2, 1))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["of its name alone", "registers"])
def test_adapt_begins_with_the_teachers_weights_and_learns(kind: str, make: Make, tmp_path: Path) -> None:
    name, kwargs = NETWORKS[kind]
    file = write(tmp_path / "net.safetensors", name, kwargs, mean=0.4)
    changes = {
        "student__preset": "init_from", "student__width": None, "student__depth": None, "student__heads": None,
        "init_from": "teacher", "teacher__name": str(file), "alpha": 0.3, "target__tokens": "all+cls",
    }  # fmt: skip
    still = make("still", optim__blr=0.0, epochs=1, **changes)
    pretrain(still)
    assert still.data.mean == [pytest.approx(0.4)] * 3
    before, after = (load_backbone(name) for name in (str(file), still.out))
    assert after.architecture == name
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(before.model.forward_features(images), after.model.forward_features(images))
    assert after.facts == before.facts
    moved = make("moved", **changes)
    pretrain(moved)  # two stages: the momentum student has the shape too
    learned = load_backbone(moved.out).model.forward_features(images)
    assert not torch.equal(learned, before.model.forward_features(images))
    assert metrics(Path(moved.out))[-1]["stage"] == 2


def test_an_adapted_run_goes_on_from_its_own_settings(make: Make) -> None:
    changes = {"student__preset": "init_from", "student__width": None, "student__depth": None,
               "student__heads": None, "student__img_size": [48], "init_from": "teacher"}  # fmt: skip
    whole, cut = make("whole", **changes), make("cut", **changes)
    pretrain(whole)
    pretrain(cut)
    last = sorted((Path(cut.out) / "checkpoints").glob("step_*"))
    for path in last:
        if "00000010" in path.name:
            path.unlink()
    (Path(cut.out) / "backbone.safetensors").unlink()
    pretrain(make("cut", **changes))
    assert_same_state(Path(whole.out), Path(cut.out))


def test_what_cannot_begin_a_student_is_refused_in_one_line(make: Make, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="say which network, with --init_from NAME"):
        pretrain(make(student__preset="init_from"))
    siglip = write(tmp_path / "siglip.safetensors", "vit_base_patch16_siglip_224", {"global_pool": ""})
    with pytest.raises(InputError, match=r"siglip.* has no class token.*teacher of a student of another shape"):
        pretrain(make(student__preset="init_from", init_from=str(siglip)))


def test_one_number_is_a_list_of_one() -> None:
    config = parse("cmt-mae pretrain", PretrainConfig, ["--student.img_size", "48"], {})
    assert config.student.img_size == [48]
