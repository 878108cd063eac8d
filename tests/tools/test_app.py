"""The explorer: what the sliders do to the pictures, and the page in a real browser."""

import http.client
import shutil
import struct
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from cmt_mae.backbones.save import save_backbone
from cmt_mae.core.errors import InputError
from cmt_mae.data.sample import pictures
from cmt_mae.tools.app.command import AppConfig, app, find_runs, first_image, start
from cmt_mae.tools.app.explorer import OWN_TEACHER, TILES, Choice, Controls, Explorer

PLAIN = Controls(alpha=0.3, ratio=0.75, rule="sampled_high")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A scene, wider than high."""
    path = tmp_path_factory.mktemp("image") / "scene.png"
    Image.fromarray(pictures(1)[0]).resize((128, 96)).save(path)
    return str(path)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A network of random weights on the same grid, so that its attention is another one."""
    torch.manual_seed(0)
    kwargs = {"img_size": 64, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **kwargs)
    with torch.no_grad():  # as they are drawn, all attention is uniform
        model.blocks[-1].attn.qkv.weight.mul_(20)
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_backbone(
        path, model, architecture="vit_tiny_patch16_224", kwargs=kwargs, mean=(0.5,) * 3, std=(0.5,) * 3,
        img_size=64, licence="none", source="random weights of a test",
    )  # fmt: skip
    return str(path)


@pytest.fixture(scope="module")
def explorer(teacher: str) -> Explorer:
    """The embedded backbone beside a teacher of two blocks and two heads."""
    return Explorer([], ["embedded"], [teacher])


@pytest.fixture(scope="module")
def both(teacher: str) -> Choice:
    """Student and teacher."""
    return Choice("embedded", None, teacher)


def grey_share(visible: np.ndarray) -> float:
    """Share of the picture in the grey of hidden patches."""
    return float((visible == round(0.62 * 255)).all(-1).mean())


def test_every_tile_is_there_and_hidden_patches_are_as_many_as_asked(
    explorer: Explorer, both: Choice, image: str
) -> None:
    seen = explorer.view(both, image, PLAIN)
    assert set(seen.tiles) == set(TILES)
    shapes = {one.shape for one in seen.tiles.values()}
    assert len(shapes) == 1, shapes
    assert all(one.dtype == np.uint8 for one in seen.tiles.values())
    for ratio in (0.25, 0.5, 0.75):
        drawn = explorer.view(both, image, replace(PLAIN, ratio=ratio)).tiles["visible"]
        assert grey_share(drawn) == pytest.approx(ratio, abs=0.002)


@pytest.mark.parametrize(
    ("changed", "moves", "stays"),
    [
        ({"alpha": 1.0}, ["collab", "visible"], ["student_features", "teacher_features"]),
        ({"rule": "block"}, ["visible"], ["collab", "teacher"]),
        ({"temperature": 5.0}, ["visible"], ["collab"]),
        ({"seed": 4}, ["visible"], ["collab", "student_features"]),
        ({"layer": 1}, ["teacher", "student", "student_features"], ["photo"]),
        ({"head": 2}, ["teacher", "student", "collab"], ["photo", "student_features"]),
    ],
)
def test_each_control_moves_its_pictures_and_no_others(
    explorer: Explorer,
    both: Choice,
    image: str,
    changed: dict[str, Any],
    moves: list[str],
    stays: list[str],
) -> None:
    before = explorer.view(both, image, PLAIN).tiles
    after = explorer.view(both, image, replace(PLAIN, **changed)).tiles
    for name in moves:
        assert not np.array_equal(before[name], after[name]), name
    for name in stays:
        assert np.array_equal(before[name], after[name]), name


def test_alpha_one_is_the_student_alone_and_zero_the_teacher(
    explorer: Explorer, both: Choice, image: str
) -> None:
    for alpha, same, other in ((0.0, "teacher", "student"), (1.0, "student", "teacher")):
        tiles = explorer.view(both, image, replace(PLAIN, alpha=alpha)).tiles
        assert np.array_equal(tiles["collab"], tiles[same])
        assert not np.array_equal(tiles["collab"], tiles[other])


def test_blocks_and_heads_are_those_that_both_networks_have(
    explorer: Explorer, both: Choice
) -> None:
    assert explorer.limits(both) == (2, 2)
    assert explorer.limits(Choice("embedded", None, "none"))[0] == 6


