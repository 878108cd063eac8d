"""The server of `watch`: read-only, this machine only, nothing but the run."""

import http.client
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from cmt_mae.core.cli import main
from cmt_mae.core.errors import InputError
from cmt_mae.core.run_reader import read_run
from cmt_mae.tools.report.page.render import page
from cmt_mae.tools.report.page.serve import (
    Server,
    WatchConfig,
    asks_for,
    file_of,
    make_server,
    stamp_of,
    watch,
)
from written_run import Write


@pytest.fixture
def server(write: Write) -> Iterator[Server]:
    run = write(knn={0: 20.0, 100: 60.0})
    (run / "results").mkdir()
    (run / "results" / "knn.json").write_text("{}")
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "last.pt").write_bytes(b"weights")
    (run / "pictures" / "out.png").symlink_to("/etc/passwd")
    (run / "pictures" / "weights.png").symlink_to(run / "checkpoints" / "last.pt")
    (run / "pictures" / "up").symlink_to(run.parent)
    served = make_server(WatchConfig(run=str(run), port=0))
    thread = threading.Thread(
        target=served.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
    )
    thread.start()
    yield served
    served.shutdown()
    served.server_close()


def ask(
    server: Server, path: str, method: str = "GET", host: str | None = None
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    connection.putrequest(method, path, skip_host=True)
    if host != "":
        connection.putheader("Host", host or f"127.0.0.1:{server.server_address[1]}")
    connection.endheaders()
    answer = connection.getresponse()
    status, body = answer.status, answer.read()
    connection.close()
    return status, body


def test_page_stamp_and_pictures(server: Server) -> None:
    status, body = ask(server, "/")
    assert status == 200
    assert f'data-live="{stamp_of(server.run)}"'.encode() in body
    assert b"/files/pictures/attention_step_00000050.png?" in body
    assert ask(server, "/stamp")[1] == f'{{"stamp": "{stamp_of(server.run)}"}}'.encode()
    assert ask(server, "/files/pictures/attention_step_00000050.png?17")[1].startswith(b"\x89PNG")
    assert ask(server, "/files/results/knn.json") == (200, b"{}")
    assert ask(server, "/", method="HEAD") == (200, b"")


@pytest.mark.parametrize(
    "path",
    [
        "../config.yaml", "pictures/../config.yaml", "pictures/../../b.png", "%2e%2e/config.yaml",
        "pictures/%2e%2e/%2e%2e/x.png", "pictures%2f..%2f..%2fx.png", "pictures/..%5c..%5cx.png", "/etc/passwd",
        "//etc/passwd", "%2fetc%2fpasswd", "config.yaml", "run.lock", "checkpoints/last.pt", "pictures/out.png",
        "pictures/up/b.png", "pictures/weights.png", "pictures/", "pictures", "", ".", "..",
        "pictures/%00.png", "pictures/x.png%00", "results/../results/knn.json", "pictures/.hidden.png",
        "~root/x.png", "pictures/%252e%252e/x.png", "C:/x.png", "results/knn.json/..",
    ],
)  # fmt: skip
def test_nothing_outside_the_page_is_given(server: Server, path: str) -> None:
    (server.run.parent / "b.png").write_bytes(b"secret")
    (server.run.parent / "x.png").write_bytes(b"secret")
    assert file_of(server.run, path) is None
    status, body = ask(server, f"/files/{path}")
    assert status == 404
    assert body in (b"no such file on the page of this run\n", b"no such page\n")


def test_other_names_are_refused(server: Server) -> None:
    port = server.server_address[1]
    for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example", "127.0.0.1.evil.example", "",
                 "user@127.0.0.1", "localhost/", "[::1", "localhost:x"):  # fmt: skip
        assert ask(server, "/", host=host)[0] == 421, host
        assert ask(server, "/stamp", host=host)[0] == 421, host
    for host in (
        "localhost",
        f"localhost:{port}",
        f"LOCALHOST:{port}",
        f"127.0.0.1:{port}",
        f"[::1]:{port}",
    ):
        assert ask(server, "/stamp", host=host)[0] == 200, host
    assert not asks_for(["localhost", "evil.example"], frozenset({"localhost"}))
    assert asks_for(["my-machine:80"], frozenset({"localhost", "my-machine"}))


def test_it_only_reads(server: Server) -> None:
    before = {p: p.lstat().st_mtime_ns for p in server.run.rglob("*")}
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT"):
        assert ask(server, "/files/results/knn.json", method=method)[0] == 501
    ask(server, "/")
    assert {p: p.lstat().st_mtime_ns for p in server.run.rglob("*")} == before


def test_the_stamp_follows_the_files(server: Server) -> None:
    seen = {stamp_of(server.run)}
    with open(server.run / "metrics.jsonl", "a") as file:
        file.write('{"step": 101, "loss": 1}\n')
    seen.add(stamp_of(server.run))
    (server.run / "results" / "new.json").write_text("{}")
    seen.add(stamp_of(server.run))
    assert len(seen) == 3
    assert b"step 101" in ask(server, "/")[1]


@pytest.mark.parametrize("name", ["pictures", "results", "evaluations"])
def test_a_folder_that_is_a_link_out_of_the_run_is_not_looked_into(
    write: Write, tmp_path: Path, name: str
) -> None:
    """`pictures -> /` made report hang and /stamp take 47 s. FIFOs: nothing there may be opened."""
    outside = tmp_path / "outside"
    (outside / "x" / "results").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(outside / "secret.png")
    for place in (outside, outside / "x" / "results"):
        (place / "secret.json").write_text("{}")
        os.mkfifo(place / "pipe.json")
        os.mkfifo(place / "pipe.png")
    run = write(pictures=0)
    if (run / name).is_dir():
        (run / name).rmdir()
    (run / name).symlink_to(outside)
    before = stamp_of(run)
    (outside / "x" / "results" / "new.json").write_text("{}")
    assert stamp_of(run) == before
    text = page([read_run(run)])
    assert "secret" not in text
    assert "left out: " not in text
    (run / name).unlink()
    (run / name).symlink_to("/")
    begin = time.perf_counter()
    page([read_run(run)])
    stamp_of(run)
    assert time.perf_counter() - begin < 5


def test_a_run_that_vanishes_is_told(server: Server) -> None:
    server.run.rename(server.run.with_name("elsewhere"))
    status, body = ask(server, "/")
    assert (status, b"no such run directory" in body) == (503, True)


def test_only_this_machine_by_default(write: Write) -> None:
    served = make_server(WatchConfig(run=str(write()), port=0))
    assert served.server_address[0] == "127.0.0.1"
    with pytest.raises(InputError, match="give another --port"):
        make_server(WatchConfig(run="x", port=served.server_address[1]))
    served.server_close()


def test_bad_settings_cost_one_line(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="no such run directory"):
        watch(WatchConfig(run="missing"))
    assert main(["watch", str(write()), "more"]) == 2
    assert main(["watch", str(write("b")), "--port", "70000"]) == 2
    assert main(["watch", str(write("c")), "--port", "0", "--host", "no.such.host.invalid"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_ctrl_c_ends_it_cleanly(write: Write) -> None:
    command = [sys.executable, "-m", "cmt_mae", "watch", "--port", "0", str(write())]
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root,
        env={**os.environ, "PYTHONPATH": str(root / "src")},
        # a runner that was started in the background passes on that Ctrl-C is ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:  # fmt: skip
        assert process.stderr is not None
        first = process.stderr.readline()
        assert "at http://127.0.0.1:" in first
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=90)
    assert rest == "stopped watching\n"
    assert process.returncode == 0
