"""The command line: wiring only. Options, types and help come from the settings dataclasses."""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass
from importlib import import_module
from typing import Any

from cmt_mae.core.errors import InputError, LostProcess, Stopped
from cmt_mae.core.parsing import expand, parse, take, take_flag, with_lists, with_positional
from cmt_mae.core.recipes import head_comment, load_recipes, recipe_names, recipe_text
from cmt_mae.core.streams import lasting_streams
from cmt_mae.core.text import hint, one_line, printable

# read by torch at its import: its own warnings, such as DDP's of a flag that we set on purpose, are not for users
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


@dataclass(frozen=True)
class Command:
    """Where a command's settings and function are, imported only when asked for, and what its help shows."""

    module: str
    settings: str
    function: str
    form: str
    """How it is called, after its name."""
    first: tuple[str, ...] = ()
    """Options of --help, the rest being under --help-all; none: all."""


PRETRAIN_FIRST = (
    "recipe", "data", "teacher", "out", "epochs", "batch_size", "student.preset", "student.img_size", "mask.rule",
    "alpha", "probe_data", "init_from", "device", "seed",
)  # fmt: skip
TRAIN_FIRST = (
    "backbone", "data", "out", "preset", "epochs", "iterations", "batch_size", "blr", "lr", "size", "crop_size",
    "few_shot", "classes", "key", "seed", "device", "micro_batch", "json",
)  # fmt: skip
COMMANDS = {
    "pretrain": Command(
        "cmt_mae.tools.pretrain", "PretrainConfig", "pretrain",
        "--recipe METHOD,SCALE --data PATH --out PATH", PRETRAIN_FIRST,
    ),
    "pack": Command("cmt_mae.data.pack", "PackConfig", "pack", "--data PATH --out PATH"),
    "export": Command("cmt_mae.backbones.export", "ExportConfig", "export", "--backbone NAME --out PATH"),
    "embed": Command(
        "cmt_mae.tools.embed", "EmbedConfig", "embed_images", "--backbone NAME --images DIR --out FILE.npz"
    ),
    "demo": Command("cmt_mae.tools.demo", "DemoConfig", "demo", "[--data PATH]"),
    "compare": Command("cmt_mae.tools.report.compare", "CompareConfig", "compare", "RUN ..."),
    "report": Command(
        "cmt_mae.tools.report.page.command", "ReportConfig", "make_report", "RUN ..."
    ),
    "watch": Command("cmt_mae.tools.report.page.serve", "WatchConfig", "watch", "RUN"),
    "bench": Command(
        "cmt_mae.tools.bench.command", "BenchConfig", "bench", "--recipe METHOD,SCALE",
        ("recipe", "data", "teacher", "out", "images", "rounds", "steps", "stages", "peak", "device", "json"),
    ),
    "explain": Command(
        "cmt_mae.tools.inspect.command", "ExplainConfig", "explain", "--run RUN --images PATH ...",
        ("run", "backbone", "images", "what", "out", "count", "checkpoints", "size", "teacher", "rule", "alpha",
         "data", "formats", "json"),
    ),
    "ablate": Command("cmt_mae.tools.ablate", "AblateConfig", "ablate", "EXPERIMENT"),
    "doctor": Command(
        "cmt_mae.tools.diagnose.command", "DoctorConfig", "doctor", "[RUN] [--recipe METHOD,SCALE --data PATH]",
        ("recipe", "data", "teacher", "run", "sample", "images", "machine", "estimate", "seconds", "device",
         "json"),
    ),
    "app": Command("cmt_mae.tools.app", "AppConfig", "app", "[RUN ...]"),
}  # fmt: skip
NEEDED = "--backbone NAME --data PATH"
EVALUATIONS = {
    "knn": Command(
        "cmt_mae.evaluate.knn", "KnnConfig", "evaluate_knn", NEEDED,
        ("backbone", "data", "out", "k", "temperature", "pools", "size", "key", "val_share", "device",
         "batch_size", "cache", "json"),
    ),
    "linear": Command(
        "cmt_mae.evaluate.linear", "LinearConfig", "evaluate_linear", NEEDED,
        ("backbone", "data", "out", "protocol", "pools", "epochs", "blr", "augment", "size", "key", "val_share",
         "device", "cache", "json"),
    ),
    "finetune": Command(
        "cmt_mae.evaluate.finetune", "FinetuneConfig", "evaluate_finetune", NEEDED, TRAIN_FIRST
    ),
    "coco": Command("cmt_mae.evaluate.detection", "CocoConfig", "evaluate_coco", NEEDED, TRAIN_FIRST),
    "ade20k": Command(
        "cmt_mae.evaluate.segmentation", "Ade20kConfig", "evaluate_ade20k", NEEDED, TRAIN_FIRST
    ),
    "davis": Command(
        "cmt_mae.evaluate.video.evaluate", "DavisConfig", "evaluate_davis", NEEDED,
        ("backbone", "data", "out", "protocol", "sequences", "key", "size", "topk", "pictures", "compare",
         "device", "json"),
    ),
    "all": Command(
        "cmt_mae.evaluate.everything", "EvaluateAllConfig", "evaluate_all",
        "--backbone NAME --data-root PATH",
        ("backbone", "data_root", "out", "tasks", "preset", "key", "device", "json"),
    ),
}  # fmt: skip
RECIPE_COMMANDS = ("pretrain", "bench", "doctor")
# short names of the most used settings of `pretrain`
SHORT = {
    "data": "data.path",
    "teacher": "teacher.name",
    "device": "runtime.device",
    "workers": "data.workers",
    "probe_data": "runtime.probe_data",
    "val_share": "data.val_share",
    "deterministic": "runtime.deterministic",
    "extend": "runtime.extend",
    "yes": "runtime.yes",
}
USAGE = """usage: cmt-mae COMMAND [options]      (cmt-mae COMMAND --help shows them)

  pretrain         pre-train a backbone: --recipe R --data D --out O; the same command again continues
  evaluate TASK    knn | linear | finetune | coco | ade20k | davis: --backbone B --data D [--out O] [--json]
  evaluate all     every task that the data below a folder allow: --backbone B --data-root ROOT
  compare RUN ...  one table of the results of runs [--paper] [--format markdown | json]
  explain          pictures of attention, masks, features, predictions, curves: --run R --images DIR
  report RUN ...   one HTML page of a run, or of several side by side [--out FILE]
  watch RUN        the same page live, on this machine only [--port N] [--open]
  export           write a backbone as timm, hf or torch
  embed            features of all images of a folder: --backbone B --images DIR --out F.npz | .parquet | .csv
  pack             pack images into a memory-mapped array for fast epochs
  bench            images/s, MFU and memory of a step: --recipe R
  ablate WHAT      a grid of runs x seeds and its table: components | alpha | masks | FILE.yaml ...
  doctor [RUN]     machine, images, teacher, what a run will take; why a run does not learn [--json]
  app [RUN ...]    look at attention, masks and features by hand, in the browser (extra `app`)
  recipes [NAME]   list recipes, or show one
  demo             a small two-stage run on sample images (or --data D), compared with MAE

--debug (or CMT_MAE_DEBUG=1) shows the traceback of an error. Exit status: 0 done, 2 bad input, 75 stopped with a
checkpoint, 130 interrupted, 1 a fault of cmt-mae itself, or problems that doctor found."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status 0, 2 (bad input), 75 (stopped, checkpoint written), 130 or 1.

    A command that fails prints one line on stderr. 1 is a bug of cmt-mae: an error that no part of it expected.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or os.environ.get("CMT_MAE_DEBUG", "0") not in ("", "0")
    arguments = [a for a in arguments if a != "--debug"]
    with lasting_streams():
        return run(arguments, debug)


def run(arguments: list[str], debug: bool) -> int:
    """One command, every way in which it may end told in one line."""
    try:
        return dispatch(arguments)
    except InputError as error:
        return fail(str(error), 2, debug)
    except LostProcess:  # it has said so itself
        return 75
    except Stopped as stopped:
        return fail(str(stopped), 75, debug)
    except KeyboardInterrupt:
        return fail("interrupted", 130, debug)
    except OSError as error:  # a file or folder that no part of the package expected to fail
        name = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        return fail(
            f"{name}{error.strerror or error}; check the path and its permissions", 2, debug
        )
    except Exception as error:
        if out_of_memory(error):
            return fail(
                f"out of memory ({one_line(error, 120)}): take a smaller network or fewer images at a time "
                "(--runtime.micro_batch in pretrain)",
                2,
                debug,
            )
        kind = type(error).__name__
        return fail(
            f"a fault of cmt-mae, {kind}: {one_line(error)}; --debug shows where: please report it",
            1,
            debug,
        )
    finally:
        if "cmt_mae.engine.processes" in sys.modules:
            sys.modules["cmt_mae.engine.processes"].leave_processes()


def out_of_memory(error: Exception) -> bool:
    """Whether Python's, torch's or the GPU's memory is used up."""
    names = (type(error).__name__, str(error))
    return isinstance(error, MemoryError) or any(
        sign in name
        for name in names
        for sign in ("OutOfMemoryError", "not enough memory", "out of memory", "allocate memory")
    )


