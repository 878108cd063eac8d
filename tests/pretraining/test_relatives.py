"""Every published relative, and inputs of other shapes, through the real loop."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmt_mae.core.parsing import parse
from cmt_mae.core.recipes import load_recipes
from cmt_mae.pretraining.settings import PretrainConfig
from cmt_mae.tools.pretrain import pretrain
from tiny import Make, as_words, rows

LOSSES = {
    "mae": ({"loss_pixel"}, {"loss_pixel"}),
    "simmim_mask": ({"loss_pixel"}, {"loss_pixel"}),
    "maskfeat": ({"loss_hog"}, {"loss_hog"}),
    "mvp": ({"loss_teacher"}, {"loss_teacher"}),
    "milan": ({"loss_teacher"}, {"loss_teacher"}),
    "attmask": ({"loss_momentum"}, {"loss_momentum"}),
    "data2vec": ({"loss_momentum"}, {"loss_momentum"}),
    "cm_only": ({"loss_pixel"}, {"loss_pixel"}),
    "ct_only": ({"loss_teacher"}, {"loss_teacher", "loss_momentum"}),
    "teacher_guided": ({"loss_teacher"}, {"loss_teacher"}),
    "cmt": ({"loss_teacher"}, {"loss_teacher", "loss_momentum"}),
}


def with_recipe(config: PretrainConfig, recipe: str) -> PretrainConfig:
    """The method of a recipe at the size of the tests."""
    method = load_recipes(recipe)
    method.pop("epochs", None)
    small = [
        w
        for w in as_words(config)
        if not w.startswith(("--mask", "--target", "--decoder.kind", "--momentum"))
    ]
    decoder = method.pop("decoder", {})
    made: PretrainConfig = parse("test", PretrainConfig, small, method)
    made.decoder.kind = decoder.get("kind", "mae")
    made.target.momentum_last_k = min(made.target.momentum_last_k, 2)  # the student's depth
    return made


@pytest.mark.parametrize("recipe", list(LOSSES))
def test_relative_runs_with_its_targets_and_learns(recipe: str, make: Make) -> None:
    config = with_recipe(make(epochs=5.0), recipe)
    config.optim.blr = 0.1
    pretrain(config)
    metrics = rows(Path(config.out))
    for row, expected in ((metrics[0], LOSSES[recipe][0]), (metrics[-1], LOSSES[recipe][1])):
        assert {name for name in row if name.startswith("loss_")} == expected
    assert all(np.isfinite(row["loss"]) for row in metrics)
    assert all(row["skipped_steps"] == 0 for row in metrics)
    name = next(iter(LOSSES[recipe][0]))
    if name != "loss_momentum":  # a moving target need not fall
        first, last = (np.mean([row[name] for row in part]) for part in (metrics[:6], metrics[-6:]))
        assert last < first


def test_alpha_0_is_the_teacher_guided_run_bit_for_bit(make: Make) -> None:
    zero, guided = (
        make("zero", alpha=0.0),
        make("guided", mask__source="teacher", target__source="teacher"),
    )
    pretrain(zero)
    pretrain(guided)
    for a, b in zip(rows(Path(zero.out)), rows(Path(guided.out)), strict=True):
        assert a["loss"] == b["loss"]


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize(
    ("mode", "shape", "changes"),
    [
        ("RGB", (40, 60), {"student__img_size": [24, 48]}),
        ("L", (40, 40), {"student__in_chans": 1}),
        ("RGB", (40, 40), {"student__pos_embed": "learned"}),
        ("RGB", (40, 40), {"student__img_size": [56], "student__patch_size": 14}),
        ("RGB", (40, 40), {"teacher__grid_align": "resample", "student__img_size": [40]}),
        ("RGB", (40, 40), {"data__crops": "fixed", "alpha_ramp_epochs": 1.0, "optim__clip": 0.5}),
        ("RGB", (40, 40), {"mask__rule": "mix_random", "mask__random_until_epoch": 1.0}),
        ("RGB", (40, 40), {"target__tokens": "all+cls", "target__momentum_last_k": 2, "teacher__feature": "last_k",
                           "teacher__last_k": 2}),
        ("RGB", (40, 40), {"teacher__pixels": "resize", "mask__normalise": "rank", "mask__heads": "minmax_mean"}),
    ],
)  # fmt: skip
def test_other_shapes_and_options_run_both_stages(
    mode: str, shape: tuple[int, int], changes: dict[str, object], make: Make, tmp_path: Path
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    noise = np.random.default_rng(0)
    for number in range(24):
        array = noise.integers(0, 255, (*shape, 3), np.uint8)
        Image.fromarray(array).convert(mode).save(folder / f"{number}.png")
    config = make(data__path=str(folder), **changes)
    last = pretrain(config)
    assert np.isfinite(last["loss"])
    assert {"loss_teacher", "loss_momentum"} <= last.keys()
    assert list((Path(config.out) / "pictures").glob("*.png"))


@pytest.mark.usefixtures("drawn")
def test_the_picture_shows_what_the_mask_is(make: Make) -> None:
    """Hidden patches are flat grey in the last column, visible ones are the image."""
    config = make(mask__source="teacher", target__source="teacher", mask__rule="high")
    pretrain(config)
    (path,) = (Path(config.out) / "pictures").glob("*.png")
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    grey = np.abs(pixels - 158).max(-1) <= 1  # canvas.HIDDEN
    right = grey[:, grey.shape[1] // 2 :].mean()
    assert right > 0.1  # three quarters of six images are hidden
    assert grey[:, : grey.shape[1] // 3].mean() < 0.02
