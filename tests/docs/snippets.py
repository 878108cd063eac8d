"""The fenced blocks of a page, and how to run them as a reader would.

What a block's title says is what happens, and the page shows it:

    ```sh                                  run by every test run
    ```sh title="slow: 3 minutes"          run by `make docs-snippets` alone
    ```sh title="not run: needs 8 GPUs"    never run here
    ```text title="output"                 its lines must be in the output of the block before (... is anything)
    ```yaml title="mine.yaml"              written to that file
"""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from cmt_mae.core.cli import main

FENCE = re.compile(
    r"^```(?P<language>\w+)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<text>.*?)^```$", re.M | re.S
)
LANGUAGES = ("sh", "python", "text", "yaml", "diff", "math", "function")
SHELL_SIGNS = set("|&;<>$`*?(){}")


@dataclass
class Block:
    """One fenced block."""

    page: str
    line: int
    language: str
    title: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}, line {self.line} ({self.language})"

    @property
    def never(self) -> bool:
        """Marked as not run, with a reason that the page shows."""
        return self.title.startswith("not run: ")

    @property
    def slow(self) -> bool:
        """Marked as run by `make docs-snippets` alone."""
        return self.title.startswith("slow: ")


def blocks_of(path: Path) -> list[Block]:
    """Every fenced block of a page, in order; AssertionError for a fence that is not understood."""
    text = path.read_text(encoding="utf-8")
    found = [
        Block(
            path.name,
            text.count("\n", 0, m.start()) + 1,
            m["language"],
            m["title"] or "",
            m["text"],
        )
        for m in FENCE.finditer(text)
    ]
    assert 2 * len(found) == len(re.findall(r"^ *(?:```|~~~)", text, re.M)), f"{path}: an odd fence"
    return found


def run_shell(text: str, as_typed: bool) -> str:
    """Output of shell lines; AssertionError where one fails.

    Lines that are plain `cmt-mae` commands run inside this process (the import of torch is paid once); all others,
    and with ``as_typed`` every block, in bash.
    """
    lines = re.sub(r"\\\n", " ", text).splitlines()
    commands = [words for line in lines if (words := shlex.split(line, comments=True))]
    plain = all(
        words[0] == "cmt-mae" and not SHELL_SIGNS & set("".join(words)) for words in commands
    )
    if plain and not as_typed:
        return "".join(run_command(words[1:]) for words in commands)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PATH": path}, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def run_command(words: list[str]) -> str:
    """Output of one `cmt-mae` command; AssertionError unless its exit status is 0 (of doctor also 1: problems)."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = main(words)
    expected = (0, 1) if words[0] == "doctor" else (0,)
    assert status in expected, f"cmt-mae {' '.join(words)}: exit status {status}\n{out.getvalue()[-3000:]}"
    return out.getvalue()


def run_python(text: str, as_typed: bool) -> str:
    """Output of a Python block, by itself."""
    if as_typed:
        return run_shell(f"python - <<'PYTHON'\n{text}PYTHON\n", as_typed=True)
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        exec(compile(text, "snippet", "exec"), {"__name__": "__main__"})
    return out.getvalue()


def check_output(wanted: str, given: str) -> None:
    """Every line of ``wanted`` is part of ``given``; spaces count as one, ... stands for anything on the line."""
    flat = "\n".join(" ".join(line.split()) for line in given.splitlines())
    for line in wanted.splitlines():
        parts = [re.escape(part) for part in " ".join(line.split()).split("...")]
        assert re.search(".*".join(parts), flat), f"not in the output: {line!r}\n{flat[-3000:]}"


def run_block(block: Block, output: str, everything: bool) -> str:
    """Run, check or write one block; returns the output of the newest one that ran."""
    if block.never or (block.slow and not everything):
        return "" if block.language in ("sh", "python") else output
    if block.language == "sh":
        return run_shell(block.text, everything)
    if block.language == "python":
        return run_python(block.text, everything)
    if block.title == "output" and output:
        check_output(block.text, output)
    if block.language == "yaml" and block.title:
        Path(block.title).write_text(block.text, encoding="utf-8")
    return output