def fail(message: str, status: int, debug: bool) -> int:
    """One line on stderr."""
    wait_for_rank_zero()
    if debug:
        traceback.print_exc()
    print("cmt-mae: " + printable(" ".join(message.split())), file=sys.stderr)
    return status


def wait_for_rank_zero(seconds: float = 4.0) -> None:
    """Under torchrun: time for rank 0 to say what every rank would say.

    When rank 0 has failed too, torchrun ends this process meanwhile, and the line is printed once.
    A rank that fails alone is still here afterwards and speaks for itself.
    """
    if os.environ.get("RANK", "0") != "0" and "TORCHELASTIC_RUN_ID" in os.environ:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(seconds)


def dispatch(arguments: list[str]) -> int:
    """Find the command and hand the rest of the words to it; returns its exit status."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    command, rest = arguments[0], arguments[1:]
    if command == "--version":
        from importlib.metadata import version

        print(version("cmt-mae"))
    elif command == "recipes":
        show_recipes(rest)
    elif command == "evaluate":
        run_evaluation(rest)
    elif command in COMMANDS:
        return run_command(command, rest)
    else:
        raise InputError(
            f"command '{one_line(command, 60)}' is unknown{hint(command, [*COMMANDS, 'evaluate', 'recipes'])}"
        )
    return 0


def run_command(command: str, words: list[str]) -> int:
    """pretrain, pack, export, demo, ...: parse settings, call the function; 1 where `doctor` found a problem."""
    entry = COMMANDS[command]
    if asks_for_help(words):
        print(help_page(command, entry, "--help-all" in words))
        return 0
    settings, function = load(entry)
    defaults: dict[str, Any] = {}
    if command in ("compare", "report", "app"):
        words = with_positional(words, "runs")
    if command == "explain":
        words = with_lists(words, ("images", "results"), ("what", "formats", "checkpoints", "size"))
    if command == "app":
        words = with_lists(words, ("backbones", "teachers"), ())
    if command in ("watch", "doctor"):
        words = with_positional(words, "run", many=False)
    if command == "ablate":
        words = with_positional(words, "experiment", many=False)
    if command in RECIPE_COMMANDS:
        recipe, words = take(words, "--recipe")
        for flag in ("extend", "yes"):
            given, words = take_flag(words, f"--{flag}")
            words = [*words, f"--{flag}=true"] if given else words
        words = [expand(word, SHORT) for word in words]
        if recipe is not None:
            defaults = load_recipes(recipe) | ({"recipe": recipe} if command == "doctor" else {})
    as_json, words = take_flag(words, "--json")
    outcome = function(parse(f"cmt-mae {command}", settings, words, defaults))
    if as_json:
        print(json.dumps(outcome, default=str))
    return int(command == "doctor" and outcome["problems"] > 0)


def asks_for_help(words: list[str]) -> bool:
    """Whether a help page is wanted, whatever else is among the words."""
    return any(
        word in ("-h", "--help", "--help-all") or word.startswith("--help=") for word in words
    )


def help_page(name: str, entry: Command, everything: bool) -> str:
    """The text of ``cmt-mae NAME --help``, or of --help-all."""
    from cmt_mae.core.help import show_help

    settings, _ = load(entry)
    takes_recipe = name in RECIPE_COMMANDS
    extra = {"json": "Print the outcome as one JSON object, the last line of stdout."}
    if takes_recipe:
        names = ", ".join(recipe_names())
        extra["recipe"] = (
            "Settings to start from; several are joined by commas and later ones win, such as a method and a "
            f"scale: cmt_all,micro64. One of {names}, or a YAML file. `cmt-mae recipes NAME` shows one."
        )
    return show_help(
        f"cmt-mae {name} {entry.form} [options]",
        settings,
        short=SHORT if takes_recipe else {},
        first=() if everything else entry.first,
        extra=extra,
        default="without a recipe" if name == "pretrain" else "default",
    )


def run_evaluation(words: list[str]) -> None:
    """evaluate TASK: print the table, and with --json one JSON object as the last line of stdout."""
    if not words or words[0] not in EVALUATIONS:
        if words and words[0] in ("-h", "--help"):
            print(USAGE)
            return
        task = words[0] if words else ""
        near = hint(task, list(EVALUATIONS))
        raise InputError(
            f"evaluate '{one_line(task, 60)}' is unknown{near}: use {', '.join(EVALUATIONS)}"
        )
    name = f"evaluate {words[0]}"
    if asks_for_help(words):
        print(help_page(name, EVALUATIONS[words[0]], "--help-all" in words))
        return
    settings, function = load(EVALUATIONS[words[0]])
    as_json, rest = take_flag(with_lists(words[1:], (), ("tasks",)), "--json")
    result = function(parse(f"cmt-mae {name}", settings, rest, {}))
    if isinstance(result, list):  # of `all`
        for one in result:
            show_result(one)
        if as_json:
            print("[" + ", ".join(one.to_json() for one in result) + "]")
        return
    show_result(result)
    if as_json:
        print(result.to_json())


def show_result(result: Any) -> None:
    """The numbers and the protocol behind them, on stderr, so that stdout stays for --json.

    Text objects: nothing in a name is taken for markup or for a terminal's commands.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    def shown(text: str) -> Text:
        return Text(printable(text))

    protocol = result.protocol
    over = result.over(protocol["headline"])
    title = (
        f"{result.task}, protocol {protocol['name']}, {result.backbone['name']} ({result.network})"
    )
    title += f", {over}" if over else ""
    table = Table(title=shown(title))
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    for metric, value in result.metrics.items():
        mark = " *" if metric == protocol["headline"] else ""
        ends = result.interval(metric)
        table.add_row(
            shown(metric + mark),
            f"{value:.2f}",
            f"of {result.over(metric)}" if ends is None else f"{ends[0]:.1f} to {ends[1]:.1f}",
        )
    console = Console(stderr=True)
    console.print(table)
    sequences = result.details.get("sequences")
    if result.task == "davis" and sequences:
        console.print(sequence_table(sequences))
    settings = ", ".join(
        f"{k} {f'{v:.4g}' if isinstance(v, float) else v}"
        for k, v in protocol.items()
        if k not in ("name", "headline")
    )
    pool = f" (here of {result.details['pool']})" if "pool" in result.details else ""
    console.print(shown(f"* the number to quote{pool}. protocol: {settings}"), style="dim")
    console.print(f"{result.seconds:.1f} s, seed {result.seed}", style="dim")


def sequence_table(rows: list[dict[str, Any]]) -> Any:
    """J and F of each video of a DAVIS result."""
    from rich.table import Table
    from rich.text import Text

    table = Table()
    table.add_column("sequence")
    for name in ("objects", "J&F", "J_mean", "F_mean"):
        table.add_column(name, justify="right")
    for row in rows:
        values = [f"{row[name]:.2f}" for name in ("J&F", "J_mean", "F_mean")]
        table.add_row(Text(printable(row["name"])), str(len(row["objects"])), *values)
    return table


def show_recipes(words: list[str]) -> None:
    """All recipes with the first line of their head comment, or the text of one."""
    if words and words[0] not in ("-h", "--help"):
        print(recipe_text(words[0]), end="")
        return
    names = recipe_names()
    width = max(map(len, names))
    for name in names:
        print(f"{name:{width}}  {head_comment(name).splitlines()[0]}")


def load(entry: Command) -> tuple[type, Callable[[Any], Any]]:
    """Settings class and function of a command."""
    module = import_module(entry.module)
    settings: type = getattr(module, entry.settings)
    assert is_dataclass(settings)
    return settings, getattr(module, entry.function)


if __name__ == "__main__":
    sys.exit(main())
