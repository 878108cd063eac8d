"""The page in a real browser: drawn, without an error or a request, by keyboard, light and dark, on a phone."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cmt_mae.evaluate.drawing import save_picture
from cmt_mae.tools.hooks import CELL
from cmt_mae.tools.inspect.attention import attention_sheet
from cmt_mae.tools.report.page.command import ReportConfig, make_report
from cmt_mae.tools.report.page.serve import WatchConfig, make_server
from written_run import Write, row


class Opened:
    """A page in the browser, and everything it complained of or asked for."""

    def __init__(
        self, browser: Any, address: str, width: int = 1100, scheme: str = "light"
    ) -> None:
        self.context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, bypass_csp=False
        )
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(address)
        self.page.wait_for_selector(".uplot canvas")

    def close(self) -> None:
        self.context.close()


@pytest.fixture
def two(write: Write) -> str:
    """A page of two runs."""
    first = write("a", knn={0: 20.0, 50: 50.0, 100: 60.0})
    second = write("b", switch=100, settings={"seed": 5})
    (first / "bad_images.txt").write_text("x.jpg\tbroken\n")
    said = make_report(
        ReportConfig(runs=[str(first), str(second)], out=str(first.parent / "two.html"))
    )
    return f"file://{said['path']}"


def test_renders_alone_in_light_and_dark(chromium: Any, two: str) -> None:
    colours = {}
    for scheme in ("light", "dark"):
        opened = Opened(chromium, two, scheme=scheme)
        assert opened.complaints == []
        assert [url for url in opened.asked if not url.startswith(("file:", "data:"))] == []
        page = opened.page
        assert page.locator(".plot").count() == page.locator(".uplot canvas").count() > 8
        colours[scheme] = page.evaluate(
            "[getComputedStyle(document.body).backgroundColor,"
            " document.querySelector('.legend line').getAttribute('stroke')]"
        )
        assert page.locator("img[alt]").evaluate_all(
            "all => all.every(i => i.alt === '' || i.naturalWidth > 0)"
        )
        # the switch to dark while the page is open draws the charts anew
        page.emulate_media(color_scheme="dark")
        page.locator(".legend line[stroke='#6cb6ff']").first.wait_for(state="attached")
        opened.close()
    assert colours["light"] != colours["dark"]


def test_hostile_names_run_nothing(chromium: Any, hostile: Path) -> None:
    said = make_report(ReportConfig(runs=[str(hostile)], out=str(hostile.parent / "h.html")))
    opened = Opened(chromium, f"file://{said['path']}")
    assert opened.complaints == []
    assert opened.page.evaluate("window.hurt") is None
    assert opened.page.inner_text("h1") == '<img src=x onerror="window.hurt=1">'
    opened.close()


def test_the_keyboard_reads_zooms_and_hides(chromium: Any, two: str) -> None:
    opened = Opened(chromium, two)
    page = opened.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    chart = page.locator("#plot-loss")
    assert chart.get_attribute("role") == "slider"
    chart.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    said = chart.get_attribute("aria-valuetext")
    assert said.startswith("epoch 2, step 20: a: teacher loss 1.5")
    assert "b 1.5" in said
    # the other charts follow
    assert page.inner_text("#chart-lr .at") == "epoch 2, step 20"
    page.keyboard.press("+")
    page.keyboard.press("Escape")
    page.locator("#line-loss-0").focus()
    page.keyboard.press("Enter")
    assert page.get_attribute("#line-loss-0", "aria-pressed") == "false"
    page.locator("#log-loss").press("Enter")
    assert page.get_attribute("#log-loss", "aria-pressed") == "true"
    assert page.evaluate("document.activeElement.id") == "log-loss"
    page.locator("#d-loss summary").press("Enter")
    assert page.locator("#d-loss table caption").first.is_visible()
    page.locator(".enlarge").first.press("Enter")
    assert page.locator("dialog#large img").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("dialog#large").is_visible()
    assert opened.complaints == []
    opened.close()


@pytest.mark.parametrize("width", [1100, 390])
def test_pictures_have_one_scale(chromium: Any, write: Write, width: int) -> None:
    """Two columns of one run and five of another: a photo is as large in both, on a phone too."""
    images = torch.rand(2, 3, 32, 32)
    share, mask = torch.full((2, 16), 1 / 16), torch.zeros(2, 16, dtype=torch.bool)
    kinds = {"mae": {}, "cmt": {"teacher": share, "student": share, "collab": share}}
    runs = [write(name, pictures=0) for name in kinds]
    for run, maps in zip(runs, kinds.values(), strict=True):
        path = run / "pictures" / "attention_step_00000050.png"
        save_picture(attention_sheet(images, maps, mask, (4, 4), "run", largest=CELL).figure, path)
    said = make_report(ReportConfig(runs=[str(run) for run in runs], out=str(runs[0].parent / "p.html")))
    opened = Opened(chromium, f"file://{said['path']}", width=width)
    shown = opened.page.locator(".pictures img").evaluate_all(
        "all => all.map(one => [one.getBoundingClientRect().height, one.getBoundingClientRect().width])"
    )
    (low, narrow), (high, wide) = shown
    assert low == pytest.approx(high, rel=0.06), "equal rows are equally high"
    assert wide > 2 * narrow
    assert wide <= width
    # no ground of their own: the page's colour shows, and letters are legible on both
    picture = Image.open(runs[1] / "pictures" / "attention_step_00000050.png")
    assert picture.convert("RGBA").getpixel((1, 1))[3] == 0
    opened.close()


def test_on_a_phone_wide_tables_say_so_and_the_page_scrolls_one_way(chromium: Any, two: str) -> None:
    for width, wide in ((1100, False), (390, True)):
        opened = Opened(chromium, two, width=width)
        first = opened.page.locator("#differences .scroll")
        assert ("wide" in first.get_attribute("class").split()) is wide
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
        canvas = opened.page.locator(".uplot").first.bounding_box()
        assert 300 < canvas["width"] <= width
        opened.close()


def test_axe_finds_nothing(chromium: Any, two: str) -> None:
    """Deque's rules (WCAG 2 A and AA, best practices), with everything unfolded, in both colours."""
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="needs axe-playwright-python"
    )
    opened = Opened(chromium, two)
    for scheme in ("light", "dark"):
        opened.page.emulate_media(color_scheme=scheme)
        opened.page.evaluate(
            "document.querySelectorAll('details').forEach(one => { one.open = true })"
        )
        found = axe.Axe().run(opened.page).response["violations"]
        assert [(one["id"], one["nodes"][0]["html"]) for one in found] == []
    opened.close()


