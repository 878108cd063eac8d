"""The site builds with every warning an error, needs no network, and its links lead somewhere."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "-d",
        str(out),
    ]  # --quiet lets all pass
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


class Page(HTMLParser):
    """Ids, links and fetched addresses of one HTML page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.formulas = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        self.formulas += given.get("class") == "formula"
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in FETCHED and FETCHED[tag] in given:
            self.fetched.append(given[FETCHED[tag]])


def test_every_page_is_there_and_nothing_comes_from_a_network(site: Path) -> None:
    pages = {p.relative_to(site).as_posix() for p in site.rglob("*.html")}
    wanted = {p.relative_to(DOCS).with_suffix(".html").as_posix() for p in DOCS.rglob("*.md")}
    assert wanted <= pages
    for page in wanted:
        text = (site / page).read_text(encoding="utf-8")
        for address in Page(text).fetched:
            assert not urlsplit(address).netloc, f"{page} fetches {address}"
        assert "fonts.googleapis" not in text


def test_links_and_anchors_of_the_built_pages(site: Path) -> None:
    """Again on the HTML, without mkdocs: every link inside leads to a file and an id; others are well formed."""
    pages = {p: Page(p.read_text(encoding="utf-8")) for p in site.rglob("*.html")}
    checked = 0
    for path, page in pages.items():
        if path.name == "404.html":
            continue
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                assert parts.scheme in ("https", "mailto"), f"{path.name}: {link}"
                assert parts.scheme == "mailto" or "." in parts.netloc, f"{path.name}: {link}"
                continue
            goal = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert goal.is_file(), f"{path.name}: {link} leads nowhere"
            if parts.fragment and goal.suffix == ".html":
                known = pages[goal].ids
                assert unquote(parts.fragment) in known, f"{path.name}: no {link}"
            checked += 1
    assert checked > 500


def test_links_of_the_files_that_are_no_pages() -> None:
    for name in ("README.md", "SECURITY.md", "CHANGELOG.md"):
        text = (REPOSITORY / name).read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(
            r'(?:src|srcset)="([^"]+)"', text
        ):
            if not urlsplit(link).scheme:
                assert (REPOSITORY / link.partition("#")[0]).is_file(), f"{name}: {link}"


def test_formulas_are_drawn_and_code_is_shown(site: Path) -> None:
    """Each formula of the page is drawn, and each function is there as its source has it."""
    source = (DOCS / "equations.md").read_text(encoding="utf-8")
    text = (site / "equations.html").read_text(encoding="utf-8")
    assert Page(text).formulas == len(re.findall(r"^```math$", source, re.M)) >= 6
    shown = re.findall(r'class="filename">(src/\S+), line (\d+)<', text)
    names = re.findall(r"^```function\n(.+)\n```$", source, re.M)
    assert len(shown) == len(names) >= 8
    for name, (path, line) in zip(names, shown, strict=True):
        first = (REPOSITORY / path).read_text(encoding="utf-8").splitlines()[int(line) - 1]
        assert re.match(rf"\s*(def|class) {name.rsplit('.', 1)[1]}\b", first), (name, path, line)


def test_an_unknown_function_fails_the_build() -> None:
    sys.path.insert(0, str(DOCS))
    try:
        import site_hooks
    finally:
        sys.path.remove(str(DOCS))
    with pytest.raises(LookupError, match="has no mix_it"):
        site_hooks.find("cmt_mae.method.attention.mix_it")
    with pytest.raises(LookupError, match="no such module"):
        site_hooks.find("cmt_mae.methods.attention.mix_attention")
    path, line, text = site_hooks.find("cmt_mae.method.frozen.FrozenNetworks.update_momentum")
    assert path.name == "frozen.py"
    assert line > 50
    assert text.startswith("def update_momentum(")
