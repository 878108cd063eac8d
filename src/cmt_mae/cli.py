"""The command line: wiring only. Options, types and help come from the settings dataclasses."""

import difflib
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from importlib import import_module
from typing import Any

from cmt_mae.errors import InputError, Stopped

# command -> module and names of its settings and of its function; imported only when asked for
COMMANDS = {
    "pretrain": ("cmt_mae.pretraining", "PretrainConfig", "pretrain"),
    "pack": ("cmt_mae.data.pack", "PackConfig", "pack"),
    "export": ("cmt_mae.backbones", "ExportConfig", "export"),
    "demo": ("cmt_mae.demo", "DemoConfig", "demo"),
    "compare": ("cmt_mae.report.compare", "CompareConfig", "compare"),
    "bench": ("cmt_mae.benchmark", "BenchConfig", "bench"),
}
EVALUATIONS = {
    "knn": ("cmt_mae.evaluate.knn", "KnnConfig", "evaluate_knn"),
    "linear": ("cmt_mae.evaluate.linear", "LinearConfig", "evaluate_linear"),
    "finetune": ("cmt_mae.evaluate.finetune", "FinetuneConfig", "evaluate_finetune"),
    "coco": ("cmt_mae.evaluate.detection", "CocoConfig", "evaluate_coco"),
    "ade20k": ("cmt_mae.evaluate.segmentation", "Ade20kConfig", "evaluate_ade20k"),
    "davis": ("cmt_mae.evaluate.video.evaluate", "DavisConfig", "evaluate_davis"),
    "all": ("cmt_mae.evaluate.everything", "EvaluateAllConfig", "evaluate_all"),
}
# short names of the most used settings of `pretrain`
SHORT = {
    "data": "data.path",
    "teacher": "teacher.name",
    "device": "runtime.device",
    "workers": "data.workers",
    "probe_data": "runtime.probe_data",
}
USAGE = """usage: cmt-mae COMMAND [options]      (cmt-mae COMMAND --help shows them)

  pretrain         pre-train a backbone: --recipe R --data D --out O; the same command again continues
  evaluate TASK    knn | linear | finetune | coco | ade20k | davis: --backbone B --data D [--out O] [--json]
  evaluate all     every task that the data below a folder allow: --backbone B --data-root ROOT
  compare RUN ...  one table of the results of runs [--paper] [--format markdown | json]
  export           write a backbone as timm, hf or torch
  pack             pack images into a memory-mapped array for fast epochs
  bench            images/s, MFU and the share of each part of a step: --recipe R
  recipes [NAME]   list recipes, or show one
  demo             a small two-stage run on generated scenes (or --data D), compared with MAE

--debug shows the traceback of an error. Exit status: 0 done, 2 bad input, 75 stopped with a checkpoint."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status 0, 2 (bad input), 75 (stopped, checkpoint written) or 1."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    try:
        dispatch(arguments)
    except InputError as error:
        return fail(str(error), 2, debug)
    except Stopped as stopped:
        return fail(str(stopped), 75, debug)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `| head` has seen enough
        return 0
    except KeyboardInterrupt:
        return fail("interrupted", 130, debug)
    return 0


def fail(message: str, status: int, debug: bool) -> int:
    """One line on stderr."""
    if debug:
        traceback.print_exc()
    print("cmt-mae: " + " ".join(message.split()), file=sys.stderr)
    return status


def dispatch(arguments: list[str]) -> None:
    """Find the command and hand the rest of the words to it."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return
    command, rest = arguments[0], arguments[1:]
    if command == "--version":
        from importlib.metadata import version

        print(version("cmt-mae"))
    elif command == "recipes":
        show_recipes(rest)
    elif command == "evaluate":
        run_evaluation(rest)
    elif command in COMMANDS:
        run_command(command, rest)
    else:
        raise InputError(
            f"command '{command}' is unknown{hint(command, [*COMMANDS, 'evaluate', 'recipes'])}"
        )


def run_command(command: str, words: list[str]) -> None:
    """pretrain, pack, export, demo: parse settings, call the function."""
    settings, function = load(COMMANDS[command])
    defaults: dict[str, Any] = {}
    if command == "compare":
        words = with_positional(words, "runs")
    if command in ("pretrain", "bench"):
        recipe, words = take(words, "--recipe")
        words = [expand(word, SHORT) for word in words]
        if recipe is not None:
            from cmt_mae.recipes import load_recipes

            defaults = load_recipes(recipe)
    as_json, words = take_flag(words, "--json")
    config = parse(f"cmt-mae {command}", settings, words, defaults)
    if config is None:
        return
    outcome = function(config)
    if as_json:
        print(json.dumps(outcome, default=str))


def run_evaluation(words: list[str]) -> None:
    """evaluate TASK: print the table, and with --json one JSON object as the last line of stdout."""
    if not words or words[0] not in EVALUATIONS:
        if words and words[0] in ("-h", "--help"):
            print(USAGE)
            return
        task = words[0] if words else ""
        raise InputError(f"evaluate '{task}' is unknown: use {', '.join(EVALUATIONS)}")
    settings, function = load(EVALUATIONS[words[0]])
    as_json, rest = take_flag(words[1:], "--json")
    config = parse(f"cmt-mae evaluate {words[0]}", settings, rest, {})
    if config is None:
        return
    result = function(config)
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
    """The numbers and the protocol behind them, on stderr, so that stdout stays for --json."""
    from rich.console import Console
    from rich.table import Table

    name = result.protocol["name"]
    table = Table(title=f"{result.task}, protocol {name}, {result.backbone['name']}")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for metric, value in result.metrics.items():
        mark = " *" if metric == result.protocol["headline"] else ""
        table.add_row(metric + mark, f"{value:.2f}")
    console = Console(stderr=True)
    console.print(table)
    sequences = result.details.get("sequences")
    if result.task == "davis" and sequences:
        console.print(sequence_table(sequences))
    settings = ", ".join(
        f"{k} {v}" for k, v in result.protocol.items() if k not in ("name", "headline")
    )
    console.print(f"* the number to quote. protocol: {settings}", style="dim")
    console.print(f"{result.seconds:.1f} s, seed {result.seed}", style="dim")


