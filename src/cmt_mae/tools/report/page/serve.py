"""``cmt-mae watch``: the page of a run while it goes on, on this machine only, read-only."""

import contextlib
import hashlib
import ipaddress
import json
import mimetypes
import socket
import sys
import threading
import time
import webbrowser
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from cmt_mae.core.errors import InputError
from cmt_mae.core.run_reader import PICTURES, files_below, inside, read_run, result_files
from cmt_mae.core.settings import Port, check_fields
from cmt_mae.core.text import one_line, printable
from cmt_mae.tools.report.page.render import page

WATCHED = (
    "config.yaml",
    "run.json",
    "run.lock",
    "metrics.jsonl",
    "warnings.jsonl",
    "bad_images.txt",
)
HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
SECONDS_TO_ASK = 10
"""A client that is slower to send its request is hung up on."""


@dataclass
class WatchConfig:
    """Serve the page of a run while it goes on; it updates by itself. Nothing is written; Ctrl-C ends it."""

    run: str
    """Run directory of `pretrain`."""
    port: Port = 8070
    """Of the address; 0: any free one."""
    host: str = "127.0.0.1"
    """Address to listen on. Everybody who reaches it can read the run: only this machine by default."""
    open: bool = False
    """Show the page in a browser."""


def watch(config: WatchConfig) -> dict[str, Any]:
    """Serve until Ctrl-C. Raises InputError for a folder that is no run and an address that cannot be used."""
    check_fields(config)
    read_run(config.run)  # refuses what is no run before anything listens
    server = make_server(config)
    address = address_of(config.host, server.server_address[1])
    with server, contextlib.suppress(KeyboardInterrupt):
        told = f"watching {config.run} at {address} (Ctrl-C ends)"
        print(printable(told), file=sys.stderr, flush=True)
        if not is_loopback(config.host):
            print("warning: everybody who reaches this address can read the run", file=sys.stderr)
        if config.open:
            webbrowser.open(address)
        server.serve_forever(poll_interval=0.2)
    print("stopped watching", file=sys.stderr)
    return {"address": address}


class Server(ThreadingHTTPServer):
    """One run directory on one address."""

    daemon_threads = True  # Ctrl-C does not wait for a browser's open connection
    run: Path
    names: frozenset[str]
    """Host names under which it may be asked for, in lower case."""
    making: threading.Lock
    made: tuple[str, bytes] = ("", b"")
    """Stamp and text of the newest page: made once for all who look."""

    def page(self) -> bytes:
        """The page as the run stands now."""
        with self.making:
            stamp = stamp_of(self.run)
            if self.made[0] != stamp:
                self.made = (stamp, page([read_run(str(self.run))], stamp).encode())
            return self.made[1]


def make_server(config: WatchConfig) -> Server:
    """Bound and listening. Raises InputError where the address cannot be used."""
    if not 0 <= config.port < 65536:
        raise InputError(f"--port {config.port} is out of range: give 0 to 65535")
    try:
        family = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0][0]
        kind = type("Bound", (Server,), {"address_family": family})
        server: Server = kind((config.host, config.port), Handler)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"cannot listen on {one_line(config.host, 80)} port {config.port} ({reason}): give another --port, or "
            "0 for any free one"
        ) from error
    server.run = Path(config.run).expanduser()
    server.making = threading.Lock()
    server.names = frozenset({"localhost", config.host.lower()})
    return server


