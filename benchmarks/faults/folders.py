"""Faults of run folders, of what lies in them, and of disks: nothing lost, nothing mixed (rows 6.1 to 6.9)."""

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

import numpy as np
from PIL import Image

from benchmarks.faults import hooks
from benchmarks.faults.files import bombs
from benchmarks.faults.lab import Broken, Lab, NotHere, Row, rows_of, tree
from benchmarks.faults.launch import Launch, in_fork, judged
from benchmarks.faults.runs import EXACT, Words, whole_so_far
from benchmarks.faults.same import loads, steps_done
from benchmarks.timing import free_port
from cmt_mae.core.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    load_last,
    mark_best,
    rotate,
    save_checkpoint,
)

# --- folders --------------------------------------------------------------------------------------------------


def two_trainings(lab: Lab, rng: random.Random) -> None:
    """Two starts into one folder: one trains, the other is refused with its process; no lock outlives a kill."""
    run = lab.fresh() / "run"
    words = lab.pretrain(run, "--epochs=40", "--data.workers=2")
    launches = [Launch(words, run.parent / f"{n}.log") for n in range(2)]
    for launch in launches:
        launch.start()
        time.sleep(rng.random() * 0.05)
    while all(launch.running() for launch in launches):
        time.sleep(0.005)
    ended = [launch for launch in launches if not launch.running()]
    other = next(launch for launch in launches if launch is not ended[0])
    if len(ended) != 1 or ended[0].finish() != [2] or str(other.pids[0]) not in ended[0].said():
        raise Broken(f"{[e.statuses for e in ended]}: {ended[0].last()}")
    other.until(lambda: len(steps_done(run)) >= 2)
    other.kill()
    other.finish()
    after = Launch(words, run.parent / "after.log").start()
    if not after.until(lambda: "continuing" in after.said() or len(steps_done(run)) > 4):
        raise Broken(f"a lock outlives the kill: {after.finish()} {after.last()}")
    after.kill()
    after.finish()


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
    """6.1: a finished training whose checkpoints were deleted is not trained anew by the same command."""
    words_in: Words = lab.finetune if training == "finetune" else lab.pretrain
    run = lab.fresh() / "run"
    shutil.copytree(lab.finished(f"{training} whole", words_in), run)
    for folder in [p for p in run.rglob("checkpoints") if p.is_dir()]:
        shutil.rmtree(folder)
    more = ["--seed=7"] if rng.random() < 0.5 else []
    unharmed(lab, run, [*words_in(run), *more])


def other_teacher(lab: Lab, _: random.Random) -> None:
    """6.2: another teacher at the same path on resume is refused by its digest."""
    run = lab.copy_of_finished()
    teacher = run.parent / "teacher.safetensors"
    shutil.copy(lab.files / "teacher.safetensors", teacher)
    words = lab.pretrain(run.parent / "mine", "--epochs=40", f"--teacher.name={teacher}")
    launch = Launch(words, run.parent / "log").start()
    launch.until(lambda: loads(run.parent / "mine") >= 2)
    launch.kill()
    launch.finish()
    shutil.copy(lab.files / "other_teacher.safetensors", teacher)
    unharmed(lab, run.parent / "mine", words, "teacher")


def images_replaced(lab: Lab, _: random.Random) -> None:
    """6.4: images replaced by others of the same size and name are noticed on resume."""
    folder = lab.fresh()
    data = folder / "data"
    data.mkdir()
    rng = np.random.default_rng(0)

    def write() -> None:
        for number in range(40):
            Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(data / f"{number}.bmp")

    write()
    words = lab.pretrain(folder / "run", "--epochs=40", data=str(data))
    launch = Launch(words, folder / "log").start()
    launch.until(lambda: loads(folder / "run") >= 2)
    launch.kill()
    launch.finish()
    write()
    unharmed(lab, folder / "run", words, "data")


