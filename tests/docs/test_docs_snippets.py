"""A reader goes through the pages in order, in one folder, and every command does what the page says.

``make docs-snippets`` (CMT_MAE_DOCS=all) runs every block in bash as it is typed, the slow ones too.
"""

import os
import re
import sys
from pathlib import Path

import pytest
from snippets import (
    LANGUAGES,
    blocks_of,
    check_output,
    run_block,
    run_command,
    run_python,
    run_shell,
)

DOCS = Path(__file__).resolve().parents[2] / "docs"
# the order matters: later pages use what the first one made
PAGES = (
    "first-run", "teachers", "report", "doctor", "app", "small", "ablations", "evaluations", "backbones",
    "pictures", "export", "decide", "equations", "add-mask-rule", "add-target", "design", "scale", "gpu", "index",
)  # fmt: skip
NO_COMMANDS = {"licences", "api"}  # made by programs


@pytest.mark.timeout(3600)  # some twenty seconds; with the slow ones many minutes
def test_the_snippets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    everything = os.environ.get("CMT_MAE_DOCS") == "all"
    ran = 0
    for page in PAGES:
        output = ""
        for block in blocks_of(DOCS / f"{page}.md"):
            try:
                output = run_block(block, output, everything)
            except (Exception, SystemExit) as error:
                raise AssertionError(f"{block} does not do what the page says: {error}") from error
            ran += block.language in ("sh", "python") and not block.never
            if everything:
                print(block, file=sys.__stderr__)
    assert ran > 20


def test_every_page_is_run_and_every_block_is_known() -> None:
    """No page is left out, no command hides in an indented block, and what is not run has a reason on the page."""
    pages = {path.stem for path in DOCS.glob("*.md")}
    assert set(PAGES) == pages - NO_COMMANDS
    for page in PAGES:
        text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
        hidden = re.search(r"^ {4,}(?:cmt-mae|torchrun|python|make|pip) .*", text, re.M)
        assert hidden is None, f"{page}.md: this command is in no fence: {hidden[0].strip()}"
        for block in blocks_of(DOCS / f"{page}.md"):
            assert block.language in LANGUAGES, block
            assert not block.never or len(block.title) > len("not run: needs"), block


def test_the_runner_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "micro64" in run_command(["recipes"])
    assert run_shell("echo one\necho two", as_typed=False) == "one\ntwo\n"
    assert run_python("print(6 * 7)", as_typed=False) == "42\n"
    for failing in ("cmt-mae evaluate nothing", "false\necho on", "false | cat"):
        with pytest.raises(AssertionError):
            run_shell(failing, as_typed=False)
    with pytest.raises(ZeroDivisionError):
        run_python("1 / 0", as_typed=False)
    check_output("top-1  ... %\nlast", "x\n the top-1 of it: 3 %\nat last\n")
    with pytest.raises(AssertionError, match="not in the output"):
        check_output("top-1 ... %", "top-1\n3 %")
    page = tmp_path / "page.md"
    page.write_text(
        '```sh title="slow: 1 minute"\nfalse\n```\n```yaml title="a.yaml"\nalpha: 0.5\n```\n'
    )
    slow, written = blocks_of(page)
    assert run_block(slow, "", everything=False) == ""
    with pytest.raises(AssertionError):
        run_block(slow, "", everything=True)
    run_block(written, "", everything=False)
    assert Path("a.yaml").read_text() == "alpha: 0.5\n"
    page.write_text("```sh\nnever closed\n")
    with pytest.raises(AssertionError, match="odd fence"):
        blocks_of(page)
