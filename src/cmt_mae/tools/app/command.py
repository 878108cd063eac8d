"""`cmt-mae app`: settings, and starting the server."""

import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from cmt_mae.core.backbone_facts import BackboneFacts
from cmt_mae.core.errors import InputError
from cmt_mae.core.settings import Port, check_fields
from cmt_mae.data.sample import pictures
from cmt_mae.tools.app.explorer import Explorer
from cmt_mae.tools.inspect.images import Album
from cmt_mae.tools.inspect.networks import read_config
from cmt_mae.tools.report.page.serve import asks_for

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass
class AppConfig(BackboneFacts):
    """Look at attention, masks and features by hand, in the browser (needs the extra `app`).

    Drop an image; choose run, checkpoint and teacher; move the sliders; compare two backbones by a click on a
    patch. Serves on this machine alone, asks nothing of the network, and opens only what is named here.
    --arch, --mean, --std, --heads and --grid hold for those --backbones whose file does not say them.
    """

    binding: ClassVar[bool] = False

    runs: list[str] = field(default_factory=list)
    """Run directories, or folders of them. Default: what lies in runs/."""
    backbones: list[str] = field(default_factory=lambda: ["embedded"])
    """Further backbones: file, timm name or `embedded`."""
    teachers: list[str] = field(default_factory=lambda: ["embedded"])
    """Teachers to choose from besides each run's own: file, timm name, run directory or `embedded`."""
    host: str = "127.0.0.1"
    """Address to serve on. Any but this machine's own lets others in: they see your images and runs."""
    port: Port = 7860
    """Port; 0: a free one."""
    browser: bool = False
    """Open a browser window."""


def app(config: AppConfig) -> dict[str, Any]:
    """Serve until interrupted; returns the address. Raises InputError without gradio, runs or a free port."""
    check_fields(config)
    with tempfile.TemporaryDirectory(prefix="cmt-mae-app-") as folder:
        page, address = start(config, Path(folder))
        print(f"serving on {address} (Ctrl-C ends it)", flush=True)
        try:
            page.block_thread()
        finally:
            page.close(verbose=False)
    return {"address": address}


def start(config: AppConfig, folder: Path) -> tuple[Any, str]:
    """The running page and its address. folder: for uploads and pictures; it may go when the page is closed."""
    runs = find_runs(config.runs)  # before gradio, which takes seconds to import
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "uploads")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import gradio
    except ImportError as error:
        raise InputError("the app needs gradio: pip install 'gradio>=6.20'") from error
    from cmt_mae.tools.app.page import CSS, build, theme

    explorer = Explorer(runs, config.backbones, config.teachers, config)
    page = build(explorer, first_image(runs, folder), folder)
    try:
        _, address, _ = page.launch(
            server_name=config.host, server_port=config.port or None, share=False, inbrowser=config.browser,
            quiet=True, prevent_thread_lock=True, max_file_size="200mb", ssr_mode=False, footer_links=[],
            theme=theme(gradio), css=CSS, pwa=False, mcp_server=False, enable_monitoring=False,
            app_kwargs={"middleware": [(KnownHosts, [config.host], {})]},
        )  # fmt: skip
    except OSError as error:
        raise InputError(
            f"cannot serve on {config.host}:{config.port} ({error}): give another --port"
        ) from error
    if config.host not in LOOPBACK:
        print(f"warning: {config.host} lets other machines in: they see your images and runs")
    return page, address


def find_runs(given: list[str]) -> list[str]:
    """Run directories among the given folders and right below them. Raises InputError where one holds none."""
    found: list[str] = []
    for name in given or (["runs"] if Path("runs").is_dir() else []):
        folder = Path(name)
        if (folder / "config.yaml").is_file():
            found.append(name)
            continue
        below = sorted(str(one.parent) for one in folder.glob("*/config.yaml"))
        if given and not below:
            raise InputError(
                f"{name} holds no run (no config.yaml in it or one below): give run directories"
            )
        found += below
    return found


def first_image(runs: list[str], folder: Path) -> Path:
    """The picture that the page begins with: one that a run was trained on, else a sample image."""
    from PIL import Image

    pixels = pictures(8)[7]
    for run in runs:
        with suppress(InputError, StopIteration):
            pixels = next(Album([read_config(Path(run)).data.path]).read(3, 1)).pixels
            break
    path = folder / "first.png"
    Image.fromarray(pixels).save(path)
    return path


class KnownHosts:
    """ASGI: requests under a foreign host name are refused, so that no page from outside can have a name of its
    own point to this machine and read what is served here (DNS rebinding); the rule is that of `watch`."""

    def __init__(self, app: Any, host: str) -> None:
        self.app, self.names = app, frozenset({"localhost", host.lower()})

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass on, or answer 421."""
        hosts = [v.decode("latin-1") for k, v in scope.get("headers", []) if k == b"host"]
        if scope["type"] not in ("http", "websocket") or asks_for(hosts, self.names):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await send({"type": "http.response.start", "status": 421, "headers": []})
            await send({"type": "http.response.body", "body": b"unknown host name"})
