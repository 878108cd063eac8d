"""Fuzz of settings, words, recipes, results and run directories: every failure is exit 2 with one line.

Cases are drawn by hypothesis. Those that cannot reach any work (their data or backbone is not there) run in this
process, the others in forks with a limit on memory and time.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import yaml
from hypothesis import strategies as st

from benchmarks.faults.calling import Outcome, call, call_forked, fault_in, in_fork, inside
from benchmarks.faults.campaign import Options, Verdict
from benchmarks.faults.tiny import prepare
from cmt_mae.core.cli import COMMANDS, EVALUATIONS, load
from cmt_mae.core.settings import walk
from cmt_mae.evaluate.result import Result

PROMISE = "every failure is exit 2 with one line, never a traceback"
SIZES = {  # cases of each kind: full, quick
    "settings": (1500, 20),
    "words": (800, 12),
    "recipes": (500, 10),
    "results": (500, 10),
    "runs": (250, 3),
    "work": (300, 3),
}
PLACES = {
    "out", "data", "data.path", "data_root", "backbone", "cache", "runs", "init_from", "run", "images", "results",
    "backbones", "teachers", "teacher.cache_folder", "experiment", "host", "open",
}  # fmt: skip
"""Settings that say where to read, write and listen: they are not drawn, so that a case stays in its folder."""
NAMES = {  # of each command: words that end it before any work
    "pretrain": ["--out", "o", "--data", "nowhere"],
    "pack": ["--out", "o", "--data", "nowhere"],
    "export": ["--out", "o", "--backbone", "nowhere.pth"],
    "demo": ["--out", "o", "--data", "nowhere"],
    "compare": ["nowhere"],
    "bench": ["--data", "nowhere", "--teacher", "nowhere.pth"],
    "ablate": ["--out", "o", "--experiment", "masks", "--data", "nowhere"],
    "app": ["nowhere"],
    "doctor": ["nowhere"],
    "explain": ["--run", "nowhere", "--images", "nowhere"],
    "report": ["nowhere"],
    "watch": ["nowhere"],
    "knn": ["--backbone", "nowhere.pth", "--data", "nowhere"],
    "all": ["--backbone", "nowhere.pth", "--data_root", "nowhere", "--out", "o"],
}


@dataclass
class Tally:
    """Counts of one campaign."""

    failures: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)

    def note(self, kind: str, case: object, outcome: Outcome, alone: bool = False) -> None:
        """Count a case, and keep what was broken."""
        self.kinds[kind] += 1
        self.statuses[f"{kind}: status {outcome.status}"] += 1
        fault = fault_in(outcome, alone)
        if fault is not None:
            self.failures.append(f"{kind} {ascii(case)[-700:]}: {fault}: {ascii(outcome.line())[:300]}")


def campaign(options: Options) -> Verdict:
    """All kinds, one after another."""
    tally = Tally()
    files = Files(options.folder)
    in_fork(files.write)
    for name, (full, quick) in SIZES.items():
        count = quick if options.quick else full
        with inside(options.folder / name):
            run_cases(globals()[f"case_of_{name}"](files, tally), count, options.seed)
    return Verdict(
        PROMISE,
        trials=sum(tally.kinds.values()),
        failures=tally.failures,
        figures={**tally.kinds, **dict(sorted(tally.statuses.items()))},
    )


def run_cases(case: Callable[[st.DataObject], None], count: int, seed: int) -> None:
    """Draw and run ``count`` cases; hypothesis never sees a failure, so nothing is shrunk or repeated."""
    every = list(hypothesis.HealthCheck)
    settings = hypothesis.settings(
        max_examples=count, deadline=None, database=None, suppress_health_check=every,
        phases=[hypothesis.Phase.generate],
    )  # fmt: skip
    hypothesis.seed(seed)(settings(hypothesis.given(st.data())(case)))()


# --- what is drawn -------------------------------------------------------------------------------

TEXT = st.text(max_size=12).filter(lambda t: "\0" not in t)
ODD = st.sampled_from(
    ["", " ", "nan", ".nan", "inf", "-.inf", "1e999", "-1", "0", "0.0", "1e-320", "9" * 30, "-" + "9" * 5000,
     "true", "null", "~", "none", "[]", "{}", "[[[[", "{a: {b: {c: [1]}}}", "&a [*a]", "*a", "!!python/none",
     "!!python/object/apply:os.system [exit]", "!!binary aGk=", "!!set {a, b}", "2020-01-01", "2020-99-99",
     "0x1F", "0o17", "1_000", "12:30:45", "ÿ", "\u202e", "\ud800", "\x1b[31m", "a\nb", "<script>", "|", "'", '"',
     "%s", "{0}", "$HOME", "~root", "../..", "-", "--", "=", "a=b", "[1,2", "1,2", "[1, two]", "[nan]", "[1e999]",
     '{"class_path": "os.system", "init_args": {"command": "exit"}}', "1.5", "7", "[16, 16]", "[0.5, 0.1]"]
)  # fmt: skip
NUMBER = st.one_of(st.integers(), st.integers(-3, 300), st.floats(), st.floats(-2, 2)).map(str)
WHOLE = st.one_of(st.integers(-2, 40), st.integers(-2, 40), st.integers()).map(str)
FRACTION = st.one_of(st.floats(-0.5, 1.5), st.floats(-0.5, 1.5), st.floats()).map(str)
SCALAR = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT)
TREE = st.recursive(SCALAR, lambda c: st.lists(c, max_size=3) | st.dictionaries(TEXT, c, max_size=3), max_leaves=8)
WORD = st.sampled_from(
    ["cpu", "auto", "mean", "cls", "random", "none", "momentum", "embedded", "teacher", "quick"]
)
VALUE = st.one_of(ODD, NUMBER, TEXT, TREE.map(lambda t: json.dumps(t)))


def listed(values: list[str]) -> str:
    """A list as a word of the command line."""
    return f"[{', '.join(values)}]"


def mangled(name: str, how: int) -> str:
    """A name with a typing error."""
    return [name + "x", name[:-1], name.upper(), name + ".deeper", "." + name, name + "+", name[1:]][how % 7]


def settings_of(command: str) -> dict[str, Any]:
    """Type of all settings of a command, sections included, but for places."""
    settings, _ = load({**COMMANDS, **EVALUATIONS}[command])
    found = sorted((name, kind) for name, kind, _ in walk(settings))
    return {name: kind for name, kind in found if name not in PLACES}


TYPES = {name: settings_of(name) for name in (*COMMANDS, *EVALUATIONS)}
COMMAND_NAMES = {name: list(types) for name, types in TYPES.items() if types}


def start_of(command: str) -> list[str]:
    """The words of a command that has nothing to work on."""
    if command in COMMANDS:
        return [command, *NAMES[command]]
    return ["evaluate", command, *NAMES.get(command, NAMES["knn"])]


# --- kinds of cases ------------------------------------------------------------------------------


def case_of_settings(_: "Files", tally: Tally) -> Callable[[st.DataObject], None]:
    """Any value for any setting of any command."""

    def case(data: st.DataObject) -> None:
        command = data.draw(st.sampled_from(sorted(COMMAND_NAMES)))
        words = start_of(command)
        for _ in range(data.draw(st.integers(1, 3))):
            name = data.draw(st.sampled_from(COMMAND_NAMES[command]))
            if data.draw(st.integers(0, 9)) == 0:
                name = mangled(name, data.draw(st.integers(0, 6)))
            value = data.draw(VALUE)
            words += [f"--{name}={value}"] if data.draw(st.booleans()) else [f"--{name}", value]
        tally.note("settings", words, call(words), alone=command != "compare")

    return case


def case_of_words(_: "Files", tally: Tally) -> Callable[[st.DataObject], None]:
    """Words in any order, with and without a command."""

    def case(data: st.DataObject) -> None:
        command = data.draw(st.sampled_from([*sorted(COMMAND_NAMES), "", "recipes", "evaluate", "nope"]))
        words = start_of(command) if command in COMMAND_NAMES else [w for w in (command,) if w]
        known = COMMAND_NAMES.get(command, ["x"])
        option = st.sampled_from(known).map(lambda n: f"--{n}")
        flags = st.sampled_from(["--json", "--recipe", "--paper", "--help", "-h", "-x", "--", "---", "--=", "-"])
        word = st.one_of(option, flags, ODD, TEXT, st.binary(max_size=4).map(lambda b: b.decode("latin1")))
        more = data.draw(st.lists(word.filter(lambda w: "\0" not in w), min_size=1, max_size=5))
        at = data.draw(st.integers(0, len(words)))
        words = [*words[:at], *more, *words[at:]] if at else [*words, *more]
        tally.note("words", words, call(words))

    return case


def case_of_recipes(_: "Files", tally: Tally) -> Callable[[st.DataObject], None]:
    """YAML of any shape, text and bytes that are no YAML."""

    def case(data: st.DataObject) -> None:
        command = data.draw(st.sampled_from(["pretrain", "bench"]))
        known = st.sampled_from(COMMAND_NAMES["pretrain"])
        sections = st.dictionaries(known | TEXT, TREE, max_size=3)
        nested = st.dictionaries(known.map(lambda n: n.split(".")[0]) | TEXT, sections | TREE, max_size=3)
        dumped = nested.map(lambda t: yaml.safe_dump(t, allow_unicode=True).encode("utf-8", "replace"))
        raw = st.one_of(
            ODD.map(lambda t: t.encode("utf-8", "replace")), st.binary(max_size=40),
            known.flatmap(lambda n: VALUE.map(lambda v: f"{n}: {v}".encode("utf-8", "replace"))),
        )  # fmt: skip
        content = data.draw(dumped | raw)
        Path("r.yaml").write_bytes(content)
        recipe = data.draw(st.sampled_from(["r.yaml", "mae,r.yaml", "r.yaml,micro64"]))
        words = [*start_of(command), "--recipe", recipe]
        tally.note("recipes", [*words, content], call(words), alone=True)

    return case


def case_of_results(files: "Files", tally: Tally) -> Callable[[st.DataObject], None]:
    """Result files with parts exchanged, and with broken bytes."""
    whole = files.result().to_json()

    def case(data: st.DataObject) -> None:
        shutil.rmtree("r", ignore_errors=True)
        Path("r/results").mkdir(parents=True)
        path = Path("r/results/knn-x.json")
        path.write_bytes(data.draw(changed_json(whole)))
        form = data.draw(st.sampled_from(["table", "markdown", "json"]))
        target = data.draw(st.sampled_from([str(path), "r", "."]))
        outcome = call(["compare", target, "--format", form, *data.draw(st.sampled_from([[], ["--paper"]]))])
        tally.note("results", [target, form, path.read_bytes()], outcome)

    return case


def case_of_runs(files: "Files", tally: Tally) -> Callable[[st.DataObject], None]:
    """Run directories with a damaged config.yaml, run.json or metrics.jsonl: continued, evaluated, compared."""

    def case(data: st.DataObject) -> None:
        shutil.rmtree("run", ignore_errors=True)
        shutil.copytree(files.run, "run")
        name = data.draw(st.sampled_from(["config.yaml", "run.json", "metrics.jsonl"]))
        path = Path("run", name)
        if name == "config.yaml":
            text = json.dumps(yaml.safe_load(path.read_text()))  # JSON is YAML
        else:
            text = path.read_text()
        if name == "metrics.jsonl":
            rows = text.splitlines()
            at = data.draw(st.integers(0, len(rows) - 1))
            changed = data.draw(changed_json(rows[at]))
            parts = [row.encode() for row in rows]
            content = b"\n".join([*parts[:at], changed, *parts[at + 1 :], b""])
        else:
            content = data.draw(changed_json(text))
        path.write_bytes(content)
        knn = ["evaluate", "knn", "--backbone", "run", "--data", str(files.images), "--device", "cpu"]
        choice = data.draw(st.integers(0, 3))
        words = [[*knn, "--workers", "0"], ["compare", "run"]][choice % 2] if choice > 1 else files.words("run")
        tally.note("runs", [words[0], name, content[:300]], call_forked(words, Path()))

    return case


def case_of_work(files: "Files", tally: Tally) -> Callable[[st.DataObject], None]:
    """Commands that have all they need, with one or two settings of any value."""
    started = {
        "pretrain": files.words("o"),
        "bench": ["bench", *files.words("o")[1:], "--data.path=", "--steps=1", "--rounds=1", "--images=8"],
        "export": ["export", "--backbone", str(files.run), "--out", "o/x.safetensors"],
        "pack": ["pack", "--data", str(files.images), "--out", "o", "--size", "16", "--workers", "0"],
    }
    tasks = {"knn": [], "linear": [], "finetune": ["--epochs=1", "--batch_size=8"]}
    for task, more in tasks.items():
        base = ["--backbone", str(files.run), "--data", str(files.images), "--out", "o", "--device", "cpu"]
        started[task] = ["evaluate", task, *base, "--workers", "0", *more]

    def case(data: st.DataObject) -> None:
        shutil.rmtree("o", ignore_errors=True)
        command = data.draw(st.sampled_from(sorted(started)))
        words = list(started[command])
        for _ in range(data.draw(st.integers(1, 2))):
            name = data.draw(st.sampled_from(COMMAND_NAMES[command]))
            kind = str(TYPES[command][name])
            right = WORD if "str" in kind or "Literal" in kind else st.sampled_from(["true", "false"])
            right = WHOLE if "int" in kind else right
            right = FRACTION if "float" in kind else right
            right = st.lists(right, max_size=3).map(listed) if "list" in kind or "tuple" in kind else right
            words.append(f"--{name}={data.draw(ODD if data.draw(st.integers(0, 3)) == 0 else right)}")
        tally.note("work", words, call_forked(words, Path(), limit_s=60))

    return case


def changed_json(text: str) -> st.SearchStrategy[bytes]:
    """A JSON text with one to three of its parts replaced, or with bytes cut, flipped or replaced."""
    tree = json.loads(text)

    @st.composite
    def parts(draw: st.DrawFn) -> bytes:
        content = json.loads(text)
        for _ in range(draw(st.integers(1, 3))):
            holder: Any = content
            while True:
                if not isinstance(holder, dict | list) or not holder:
                    break
                keys = sorted(holder) if isinstance(holder, dict) else list(range(len(holder)))
                key = draw(st.sampled_from(keys))
                if isinstance(holder[key], dict | list) and holder[key] and draw(st.booleans()):
                    holder = holder[key]
                    continue
                if isinstance(holder, dict) and draw(st.integers(0, 3)) == 0:
                    del holder[key]
                else:
                    holder[key] = draw(st.one_of(TREE, ODD, st.just(10**400)))
                break
        return json.dumps(content).encode()

    @st.composite
    def damaged(draw: st.DrawFn) -> bytes:
        raw = bytearray(json.dumps(tree).encode())
        if draw(st.booleans()):
            return bytes(raw[: draw(st.integers(0, len(raw)))])
        for _ in range(draw(st.integers(1, 5))):
            raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
        return bytes(raw)

    deep = st.sampled_from([b"[" * 100_000, b'{"a":' * 50_000, b"", b"null", b"[]", b"{}", b"\xff\xfe", b"NaN"])
    return st.one_of(parts(), parts(), damaged(), deep)


class Files:
    """What the cases read: images, a teacher, a finished run."""

    def __init__(self, folder: Path) -> None:
        self.tiny = prepare(folder / "files")
        self.images, self.run = Path(self.tiny.packed), folder / "files" / "run"

    def write(self) -> None:
        """Make the run; takes about a second."""
        outcome = call(self.words(str(self.run)), limit_s=100)
        if outcome.status != 0:
            raise RuntimeError(outcome.err)
        self.result().save(self.run)

    def words(self, out: str) -> list[str]:
        """A pre-training of two steps."""
        return self.tiny.pretrain(
            self.tiny.packed, Path(out), "--epochs=0.4", "--optim.warmup_epochs=0.1", "--runtime.log_every=1"
        )

    def result(self) -> Result:
        """One with all parts."""
        return Result(
            task="knn",
            metrics={"cls/k20/top1": 50.0, "mean/k20/top1": 40.0},
            protocol={"name": "dino", "headline": "cls/k20/top1", "k": [10, 20], "temperature": 0.07},
            backbone={"name": "runs/a", "architecture": "vit", "digest": "e" * 64, "source": "x",
                      "licence": None, "img_size": [16, 16]},
            data={"path": "d", "fingerprint": "f" * 64, "train": 10, "val": 10},
            seed=0, versions={"python": "3"}, hardware={"device": "cpu"}, seconds=1.0, date="2026-01-01",
            details={"rows": [1, 2]},
        )  # fmt: skip