def test_likeness_is_one_at_the_patch_itself_and_marks_it(explorer: Explorer, image: str) -> None:
    alone = Choice("embedded", None, "none")
    seen = explorer.similarity(alone, alone, image, (0.99, 0.0), stretch=True)
    photo, first, second = seen.pictures
    assert np.array_equal(first, second)
    side = photo.shape[0] // 8  # 8 x 8 patches
    assert (photo[-side, :side] == 255).all(), "the frame of the patch at the lower left"
    assert seen.darkest[0] == seen.darkest[1] < 1
    # the brightest colour of the scale lies on the patch: brighter than anything beside it
    inside = first[-side // 2, side // 2].astype(int).sum()
    others = first[:-side].astype(int).sum(-1)
    assert inside >= np.quantile(others, 0.9)


def test_a_run_offers_its_checkpoints_and_its_own_settings(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run"):
        Explorer([str(tmp_path)], [], [])
    with pytest.raises(InputError, match="holds no run"):
        find_runs([str(tmp_path)])
    with pytest.raises(InputError, match="not in the list"):
        Explorer([], ["embedded"], []).view(
            Choice("/etc/passwd", None, OWN_TEACHER), "x.png", PLAIN
        )


def test_what_a_file_does_not_say_is_given_as_to_any_command(tmp_path: Path, image: str) -> None:
    """For the files that do not say it; `embedded`, which does, is opened beside them as it is."""
    file = tmp_path / "bare.pth"
    kwargs = {"img_size": 64, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=0, **kwargs).state_dict(), file)
    names = ["embedded", str(file)]
    with pytest.raises(InputError, match=r"--arch NAME --heads N .*--mean"):
        Explorer([], names, [], AppConfig()).limits(Choice(str(file), None, "none"))
    given = AppConfig(arch="vit_tiny_patch16_224", heads=2, grid=[8, 8], mean=[0.5] * 3, std=[0.5] * 3)
    explorer = Explorer([], names, [], given)
    assert explorer.limits(Choice(str(file), None, "none")) == (2, 2)
    assert explorer.limits(Choice("embedded", None, "none")) == (6, 4)
    assert explorer.view(Choice(str(file), None, "none"), image, PLAIN).tiles


def test_a_broken_image_is_one_line(explorer: Explorer, both: Choice, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match=r"x\.png"):
        explorer.view(both, str(tmp_path / "x.png"), PLAIN)


def test_without_gradio_how_to_fix_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    with pytest.raises(InputError, match="pip install 'gradio"):
        app(AppConfig())


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds one row's worth of nothing."""
    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", zlib.compress(b"0")) + part(b"IEND", b"")


def test_a_foreign_host_name_is_refused(served: str) -> None:
    """As of `watch`: a page from outside may not give this machine a name of its own."""
    url = urlsplit(served)
    for host, status in ((url.netloc, 200), ("localhost", 200), ("evil.example", 421)):
        connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=30)
        connection.request("GET", "/config", headers={"Host": host})
        assert connection.getresponse().status == status, host
        connection.close()


def test_the_first_image_is_one_of_the_runs(tmp_path: Path, image: str) -> None:
    (tmp_path / "photos").mkdir()
    shutil.copy(image, tmp_path / "photos" / "a.png")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(f"data: {{path: {tmp_path / 'photos'}}}\nstudent: {{}}\nmask: {{}}\n")
    gone = tmp_path / "gone"
    gone.mkdir()
    (gone / "config.yaml").write_text("data: {path: /no/such/folder}\nstudent: {}\nmask: {}\n")
    found = first_image([str(gone), str(run)], tmp_path)
    with Image.open(found) as shown, Image.open(image) as own:
        assert np.array_equal(np.asarray(shown), np.asarray(own.convert("RGB")))
    with Image.open(first_image([str(gone)], tmp_path)) as scene:
        assert scene.size == (96, 96)


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The page on a free port of loopback."""
    pytest.importorskip("gradio", reason="needs the extra app: pip install gradio")
    for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "")  # put back afterwards
    page, address = start(AppConfig(port=0), tmp_path)
    yield address
    page.close(verbose=False)


def test_page_upload_slider_click_download_and_nothing_from_outside(
    chromium: Any, served: str, image: str, tmp_path: Path
) -> None:
    page = chromium.new_page(viewport={"width": 1300, "height": 900})
    asked: list[str] = []
    broken: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: broken.append(str(error)))

    def source(tile: str) -> str:
        found: str = page.get_attribute(f"#tile_{tile} img", "src")
        return found

    def changed(tile: str, before: str) -> None:
        page.wait_for_function(
            "([tile, before]) => ![null, undefined, before].includes("
            "document.querySelector(`#tile_${tile} img`)?.getAttribute('src'))",
            arg=[tile, before], timeout=60_000,
        )  # fmt: skip

    page.goto(served)
    changed("visible", "")
    first = source("collab")
    page.set_input_files("#upload input[type=file]", image)
    changed("collab", first)
    before, student = source("visible"), source("student")
    page.locator("#ratio input[type=range]").focus()
    page.keyboard.press("ArrowLeft")
    changed("visible", before)
    assert source("student") == student, "attention does not hang on the mask"
    with page.expect_download(timeout=60_000) as download:
        page.click("#save")
    assert Path(download.value.path()).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    page.get_by_role("tab", name="Compare two backbones").click()
    changed("second", "")
    before = source("second")
    page.locator("#tile_click img").click(position={"x": 40, "y": 60})
    changed("second", before)
    assert not broken
    assert page.inner_text("#name_second") == "second: embedded", "which map is whose"
    page.get_by_role("tab", name="Attention, mask, features").click()
    huge = str(tmp_path / "huge.png")
    Path(huge).write_bytes(png_header(60_000, 60_000))
    page.set_input_files("#upload input[type=file]", huge)
    page.wait_for_selector("text=this image cannot be shown", timeout=60_000)
    outside = [url for url in asked if not url.startswith((served, "data:", "blob:"))]
    assert outside == []