def two_packs(lab: Lab, rng: random.Random) -> None:
    """6.3: two packs of different data at once into one folder: one whole pack, an honest word to the other."""
    folder = lab.fresh()
    for name, shade in (("a", 0), ("b", 200)):
        for number in range(60):
            place = folder / name / f"{name}{number % 2}"
            place.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (300, 300), (shade, number, 40)).save(place / f"{name}{number}.png")
    launches = []
    for name in "ab":
        words = ["pack", f"--data={folder / name}", f"--out={folder / 'out'}", "--size=16", "--workers=0"]
        launches.append(Launch(words, folder / f"{name}.log").start())
        time.sleep(rng.choice((0.0, 0.05, 0.3)))
    statuses = [launch.finish()[0] for launch in launches]
    if sorted(statuses) not in ([0, 2], [0, 0]) or (statuses == [0, 0] and len(set(map(str, statuses))) != 1):
        raise Broken(f"statuses {statuses}: {[launch.last() for launch in launches]}")
    root = next(p.parent for p in (folder / "out").rglob("images.npy"))
    names = json.loads((root / "meta.json").read_text())["names"]
    images = np.load(root / "images.npy")
    wrong = [n for n, image in zip(names, images, strict=True) if (image[0, 0, 0] > 100) != ("b" in Path(n).name)]
    if wrong or len(names) != len(images):
        raise Broken(f"{len(wrong)} of {len(names)} images have the other pack's names")
    told = [launch.said() for launch, status in zip(launches, statuses, strict=True) if status == 2]
    if told and ("Traceback" in told[0] or told[0].count("cmt-mae: ") != 1):
        raise Broken(f"the second is told: {told[0][-300:]}")


def sidecar_gone(lab: Lab, _: random.Random) -> None:
    """6.7: the newest checkpoint without its .sha256 is named in a warning before older ones are used."""
    run = lab.copy_of_finished()
    newest = list_checkpoints(run / "checkpoints")[-1]
    newest.with_suffix(".sha256").unlink()
    launch = Launch(lab.pretrain(run), run.parent / "log").start()
    launch.finish()
    if newest.name not in launch.said() and newest.stem not in launch.said():
        raise Broken(f"nothing is said of {newest.name}: {launch.statuses} {launch.last()}")


def foreign_checkpoint(lab: Lab, _: random.Random) -> None:
    """6.7: a checkpoint of another run, with its right checksum, is not continued in this one."""
    run = lab.copy_of_finished()
    other = lab.finished("seed 9", lambda out: lab.pretrain(out, "--seed=9"))
    for path in (run / "checkpoints").iterdir():
        path.unlink()
    for path in (other / "checkpoints").iterdir():
        shutil.copy(path, run / "checkpoints" / path.name)
    lab.refused(lab.pretrain(run), "checkpoint")


def store_flipped(lab: Lab, rng: random.Random) -> None:
    """6.7: a flipped byte in the store of the teacher's outputs is noticed, never learnt from."""
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


def links_out(lab: Lab, _: random.Random) -> None:
    """6.8: ``pictures -> /`` in a run: report never walks out of it."""
    run = lab.copy_of_finished()
    shutil.rmtree(run / "pictures", ignore_errors=True)
    (run / "pictures").symlink_to("/")
    ended = judged(["report", str(run)], lab.folder, 60)
    if ended.status not in (0, 2) or ended.fault():
        raise Broken(f"report: {ended.fault() or ended.status} after {ended.seconds:.0f} s")
    page = next(iter(run.rglob("*.html")), None)
    if page is not None and "root:" in page.read_text(errors="replace"):
        raise Broken("the page shows files outside of the run")


def fifo_recipe(lab: Lab, _: random.Random) -> None:
    """6.8: a pipe that nobody writes, as recipe, plan or results: one line at once."""
    folder = lab.fresh()
    os.mkfifo(folder / "r.yaml")
    os.mkfifo(folder / "r.json")
    for words in (
        [*lab.pretrain(folder / "o"), f"--recipe={folder / 'r.yaml'}"],
        ["ablate", str(folder / "r.yaml"), f"--out={folder / 'p'}", f"--data={lab.packed}"],
        ["compare", str(folder / "r.json")],
    ):
        lab.refused(words, limit_s=15)


