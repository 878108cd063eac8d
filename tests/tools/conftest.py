"""A finished run of MAE beside `cmt_run`, for all who only read them: width 16, 4 x 4 patches."""

from pathlib import Path

import pytest

from cmt_mae.tools.pretrain import pretrain
from tiny import tiny_run


@pytest.fixture(scope="session")
def photos(scenes: Path) -> Path:
    """40 scenes of 40 px in folders by class."""
    return scenes / "train"


@pytest.fixture(scope="session")
def mae_run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 steps, no teacher, normalised pixels, two checkpoints left."""
    out = tmp_path_factory.mktemp("runs") / "mae"
    plain = {"mask__rule": "random", "target__source": "pixel", "target__norm": "mae", "epochs": 0.8}
    pretrain(tiny_run(out, photos, "none", runtime__checkpoint_every=0.4, **plain))
    return out
