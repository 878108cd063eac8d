"""Faults of run folders, of what lies in them, and of disks: nothing lost, nothing mixed."""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.faults.files import bombs
from benchmarks.faults.lab import Broken, Lab, NotHere, Row, rows_of, tree
from benchmarks.faults.launch import Launch, judged
from benchmarks.faults.runs import EXACT, Words, whole_so_far
from benchmarks.faults.same import steps_done
from benchmarks.timing import free_port
from cmt_mae.core.checkpoint import (
    list_checkpoints,
)

# --- folders --------------------------------------------------------------------------------------------------


def unharmed(lab: Lab, run: Path, words: list[str], *says: str) -> None:
    """The command is refused and nothing in the run changes (its lock and list of starts apart)."""
    before = tree(run)
    lab.refused(words, *says)
    after = tree(run)
    changed = [
        name for name in before.keys() | after.keys()
        if before.get(name) != after.get(name) and not name.endswith((".lock", ".log"))
    ]  # fmt: skip
    if changed:
        raise Broken(f"refused, but changed: {sorted(changed)[:4]}")


def checkpoints_deleted(training: str, lab: Lab, rng: random.Random) -> None:
    """A finished training whose checkpoints were deleted is not trained anew by the same command."""
    words_in: Words = lab.finetune if training == "finetune" else lab.pretrain
    run = lab.fresh() / "run"
    shutil.copytree(lab.finished(f"{training} whole", words_in), run)
    for folder in [p for p in run.rglob("checkpoints") if p.is_dir()]:
        shutil.rmtree(folder)
    more = ["--seed=7"] if rng.random() < 0.5 else []
    unharmed(lab, run, [*words_in(run), *more])


def sidecar_gone(lab: Lab, _: random.Random) -> None:
    """The newest checkpoint without its .sha256 is named in a warning before older ones are used."""
    run = lab.copy_of_finished()
    newest = list_checkpoints(run / "checkpoints")[-1]
    newest.with_suffix(".sha256").unlink()
    launch = Launch(lab.pretrain(run), run.parent / "log").start()
    launch.finish()
    if newest.name not in launch.said() and newest.stem not in launch.said():
        raise Broken(f"nothing is said of {newest.name}: {launch.statuses} {launch.last()}")


def store_flipped(lab: Lab, rng: random.Random) -> None:
    """A flipped byte in the store of the teacher's outputs is noticed, never learnt from."""
    run = lab.fresh() / "run"
    store = run.parent / "store"
    more = ("--data.crops=fixed", "--teacher.cache=true", f"--teacher.cache_folder={store}")
    words = lab.pretrain(run, *more)
    if any(Launch(words, run.parent / "log").start().finish()):
        raise Broken(f"undisturbed: {(run.parent / 'log').read_text()[-300:]}")
    files = [p for p in store.rglob("*") if p.is_file() and p.stat().st_size > 5000]
    if not files:
        raise Broken("the store holds no large file")
    path = rng.choice(files)
    content = bytearray(path.read_bytes())
    for place in rng.sample(range(len(content)), 50):
        content[place] ^= 0x55
    path.write_bytes(content)
    again = run.parent / "again"
    launch = Launch(lab.pretrain(again, *more), run.parent / "again.log").start()
    (status,) = launch.finish()
    if status == 0 and (rows_same(run, again) or "store" in launch.said() or "damaged" in launch.said()):
        return
    if status != 2:
        raise Broken(f"{path.name} flipped: status {status}, another loss curve, no word: {launch.last()}")


def rows_same(one: Path, two: Path) -> bool:
    """Whether two runs have the same loss curve."""
    return [r["loss"] for r in rows_of(one)] == [r["loss"] for r in rows_of(two)]


def huge_upload(lab: Lab, _: random.Random) -> None:
    """A picture dropped on the app whose header says 60000 x 60000: one line in the page, no traceback."""
    picture = lab.fresh() / "huge.png"
    picture.write_bytes(bombs()["png, 60000 x 60000"])
    port = free_port()
    launch = Launch(["app", f"--port={port}"], picture.with_name("log"), real=True).start()
    try:
        if ask(port, f"127.0.0.1:{port}", launch) != 200:
            if "pip install" in launch.said():  # the extra is not installed
                raise NotHere(launch.last())
            raise Broken(f"app does not start: {launch.last()}")
        told = drop_on_page(f"http://127.0.0.1:{port}", picture)
        if "cannot be shown" not in told or "\n" in told.strip() or "Traceback" in launch.said():
            raise Broken(f"the page says {told[:200]!r}; {launch.last()}")
        if ask(port, f"127.0.0.1:{port}", launch) != 200:
            raise Broken(f"it serves no more: {launch.last()}")
    finally:
        os.killpg(launch.pids[0], signal.SIGKILL)
        launch.finish()