def strange_host(lab: Lab, _: random.Random) -> None:
    """6.9: watch and app answer no request that names another host (DNS rebinding)."""
    run = lab.finished("pretrain", lab.pretrain)
    for words in (["watch", str(run), "--open=false"], ["app", str(run)]):
        port = free_port()
        log = lab.fresh() / "log"
        launch = Launch([*words, f"--port={port}"], log, real=True).start()
        try:
            answer = ask(port, "evil.example", launch)
            if answer is None:
                if "pip install" in launch.said():  # the extra is not installed
                    raise NotHere(launch.last())
                raise Broken(f"{words[0]} does not start: {launch.last()}")
            if answer < 400 or ask(port, f"127.0.0.1:{port}", launch) != 200:
                raise Broken(f"{words[0]} answers host evil.example with {answer}")
        finally:
            os.killpg(launch.pids[0], signal.SIGKILL)
            launch.finish()


def huge_upload(lab: Lab, _: random.Random) -> None:
    """6.9: a picture dropped on the app whose header says 60000 x 60000: one line in the page, no traceback."""
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


def torn_files(lab: Lab, rng: random.Random) -> None:
    """A checkpoint cut at any length or with a bit flipped (its checksum file too): the one before is loaded."""
    import torch

    folder = lab.fresh()

    def small(step: int) -> dict[str, Any]:
        return {"step": step, "w": torch.full((3,), float(step))}

    save_checkpoint(folder, 1, small(1))
    newest = save_checkpoint(folder, 2, small(2))
    for path in (newest, newest.with_suffix(".sha256")):
        content = path.read_bytes()
        for at in range(0, len(content), lab.count(1, 40)):
            hurt = bytearray(content)
            hurt[at] ^= 1 << rng.randrange(8)
            for bad in (bytes(hurt), content[:at]):
                path.write_bytes(bad)
                with open(os.devnull, "w") as null, contextlib.redirect_stderr(null):
                    state = load_last(folder)
                if state is None or state["step"] != 1:
                    raise Broken(f"{path.name}, byte {at}: loaded step {state and state['step']}")
        path.write_bytes(content)
    state = load_last(folder)
    if state is None or state["step"] != 2:
        raise Broken("whole again, it is not loaded")


def killed_writes(lab: Lab, _: random.Random) -> None:
    """SIGKILL at every file operation and byte of saving, marking the best, rotating: what is seen is whole."""
    import torch

    folder = lab.fresh() / "kept"

    def small(step: int) -> dict[str, Any]:
        return {"step": step, "w": torch.full((3,), float(step))}

    def work(_: int) -> None:
        save_checkpoint(folder, 2, small(2))
        save_checkpoint(folder, 2, {**small(2), "evaluated": True})
        mark_best(folder / "step_00000002.pt")
        rotate(folder, 1, lambda _: False)
        os._exit(0)

    def once(fault: hooks.KillAt | None) -> Launch:
        shutil.rmtree(folder, ignore_errors=True)
        save_checkpoint(folder, 1, small(1))
        mark_best(folder / "step_00000001.pt")
        launch = Launch([f"--out={folder}"], folder.parent / "log", kill_at=fault, prepare=work)
        launch.start().finish()
        return launch

    totals = once(None).counters.read()
    for kind, every in (("file", lab.count(1, 30)), ("byte", lab.count(16, 500))):
        for at in range(0, totals[kind], every):
            if once(hooks.KillAt(kind, at)).statuses != [-signal.SIGKILL]:
                raise Broken(f"{kind} {at}: not killed")
            for path in [*list_checkpoints(folder), folder / "best.pt"]:
                load_checkpoint(path)
            if not list_checkpoints(folder):
                raise Broken(f"killed at {kind} {at}: no checkpoint left")


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