class Handler(BaseHTTPRequestHandler):
    """GET and HEAD of the page, of its stamp, and of the few files that it shows."""

    server: Server
    timeout = SECONDS_TO_ASK
    server_version, sys_version = "cmt-mae", ""

    def do_GET(self) -> None:
        """Answer one request."""
        if not asks_for(self.headers.get_all("Host") or [], self.server.names):
            self.refuse(HTTPStatus.MISDIRECTED_REQUEST, "this server is not known by that name")
            return
        path = urlsplit(self.path).path
        try:
            if path == "/":
                self.answer(self.server.page(), "text/html; charset=utf-8")
            elif path == "/stamp":
                stamp = json.dumps({"stamp": stamp_of(self.server.run)})
                self.answer(stamp.encode(), "application/json")
            elif path.startswith("/files/"):
                self.send_file(path.removeprefix("/files/"))
            else:
                self.refuse(HTTPStatus.NOT_FOUND, "no such page")
        except (InputError, OSError) as error:
            if isinstance(error, ConnectionError | TimeoutError):
                return  # the browser has gone
            self.refuse(HTTPStatus.SERVICE_UNAVAILABLE, one_line(error))

    do_HEAD = do_GET

    def send_file(self, quoted: str) -> None:
        """A file that the page shows; anything else is not there."""
        path = file_of(self.server.run, quoted)
        if path is None:
            self.refuse(HTTPStatus.NOT_FOUND, "no such file on the page of this run")
            return
        kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        self.answer(
            path.read_bytes(), kind, {"Content-Security-Policy": "default-src 'none'; sandbox"}
        )

    def answer(
        self,
        body: bytes,
        kind: str,
        more: dict[str, str] | None = None,
        status: HTTPStatus = HTTPStatus.OK,
    ) -> None:
        """Status, headers, and the body where it was asked for."""
        self.send_response(status)
        for name, value in {**HEADERS, **(more or {}), "Content-Type": kind}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: HTTPStatus, text: str) -> None:
        """A line of plain text."""
        self.answer(f"{text}\n".encode(), "text/plain; charset=utf-8", status=status)

    def log_message(self, format: str, *args: object) -> None:
        """Requests are not logged: the page asks every two seconds."""


def asks_for(hosts: list[str], names: frozenset[str]) -> bool:
    """Whether the Host header is one of ours: a name we were given, or an address.

    A page of another site can make a browser ask here under a name of its own (DNS rebinding); it cannot
    make that name an address, or localhost.
    """
    if len(hosts) != 1:
        return False
    try:
        host = urlsplit(f"//{hosts[0]}").hostname or ""
        _ = urlsplit(f"//{hosts[0]}").port
    except ValueError:
        return False
    if "@" in hosts[0] or "/" in hosts[0]:
        return False
    return host in names or is_address(host)


def is_address(host: str) -> bool:
    """Whether a host is written as an IP address."""
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)


def file_of(run: Path, quoted: str) -> Path | None:
    """The file that an address names, or None: pictures and results of the run, nothing outside it."""
    name = unquote(quoted, errors="replace")
    parts = name.split("/")
    if "\\" in name or any(part in ("", ".", "..") or part.startswith(".") for part in parts):
        return None
    allowed = {"pictures": PICTURES, "results": (".json",)}.get(parts[0])
    if allowed is None or not name.lower().endswith(allowed):
        return None
    path = run.joinpath(*parts)
    # below that folder too: a link to a checkpoint leads not out of the run, but is no picture
    return path if inside(run, path) and inside(run / parts[0], path) else None


def stamp_of(run: Path) -> str:
    """Changes whenever a file of the page does: names, sizes and times; and every ten minutes ("no news for")."""
    seen = [str(int(time.time() // 600))]
    paths = [run / name for name in WATCHED] + result_files(run)
    with contextlib.suppress(OSError):  # a folder that leads out of the run is not looked into
        paths += files_below(run, "pictures")
    for path in paths:
        with contextlib.suppress(OSError):
            info = path.stat()
            seen.append(f"{path}\0{info.st_mtime_ns}\0{info.st_size}")
    return hashlib.sha256("\n".join(seen).encode(errors="surrogateescape")).hexdigest()[:16]


def address_of(host: str, port: int) -> str:
    """As a browser takes it."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return f"http://[{shown}]:{port}/" if ":" in shown else f"http://{shown}:{port}/"
