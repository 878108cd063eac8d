"""Frames as OpenCV resizes them, input sizes, positions, layers, backbones of every kind."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmt_mae.backbones import load_backbone
from cmt_mae.core.errors import InputError
from cmt_mae.core.settings import check_fields
from cmt_mae.evaluate.pyramid import patch_of
from cmt_mae.evaluate.video.evaluate import DavisConfig
from cmt_mae.evaluate.video.features import TYPO_STD, make_extractor, resize_linear
from cmt_mae.evaluate.video.protocol import PRESETS, VideoProtocol, input_size, resolve

DINO, VIDEOWALK, CROPMAE = (VideoProtocol(**preset) for preset in PRESETS.values())

CPU = torch.device("cpu")
KINDS = ("plain", "no_class_token", "registers", "beit", "dinov3", "patch14")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_resizing_equals_opencv(data):
    import cv2

    height, width, new_height, new_width = (data.draw(st.integers(1, 70)) for _ in range(4))
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    image = rng.integers(0, 256, (height, width, data.draw(st.sampled_from([1, 3]))), np.uint8)
    theirs = cv2.resize(image, (new_width, new_height), interpolation=cv2.INTER_LINEAR)
    ours = resize_linear(image, new_height, new_width)
    np.testing.assert_array_equal(ours, theirs.reshape(ours.shape))


@pytest.mark.parametrize(
    ("frame", "patch", "protocol", "wanted"),
    [
        ((480, 854), 16, DINO, (480, 832)),  # spec 9.1
        ((480, 910), 16, DINO, (480, 896)),
        ((854, 480), 8, DINO, (832, 480)),
        ((1080, 1920), 16, DINO, (480, 832)),
        ((480, 480), 16, DINO, (480, 448)),  # a square is cut too: the script does so
        ((480, 854), 14, DINO, (476, 854)),  # 14 divides neither 480 nor 64
        ((480, 854), 16, VIDEOWALK, (480, 848)),
        ((480, 854), 8, VIDEOWALK, (480, 848)),
        ((480, 854), 16, CROPMAE, (480, 880)),
        ((480, 854), 14, CROPMAE, (476, 868)),
        ((96, 171), 16, replace(DINO, size=96), (96, 128)),
    ],
)
def test_input_sizes(frame, patch, protocol, wanted):
    assert input_size(frame, protocol, (patch, patch)) == wanted


@settings(max_examples=100, deadline=None)
@given(
    st.integers(60, 2000), st.integers(60, 2000), st.integers(4, 32), st.sampled_from([*PRESETS])
)
def test_input_sizes_are_whole_patches(height, width, patch, name):
    size = input_size((height, width), VideoProtocol(**PRESETS[name]), (patch, patch))
    assert size[0] % patch == size[1] % patch == 0
    if name != "cropmae":
        assert 480 - patch < size[0 if width >= height else 1] <= 480


def test_given_settings_change_the_preset_and_its_name():
    assert resolve("dino", VideoProtocol(topk=5)) == ("dino", DINO)
    assert resolve("dino", VideoProtocol(topk=7)) == ("dino+changed", replace(DINO, topk=7))
    assert resolve("cropmae", VideoProtocol(size=[480, 880])) == ("cropmae", CROPMAE)
    for changes in ({"topk": 0}, {"radius": -1}, {"temperature": 0.0}, {"size": (480, 0)}, {"layer": 0}):
        with pytest.raises(InputError, match=f"--{next(iter(changes))} is"):
            check_fields(DavisConfig("backbone", "data", **changes))
    with pytest.raises(InputError, match="dino, videowalk, cropmae"):
        check_fields(DavisConfig("backbone", "data", protocol="jabri"))


def test_presets_are_those_of_the_specification():
    assert (DINO.context, DINO.radius, DINO.topk, DINO.temperature) == (7, 12, 5, 0.1)
    assert (VIDEOWALK.context, VIDEOWALK.topk, VIDEOWALK.temperature) == (20, 10, 0.05)
    assert (VIDEOWALK.padded, VIDEOWALK.limit_first, VIDEOWALK.window) == (True, False, "disc")
    assert (CROPMAE.topk, CROPMAE.radius, CROPMAE.temperature, CROPMAE.size) == (
        7,
        20,
        0.7,
        (480, 880),
    )


def extractor(file, size=(48, 64), protocol=DINO):
    return make_extractor(load_backbone(file), size, protocol, CPU)


def frames(count, size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3), np.uint8)


@pytest.mark.parametrize("kind", [*KINDS])
def test_every_kind_of_backbone(make_kind, tmp_path, kind):
    """Prefix tokens are dropped, none is taken for a patch: moving one patch moves that feature most."""
    file = make_kind(tmp_path / "k.safetensors", kind)
    backbone = load_backbone(file)
    side = patch_of(backbone)[0]
    size = (4 * side, 6 * side)
    extract = extractor(file, size)
    images = frames(1, size)
    features = extract(images)
    assert features.shape == (1, 4, 6, 48)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(1, 4, 6))
    other = images.copy()
    other[:, 2 * side : 3 * side, 5 * side :] ^= 255
    moved = (extract(other) - features).norm(dim=-1)[0]
    assert divmod(int(moved.argmax()), 6) == (2, 5)


def test_features_are_those_of_the_model(plain_vit):
    """After the final norm, without the class token, with the typo; each switch says otherwise."""
    images = frames(2, (48, 64))
    backbone = load_backbone(plain_vit, img_size=(48, 64))
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255

    def tokens(std, depth, norm):
        x = (pixels - torch.tensor(backbone.mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
        x = backbone.model._pos_embed(backbone.model.patch_embed(x))
        for block in backbone.model.blocks[:depth]:
            x = block(x)
        x = (backbone.model.norm(x) if norm else x)[:, 1:]
        return torch.nn.functional.normalize(x, dim=-1).reshape(2, 6, 8, 48)

    for changes, wanted in (
        ({}, (TYPO_STD, 2, True)),
        ({"std_typo": False}, (backbone.std, 2, True)),
        ({"final_norm": False}, (TYPO_STD, 2, False)),
        ({"layer": 1}, (TYPO_STD, 1, True)),
        ({"layer": 1, "final_norm": False}, (TYPO_STD, 1, False)),
    ):
        with torch.no_grad():
            expected = tokens(*wanted)
        found = extractor(plain_vit, protocol=replace(DINO, **changes))(images)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_typo_touches_imagenet_statistics_only(plain_vit):
    assert extractor(plain_vit).std == TYPO_STD
    native = load_backbone(plain_vit)
    native.std = (0.5, 0.5, 0.5)
    assert make_extractor(native, (32, 32), DINO, CPU).std == (0.5, 0.5, 0.5)


def test_positions_by_factor(plain_vit):
    """Bicubic samples at (i + .5) / (new + .1) * old - .5 in place of (i + .5) / new * old - .5."""
    by_size = extractor(plain_vit).backbone.model.pos_embed[0]
    by_factor = extractor(plain_vit, protocol=replace(DINO, positions="scale_factor"))
    table = by_factor.backbone.model.pos_embed[0]
    assert torch.equal(table[0], by_size[0])
    native = load_backbone(plain_vit).model.pos_embed[0, 1:].reshape(4, 4, 48)

    def cubic(old, new, factor):
        a, weights = -0.75, torch.zeros(new, old)
        for i in range(new):
            x = (i + 0.5) / factor - 0.5
            for tap in range(int(np.floor(x)) - 1, int(np.floor(x)) + 3):
                d = abs(x - tap)
                near, far = (
                    ((a + 2) * d - (a + 3)) * d * d + 1,
                    ((a * d - 5 * a) * d + 8 * a) * d - 4 * a,
                )
                weights[i, min(max(tap, 0), old - 1)] += near if d <= 1 else far
        return weights

    wanted = torch.einsum("ia,jb,abd->ijd", cubic(4, 6, 6.1 / 4), cubic(4, 8, 8.1 / 4), native)
    torch.testing.assert_close(table[1:].reshape(6, 8, 48), wanted, atol=1e-5, rtol=0)
    assert not torch.allclose(table, by_size, atol=1e-3)


def test_features_that_are_not_finite(plain_vit):
    extract = extractor(plain_vit)
    with torch.no_grad():
        extract.backbone.model.norm.weight.fill_(torch.inf)
    with pytest.raises(InputError, match="not finite"):
        extract(frames(1, (48, 64)))