def sequence_table(rows: list[dict[str, Any]]) -> Any:
    """J and F of each video of a DAVIS result."""
    from rich.table import Table

    table = Table()
    table.add_column("sequence")
    for name in ("objects", "J&F", "J_mean", "F_mean"):
        table.add_column(name, justify="right")
    for row in rows:
        values = [f"{row[name]:.2f}" for name in ("J&F", "J_mean", "F_mean")]
        table.add_row(row["name"], str(len(row["objects"])), *values)
    return table


def show_recipes(words: list[str]) -> None:
    """All recipes with the first line of their head comment, or the text of one."""
    from cmt_mae.recipes import head_comment, recipe_names, recipe_text

    if words and words[0] not in ("-h", "--help"):
        print(recipe_text(words[0]), end="")
        return
    names = recipe_names()
    width = max(map(len, names))
    for name in names:
        print(f"{name:{width}}  {head_comment(name).splitlines()[0]}")


def parse(program: str, settings: type, words: list[str], defaults: dict[str, Any]) -> Any:
    """Words -> an instance of the settings dataclass; None after --help.

    defaults: nested values of recipes. Raises InputError with one line for unknown keys and bad values.
    """
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(prog=program, exit_on_error=False)
    parser.add_class_arguments(settings)
    words = [expand(word, {}) for word in words]
    known = [action.dest for action in parser._actions]
    for word in words:
        name = word[2:].split("=", 1)[0]
        if word.startswith("--") and name.rstrip("+") not in known:
            raise InputError(f"option --{name} is unknown{hint(name, known)}; see {program} --help")
    words = bare_flags(parser, words)
    if "--help" in words or "-h" in words:
        parser.print_help()
        return None
    try:
        if defaults:
            flat = flatten(defaults)
            for name in flat:
                if name not in known:
                    raise InputError(f"setting {name} of the recipe is unknown{hint(name, known)}")
            # through the parser, not set_defaults, which would not check the values' types
            words = [f"--{name}={as_word(value)}" for name, value in flat.items()] + words
        return settings(**vars(parser.instantiate(parser.parse_args(words))))
    except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
        raise InputError(f"{' '.join(str(error).split())}; see {program} --help") from error


def bare_flags(parser: Any, words: list[str]) -> list[str]:
    """``--paper`` alone means ``--paper=true``, for every setting that is yes or no."""
    flags = {
        f"--{action.dest}" for action in parser._actions if getattr(action, "_typehint", 0) is bool
    }
    following = [*words[1:], "--"][: len(words)]
    return [
        f"{word}=true" if word in flags and after.startswith("--") else word
        for word, after in zip(words, following, strict=True)
    ]


def with_positional(words: list[str], name: str) -> list[str]:
    """``a b --x 1 --flag`` -> ``--name=["a", "b"] --x 1 --flag``; a bare flag is one word.

    Values of options follow them with a space or an equals sign; --paper takes none.
    """
    kept: list[str] = []
    found: list[str] = []
    for word in words:
        waiting = kept and kept[-1].startswith("--") and "=" not in kept[-1]
        if word.startswith("-"):
            kept.append(word)
        elif waiting and kept[-1] != "--paper":
            kept[-1] = f"{kept[-1]}={word}"
        else:
            found.append(word)
    return [f"--{name}={json.dumps(found)}", *kept] if found else kept


def as_word(value: Any) -> str:
    """A setting as a word of the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def expand(word: str, short: dict[str, str]) -> str:
    """--batch-size -> --batch_size, and short names to full ones; other words stay."""
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    name = name.replace("-", "_")
    return f"--{short.get(name, name)}{equals}{value}"


def take(words: list[str], option: str) -> tuple[str | None, list[str]]:
    """The value of an option (``--x v`` or ``--x=v``) and the words without it."""
    for place, word in enumerate(words):
        if word == option:
            if place + 1 == len(words):
                raise InputError(f"{option} needs a value")
            return words[place + 1], words[:place] + words[place + 2 :]
        if word.startswith(option + "="):
            return word.split("=", 1)[1], words[:place] + words[place + 1 :]
    return None, words


def take_flag(words: list[str], flag: str) -> tuple[bool, list[str]]:
    """Whether the flag is among the words, and the words without it."""
    return flag in words, [word for word in words if word != flag]


def hint(word: str, known: Sequence[str]) -> str:
    """`` (did you mean x?)`` or nothing."""
    near = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def load(entry: tuple[str, str, str]) -> tuple[type, Callable[[Any], Any]]:
    """Settings class and function of a command."""
    module = import_module(entry[0])
    settings: type = getattr(module, entry[1])
    assert is_dataclass(settings)
    return settings, getattr(module, entry[2])


if __name__ == "__main__":
    sys.exit(main())
