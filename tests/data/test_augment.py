"""The augmentation against timm's own transforms, and its randomness, which is the sample's alone."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms_factory import create_transform

from cmt_mae.core.errors import InputError
from cmt_mae.data.augment import Augment, seeded
from cmt_mae.data.centre import resize
from cmt_mae.data.crops import crop_box, cut, sample_rng

MEAN = (0.485, 0.456, 0.406)
PHOTO = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)


def test_the_transforms_are_set_up_as_timm_does_it_for_mae() -> None:
    """MAE builds its training transform by this call (util/datasets.py)."""
    theirs = create_transform(
        32, is_training=True, color_jitter=None, auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="bicubic", re_prob=0.25, re_mode="pixel", re_count=1, mean=MEAN, std=(1, 1, 1),
    ).transforms  # fmt: skip
    ours = Augment((32, 32), MEAN)
    their_rand = next(t for t in theirs if type(t).__name__ == "RandAugment")
    assert len(their_rand.ops) == len(ours._rand.ops) == 15
    for one, two in zip(their_rand.ops, ours._rand.ops, strict=True):
        differs = {"aug_fn"} if "Posterize" in one.name else set()  # see the next test
        assert {k for k, v in vars(one).items() if vars(two)[k] != v} == differs
    assert their_rand.num_layers == ours._rand.num_layers
    their_eraser = next(t for t in theirs if type(t).__name__ == "RandomErasing")
    assert vars(their_eraser) == vars(ours._eraser)


def test_posterize_to_no_bit_is_black_and_else_timms() -> None:
    """timm 1.0.31 asks Pillow 13 for 0 bits at the highest magnitude, and that raises."""
    (op,) = (o for o in Augment((32, 32), MEAN)._rand.ops if o.name == "PosterizeIncreasing")
    image = Image.fromarray(PHOTO)
    for level, mode in ((10, "RGB"), (9, "RGB"), (3, "RGB"), (10, "L"), (9, "L")):
        bits = 4 - int(level / 10 * 4)
        found = op.aug_fn(image.convert(mode), bits, **op.kwargs)
        keep = ~(2 ** (8 - bits) - 1)  # the highest bits
        assert (np.array(found) == (np.array(image.convert(mode)).astype(int) & keep)).all()


def test_many_draws_end_well() -> None:
    """No transform and magnitude of RandAugment fails, in colour and in grey."""
    small = PHOTO[:12, :12]
    colour, grey = Augment((8, 8), MEAN), Augment((8, 8), (0.5,))
    for i in range(400):
        colour(small, sample_rng(7, 0, i))
        grey(small[:, :, :1], sample_rng(8, 0, i))


@pytest.mark.parametrize("index", range(12))
def test_each_part_equals_timms_with_the_same_seed(index: int) -> None:
    picture, erased = Augment((32, 24), MEAN, erasing=0.7)(PHOTO, sample_rng(3, 1, index))

    rng = sample_rng(3, 1, index)
    crop = resize(cut(PHOTO, crop_box(rng, 50, 70, (0.08, 1.0))), (32, 24))
    image = Image.fromarray(crop.permute(1, 2, 0).numpy())
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    seed = int(rng.integers(2**32))
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    options = {"translate_const": int(24 * 0.45), "img_mean": (124, 116, 104),
               "interpolation": Image.Resampling.BICUBIC}  # fmt: skip
    image = rand_augment_transform("rand-m9-mstd0.5-inc1", options)(image)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(picture, pixels)

    expected = RandomErasing(0.7, mode="pixel", max_count=1, device="cpu")(pixels.float())
    found = picture.float()
    if erased is not None:
        height, width = erased.pixels.shape[1:]
        found[:, erased.top : erased.top + height, erased.left : erased.left + width] = (
            erased.pixels
        )
    assert torch.equal(found, expected)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 60), st.integers(1, 60), st.sampled_from([1, 3]), st.integers(0, 2**63 - 1),
    st.sampled_from([(8, 8), (8, 16), (24, 8)]),
)  # fmt: skip
def test_any_image_and_the_global_generators_stay_as_they_were(
    height: int, width: int, channels: int, seed: int, size: tuple[int, int]
) -> None:
    image = np.random.default_rng(1).integers(0, 256, (height, width, channels), dtype=np.uint8)
    augment = Augment(size, (0.5,) * channels, erasing=0.9)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]
    first, erased = augment(image, sample_rng(seed, 0, 5))
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert first.shape == (channels, *size)
    assert first.dtype == torch.uint8
    again, erased_again = augment(image, sample_rng(seed, 0, 5))
    assert torch.equal(first, again)
    assert (erased is None) == (erased_again is None)
    if erased is not None and erased_again is not None:
        assert torch.equal(erased.pixels, erased_again.pixels)
        assert erased.top + erased.pixels.shape[1] <= size[0]
        assert erased.left + erased.pixels.shape[2] <= size[1]
        assert not erased.pixels.isnan().any()


def test_generators_are_put_back_after_an_error() -> None:
    def draw_and_fail() -> None:
        with seeded(3):
            random.random()
            torch.rand(1)
            raise RuntimeError

    before = random.getstate(), torch.get_rng_state()
    with pytest.raises(RuntimeError):
        draw_and_fail()
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize("text", ["augmix-m3", "rand-q9", "rand-m9-inc1x", "m9", ""])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"rand-m9-mstd0\.5-inc1, or none"):
        Augment((16, 16), MEAN, rand_augment=text)


def test_channels_that_rand_augment_does_not_know() -> None:
    with pytest.raises(InputError, match="1 or 3 channels, not 5: use rand_augment none"):
        Augment((16, 16), (0.5,) * 5)
    picture, _ = Augment((16, 16), (0.5,) * 5, rand_augment="none")(
        np.zeros((20, 20, 5), np.uint8), sample_rng(0, 0, 0)
    )
    assert picture.shape == (5, 16, 16)
