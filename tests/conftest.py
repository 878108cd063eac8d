"""Shared by all tests: one thread each, the folder of real data beside the repository, tiny runs, a browser.

Hypothesis tries the same examples every time, so that a change fails for its own faults. New ones are looked for
with CMT_MAE_NEW_EXAMPLES=1 in the environment; what they find is pinned with @example.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

settings.register_profile("same", derandomize=True)
if not os.environ.get("CMT_MAE_NEW_EXAMPLES"):
    settings.load_profile("same")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real photos and weights next to the repository; the test is skipped without it."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the real data in {SHARED}, which is not there")
    return SHARED


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A real headless browser, one for all tests; they are skipped with the reason where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    program = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if program is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # root has none
        browser = driver.chromium.launch(executable_path=program, args=sandbox)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled folders of scenes of 40 px: train (40 in 10 classes) and val (20)."""
    from cmt_mae.data.sample import write_imagefolder

    folder = tmp_path_factory.mktemp("scenes")
    write_imagefolder(folder, 40, 20, 40)
    return folder


@pytest.fixture(scope="session")
def images(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scenes, packed."""
    from cmt_mae.data.pack import PackConfig, pack

    out = tmp_path_factory.mktemp("images") / "packed"
    pack(PackConfig(data=str(scenes), out=str(out), size=40, workers=0))
    return out


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A frozen ViT with random weights: 48 px, patch 12, so its grid is the student's 4 x 4."""
    from tiny import write_teacher

    return write_teacher(tmp_path_factory.mktemp("teacher") / "teacher.safetensors")


@pytest.fixture
def drawn() -> None:
    """Runs of `make` draw their pictures."""


@pytest.fixture
def make(
    request: pytest.FixtureRequest, images: Path, teacher_file: Path, tmp_path: Path
) -> Iterator[Callable[..., Any]]:
    """Settings of a tiny run, by the name of its folder (tiny.tiny_run).

    In this process such runs draw no pictures unless the test asks for `drawn`: nine tenths of their time.
    """
    from tiny import tiny_run

    def build(out: str = "run", **changes: object) -> Any:
        return tiny_run(tmp_path / out, images, teacher_file, **changes)

    with pytest.MonkeyPatch.context() as patch:
        if "drawn" not in request.fixturenames:
            patch.setattr("cmt_mae.tools.pretrain.draw_attention", lambda *_: None)
        yield build


@pytest.fixture(scope="session")
def cmt_run(scenes: Path, teacher_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of both stages (5 + 5 steps) and both targets, all checkpoints kept; it is only read."""
    from cmt_mae.tools.pretrain import pretrain
    from tiny import tiny_run

    out = tmp_path_factory.mktemp("runs") / "cmt"
    keep = {"runtime__keep_every": 0.4, "runtime__checkpoint_every": 0.4}
    pretrain(tiny_run(out, scenes / "train", teacher_file, **keep))
    return out


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a run directory by hand (written_run.write_run)."""
    from written_run import write_run

    return lambda *words, **more: write_run(tmp_path, *words, **more)


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A run whose every name and text tries to be HTML or script."""
    from written_run import write_hostile_run

    return write_hostile_run(tmp_path)