def not_permitted(lab: Lab, _: random.Random) -> None:
    """A folder that may not be written, and metrics that cannot grow: one line, exit 2; then the same end."""
    if os.getuid() != 0:
        raise NotHere("giving files to another user needs root")
    whole = lab.finished("pretrain", lab.pretrain)
    folder = lab.fresh()
    run = folder / "run"

    def nobody() -> None:
        os.setgid(65534)
        os.setuid(65534)

    run.mkdir()
    ended = judged(lab.pretrain(run), lab.folder, 60, prepare=nobody)
    if ended.status != 2 or ended.fault() or "Permission denied" not in ended.line():
        raise Broken(f"read-only folder: {ended.fault() or ended.line()}")
    launch = Launch(lab.pretrain(run), folder / "log", prepare=lambda _: hooks.slow_steps(0.1)).start()
    launch.until(lambda: loads(run) >= 2)
    metrics, kept = run / "metrics.jsonl", (run / "metrics.jsonl").read_bytes()
    metrics.unlink()
    metrics.mkdir()
    if launch.finish() != [2] or "metrics.jsonl" not in launch.last():
        raise Broken(f"metrics in the way: {launch.statuses} {launch.last()}")
    metrics.rmdir()
    metrics.write_bytes(kept)
    lab.ends_as(whole, lab.pretrain(run))


def payload_in_checkpoint(lab: Lab, _: random.Random) -> None:
    """The newest checkpoint exchanged for a pickle with code and a right checksum: refused, never run."""
    import torch

    from benchmarks.faults.files import Payload
    from cmt_mae.core.files import sha256

    run = lab.copy_of_finished()
    marker = run.parent / "payload_was_here"
    last = list_checkpoints(run / "checkpoints")[-1]
    content = {"step": 4, "payload": Payload(os.system, f"touch {marker}")}
    in_fork(lambda: torch.save(content, last), run.parent / "log")
    last.with_suffix(".sha256").write_text(sha256(last))
    lab.refused(lab.pretrain(run), last.name)
    if marker.exists():
        raise Broken("the payload ran")


# --- the table ------------------------------------------------------------------------------------------

ROWS = [
    Row("two trainings into one folder", "one trains, the other is told by whom; no lock outlives a kill",
        two_trainings, 4),
    *[
        Row(f"6.1 checkpoints deleted: {t}", "refused, nothing lost", partial(checkpoints_deleted, t), 2)
        for t in ("pretrain", "finetune")
    ],
    Row("6.2 another teacher at the same path", "refused by its digest, nothing changed", other_teacher),
    Row("6.3 two packs into one folder", "one whole pack, an honest message to the second", two_packs, 4),
    Row("6.4 images replaced, same size", "refused on resume, nothing changed", images_replaced),
    Row("6.7 checkpoint without checksum", "named in a warning before an older one is used", sidecar_gone),
    Row("6.7 checkpoint of another run", "refused", foreign_checkpoint),
    Row("6.7 teacher's store damaged", "noticed, never learnt from", store_flipped, 3),
    Row("6.8 links out of a run", "report stays inside", links_out),
    Row("6.8 a pipe as recipe, plan, result", "one line at once", fifo_recipe),
    Row("6.9 another Host header", "watch and app refuse it", strange_host),
    Row("6.9 a huge header dropped on app", "one line in the page, no traceback, it goes on serving", huge_upload),
    Row("torn and flipped checkpoints", "noticed at every byte; the one before is loaded", torn_files),
    Row("kills inside a checkpoint's writing", "complete or invisible", killed_writes),
    Row("full disk", f"one line, exit 2; with room {EXACT}", full_disk, 6),
    Row("no permission, metrics in the way", f"one line, exit 2; then {EXACT}", not_permitted),
    Row("code in a checkpoint", "refused, never run", payload_in_checkpoint),
]  # fmt: skip