@pytest.fixture
def live(write: Write) -> Iterator[tuple[Path, str]]:
    """A run half done, and the address where it is watched."""
    run = write(done=60, knn={0: 20.0})
    served = make_server(WatchConfig(run=str(run), port=0))
    threading.Thread(
        target=served.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
    ).start()
    yield run, f"http://127.0.0.1:{served.server_address[1]}/"
    served.shutdown()
    served.server_close()


def test_watching_follows_the_run(chromium: Any, live: tuple[Path, str]) -> None:
    run, address = live
    opened = Opened(chromium, address)
    page = opened.page
    page.locator("#d-loss summary").click()
    page.locator("#plot-loss").focus()
    assert "stopped early at step 60 of 100" in page.inner_text(".line")
    with open(run / "metrics.jsonl", "a") as file:
        file.write(
            json.dumps(row(70, 50)) + "\n" + json.dumps({"step": 70, "knn_top1": 66.0}) + "\n"
        )
    page.locator(".line", has_text="66.0").wait_for(timeout=15_000)
    assert "step 70 of 100" in page.inner_text(".line")
    assert page.locator("#plot-loss").get_attribute("aria-valuenow") == "7"
    # what the reader had opened and where they were is as before
    assert page.locator("#d-loss").get_attribute("open") is not None
    assert page.evaluate("document.activeElement.id") == "plot-loss"
    assert opened.complaints == []
    assert all(url.startswith((address, "data:")) for url in opened.asked)
    opened.close()