def drop_on_page(address: str, picture: Path) -> str:
    """What the app's page answers to an upload: its error text, "" where there is none."""

    def post(path: str, body: bytes, kind: str) -> Any:
        request = urllib.request.Request(f"{address}/gradio_api/{path}", body, {"Content-Type": kind})
        return json.load(urllib.request.urlopen(request, timeout=60))

    with urllib.request.urlopen(f"{address}/config", timeout=60) as answer:
        config = json.load(answer)
    names = {part["id"]: part["props"].get("elem_id") for part in config["components"]}
    (box,) = (number for number, name in names.items() if name == "upload")
    call = next(c for c in config["dependencies"] if [box, "change"] in [list(t) for t in c["targets"]])
    values = {part["id"]: part["props"].get("value") for part in config["components"]}
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="huge.png"\r\n'
    body = head + b"Content-Type: image/png\r\n\r\n" + picture.read_bytes() + b"\r\n--x--\r\n"
    (path,) = post("upload", body, "multipart/form-data; boundary=x")
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    data = [file if number == box else values[number] for number in call["inputs"]]
    asked = {"data": data, "fn_index": call["id"], "session_hash": "faults", "trigger_id": box}
    post("queue/join", json.dumps(asked).encode(), "application/json")
    with urllib.request.urlopen(f"{address}/gradio_api/queue/data?session_hash=faults", timeout=60) as lines:
        for line in lines:
            event = json.loads(line[5:]) if line.startswith(b"data:") else {}
            if event.get("msg") == "process_completed":
                return str(event["output"].get("error") or "")
    return ""


def ask(port: int, host: str, launch: Launch) -> int | None:
    """Status of GET / with this Host; None where nobody answers within a minute."""
    import http.client

    for _ in range(120):
        with contextlib.suppress(OSError):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            connection.request("GET", "/", headers={"Host": host})
            return connection.getresponse().status
        if not launch.running():
            return None
        time.sleep(0.5)
    return None


# --- checkpoints and disks ---------------------------------------------------------------------------------


def full_disk(lab: Lab, rng: random.Random) -> None:
    """No room (a small tmpfs, else a limit on the size of files): one line, exit 2; with room the same end."""
    whole = lab.finished("pretrain", lab.pretrain)
    folder = lab.fresh()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m,mode=1777", "tmpfs", str(folder)], capture_output=True, check=False
    ).returncode == 0  # fmt: skip
    try:
        run = folder / "run"
        if rng.random() < 0.5:  # a run that is under way
            launch = Launch(lab.pretrain(run), folder / "first.log").start()
            launch.until(lambda: len(steps_done(run)) >= 3)
            launch.kill()
            launch.finish()
        room = rng.randrange(1 << 20)

        def fill() -> None:
            if mounted:
                (folder / "filler").write_bytes(b"x" * max(0, shutil.disk_usage(folder).free - room))
            else:
                limit = rng.randrange(250_000)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        ended = judged(lab.pretrain(run), lab.folder, 60, prepare=fill)
        if fault := ended.fault():
            raise Broken(f"{room // 1024} KiB of room: {fault}")
        whole_so_far(run) if run.exists() else None
        (folder / "filler").unlink(missing_ok=True)
        lab.ends_as(whole, lab.pretrain(run))
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


# --- the table ------------------------------------------------------------------------------------------

ROWS = [
    *[
        Row(f"checkpoints deleted: {t}", "refused, nothing lost", partial(checkpoints_deleted, t), 2)
        for t in ("pretrain", "finetune")
    ],
    Row("checkpoint without checksum", "named in a warning before an older one is used", sidecar_gone),
    Row("teacher's store damaged", "noticed, never learnt from", store_flipped, 3),
    Row("a huge header dropped on app", "one line in the page, no traceback, it goes on serving", huge_upload),
    Row("full disk", f"one line, exit 2; with room {EXACT}", full_disk, 6),
]  # fmt: skip
