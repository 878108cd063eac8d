"""The command line: wiring only. Options and types come from the settings dataclasses, help pages from help.py."""

import contextlib
import errno
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cmt_mae
from cmt_mae.core.errors import InputError
from cmt_mae.core.parsing import expand, parse, take, take_flag
from cmt_mae.core.recipes import load_recipes
from cmt_mae.core.text import hint, one_line

# read by torch at its import: its own warnings, such as DDP's of a flag that we set on purpose, are not for users
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

Command = tuple[str, str]
"""Names, in the package, of a command's settings and function; imported only when the command is used."""
COMMANDS: dict[str, Command] = {
    "pretrain": ("PretrainConfig", "pretrain"),
    "pack": ("PackConfig", "pack"),
    "export": ("ExportConfig", "export"),
    "embed": ("EmbedConfig", "embed_images"),
    "demo": ("DemoConfig", "demo"),
    "compare": ("CompareConfig", "compare"),
    "report": ("ReportConfig", "make_report"),
    "watch": ("WatchConfig", "watch"),
    "bench": ("BenchConfig", "bench"),
    "explain": ("ExplainConfig", "explain"),
    "ablate": ("AblateConfig", "ablate"),
    "doctor": ("DoctorConfig", "doctor"),
    "app": ("AppConfig", "app"),
}
EVALUATIONS: dict[str, Command] = {
    "knn": ("KnnConfig", "evaluate_knn"),
    "linear": ("LinearConfig", "evaluate_linear"),
    "finetune": ("FinetuneConfig", "evaluate_finetune"),
    "coco": ("CocoConfig", "evaluate_coco"),
    "ade20k": ("Ade20kConfig", "evaluate_ade20k"),
    "davis": ("DavisConfig", "evaluate_davis"),
    "all": ("EvaluateAllConfig", "evaluate_all"),
}
HELP = (["-h"], ["--help"])
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
GONE = (errno.EPIPE, errno.EIO)
"""Errors of a stream whose reader is gone."""


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
    """Run one command; whatever ends it is reported in one line."""
    try:
        return dispatch(arguments)
    except (Exception, KeyboardInterrupt) as error:
        from cmt_mae.core.failures import report_failure

        return report_failure(error, debug)
    finally:
        if "cmt_mae.engine.processes" in sys.modules:
            sys.modules["cmt_mae.engine.processes"].leave_processes()


def dispatch(arguments: list[str]) -> int:
    """Find the command and hand the rest of the words to it; returns its exit status."""
    command, words = (arguments or ["help"])[0], arguments[1:]
    if command == "--version":
        print(cmt_mae.__version__)
    elif command == "recipes":
        from cmt_mae.core.help import show_recipes

        show_recipes(words)
    elif command in ("-h", "--help", "help") or (command == "evaluate" and words[:1] in HELP):
        from cmt_mae.core.help import USAGE

        print(USAGE)
    elif command == "evaluate":
        run_evaluation(words)
    elif command in COMMANDS:
        return run_command(command, words)
    else:
        near = hint(command, [*COMMANDS, "evaluate", "recipes"])
        raise InputError(f"command '{one_line(command, 60)}' is unknown{near}")
    return 0


def asks_for_help(words: list[str]) -> bool:
    """Whether a help page is wanted, whatever else is among the words."""
    return any(
        word in ("-h", "--help", "--help-all") or word.startswith("--help=") for word in words
    )


def show_help(command: str, settings: type, words: list[str]) -> None:
    """Print the first page of a command's settings, or with --help-all everything."""
    from cmt_mae.core.help import help_page

    short = SHORT if command in RECIPE_COMMANDS else {}
    print(help_page(command, settings, "--help-all" in words, short))


def run_command(command: str, words: list[str]) -> int:
    """pretrain, pack, export, demo, ...: parse settings, call the function; 1 where `doctor` found a problem."""
    settings, function = load(COMMANDS[command])
    if asks_for_help(words):
        show_help(command, settings, words)
        return 0
    defaults: dict[str, Any] = {}
    if command in RECIPE_COMMANDS:
        recipe, words = take(words, "--recipe")
        for flag in ("extend", "yes"):
            given, words = take_flag(words, f"--{flag}")
            words = [*words, f"--{flag}=true"] if given else words
        words = [expand(word, SHORT) for word in words]
        if recipe is not None:
            defaults = load_recipes(recipe) | ({"recipe": recipe} if command == "doctor" else {})
    if command != "pretrain":
        from cmt_mae.core.bare_words import as_options

        words = as_options(command, words)
    as_json, words = take_flag(words, "--json")
    outcome = function(parse(f"cmt-mae {command}", settings, words, defaults))
    if as_json:
        print(json.dumps(outcome, default=str))
    return int(command == "doctor" and outcome["problems"] > 0)


def run_evaluation(words: list[str]) -> None:
    """evaluate TASK: print the table, and with --json one JSON object as the last line of stdout."""
    task, words = (words or [""])[0], words[1:]
    if task not in EVALUATIONS:
        near = hint(task, list(EVALUATIONS))
        raise InputError(
            f"evaluate '{one_line(task, 60)}' is unknown{near}: use {', '.join(EVALUATIONS)}"
        )
    settings, function = load(EVALUATIONS[task])
    if asks_for_help(words):
        show_help(f"evaluate {task}", settings, words)
        return
    from cmt_mae.core.bare_words import with_lists
    from cmt_mae.core.result_table import show_result

    as_json, words = take_flag(with_lists(words, (), ("tasks",)), "--json")
    whole, words = take_flag(words, "--protocols")
    outcome = function(parse(f"cmt-mae evaluate {task}", settings, words, {}))
    results = outcome if isinstance(outcome, list) else [outcome]  # a list of `all`
    for result in results:
        show_result(result, whole)
    if as_json:
        shown = ", ".join(result.to_json() for result in results)
        print(f"[{shown}]" if isinstance(outcome, list) else shown)


def load(command: Command) -> tuple[type, Callable[[Any], Any]]:
    """Settings class and function of a command."""
    settings, function = command
    return getattr(cmt_mae, settings), getattr(cmt_mae, function)


class LastingStream:
    """stdout or stderr, whose reader may go away (a closed pipe, a terminal that is gone); then what is written
    to it is dropped, and the work goes on."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As the stream's."""
        with self._to_nowhere_if_gone():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As the stream's."""
        with self._to_nowhere_if_gone():
            self._stream.flush()

    @contextlib.contextmanager
    def _to_nowhere_if_gone(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in GONE:
                raise
            # what is still buffered, and all that comes, goes there too
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def lasting_streams() -> Iterator[None]:
    """Inside, a lost reader of stdout or stderr stops nothing."""
    before = sys.stdout, sys.stderr
    lasting: Any = [LastingStream(stream) for stream in before]
    sys.stdout, sys.stderr = lasting
    try:
        yield
    finally:
        for stream in lasting:
            stream.flush()
        sys.stdout, sys.stderr = before


if __name__ == "__main__":
    sys.exit(main())
