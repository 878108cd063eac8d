"""A CMT run of 10 steps (5 + 5), all checkpoints kept, and an MAE run of 4: width 16, 4 x 4 patches."""

from pathlib import Path

import pytest

from cmt_mae.data.sample import write_imagefolder
from cmt_mae.pretraining.settings import PretrainConfig
from cmt_mae.tools.pretrain import pretrain
from random_teacher import write_teacher


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 scenes of 40 px in folders by class."""
    folder = tmp_path_factory.mktemp("photos")
    write_imagefolder(folder, 40, 0, 40)
    return folder / "train"


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A frozen ViT with random weights: 48 px, patch 12, so its grid is the student's 4 x 4; 3 heads."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    return write_teacher(path, heads=3, spread=0.3)


def settings(photos: Path, teacher: Path, out: Path) -> PretrainConfig:
    """Of a run of 5 steps an epoch."""
    config = PretrainConfig(out=str(out), epochs=2, batch_size=8, precision="fp32")
    config.data.path, config.data.workers = str(photos), 0
    config.student.img_size, config.student.patch_size = [32], 8
    config.student.preset, config.student.width = "micro", 16
    config.student.depth, config.student.heads = 2, 2
    config.teacher.name = str(teacher)
    config.decoder.width, config.decoder.depth, config.decoder.heads = 16, 1, 2
    config.optim.blr, config.optim.warmup_epochs = 0.03, 0.5
    config.runtime.device, config.runtime.progress, config.runtime.log_every = "cpu", False, 1
    config.runtime.keep_every = 0.4
    config.runtime.checkpoint_every = 0.4
    return config


@pytest.fixture(scope="session")
def cmt_run(photos: Path, teacher_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages, both targets."""
    out = tmp_path_factory.mktemp("runs") / "cmt"
    pretrain(settings(photos, teacher_file, out))
    return out


@pytest.fixture(scope="session")
def mae_run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No teacher, normalised pixels, two checkpoints left."""
    out = tmp_path_factory.mktemp("runs") / "mae"
    config = settings(photos, Path("none"), out)
    config.mask.rule, config.target.source, config.target.norm = "random", "pixel", "mae"
    config.epochs, config.runtime.keep_every = 0.8, 0
    pretrain(config)
    return out
