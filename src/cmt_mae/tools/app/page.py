"""The page in Gradio: wiring of controls to the explorer, nothing else."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from cmt_mae.core.errors import InputError
from cmt_mae.core.text import printable
from cmt_mae.data.decode import decode_image
from cmt_mae.data.files import read_file
from cmt_mae.data.source import BadImage
from cmt_mae.method.masking import RULES
from cmt_mae.tools.app.explorer import OWN_TEACHER, TILES, Choice, Controls, Explorer
from cmt_mae.tools.inspect.networks import NO_TEACHER

NEWEST = "newest"
SIDE = 230  # pixels of a tile
CSS = """
#save_file {position: absolute; left: -10000px}
.name, .name * {overflow: visible !important}
.name p {padding-bottom: 4px}
.tile .icon-button-wrapper {opacity: 0}
.tile:hover .icon-button-wrapper, .tile:focus-within .icon-button-wrapper {opacity: 1}
"""
SYSTEM_FONTS = ["system-ui", "sans-serif"]


def theme(gradio: Any) -> Any:
    """The default look with the system's fonts: Gradio's own would be asked of a server of fonts."""
    return gradio.themes.Default(font=SYSTEM_FONTS, font_mono=["ui-monospace", "monospace"])


def told(function: Callable[..., Any]) -> Callable[..., Any]:
    """What the user can fix is told in a small window; the pictures stay as they are."""

    @functools.wraps(function)
    def run(*values: Any) -> Any:
        try:
            return function(*values)
        except InputError as error:
            text = printable(str(error)).replace("<", "&lt;")  # the window takes HTML
            raise gr.Error(text, duration=None, print_exception=False) from error

    return run


def build(explorer: Explorer, example: Path, folder: Path) -> gr.Blocks:
    """The page. example: the first image; folder: for downloads."""
    with gr.Blocks(title="cmt-mae", analytics_enabled=False) as page:
        gr.Markdown("## cmt-mae: what does it look at, hide and see?")
        with gr.Tab("Attention, mask, features"):
            explore_tab(explorer, example, folder, page)
        with gr.Tab("Compare two backbones"):
            compare_tab(explorer, example, page)
    return page


def choice_of(explorer: Explorer, network: str, step: str, teacher: str) -> Choice:
    """From the words of the lists."""
    if not explorer.names:
        raise InputError("there is nothing to look at: start the app with runs or backbones")
    return Choice(network, None if step in (NEWEST, None) else int(step), teacher)


def explore_tab(explorer: Explorer, example: Path, folder: Path, page: gr.Blocks) -> None:
    """Image and sliders at the left, pictures at the right."""
    first = explorer.names[0] if explorer.names else None
    own = OWN_TEACHER if first in explorer.runs else explorer.teachers[-1]
    names = list(TILES)
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            image = dropped(example, "upload")
            network = gr.Dropdown(
                explorer.names, value=first, label="run or backbone", elem_id="network"
            )
            step = gr.Dropdown([NEWEST], value=NEWEST, label="checkpoint", elem_id="step")
            teacher = gr.Dropdown(explorer.teachers, value=own, label="teacher", elem_id="teacher")
            alpha = gr.Slider(
                0, 1, 0.3, step=0.05, label="alpha: weight of the student in A_c", elem_id="alpha"
            )
            ratio = gr.Slider(0.05, 0.95, 0.75, step=0.05, label="mask ratio", elem_id="ratio")
            rule = gr.Dropdown(list(RULES), value="sampled_high", label="mask rule", elem_id="rule")
            temperature = gr.Slider(
                0.1, 5, 1, step=0.1, label="temperature of the drawing", elem_id="temperature"
            )
            layer = gr.Slider(1, 12, 12, step=1, label="block", elem_id="layer")
            head = gr.Slider(0, 12, 0, step=1, label="head (0: all)", elem_id="head")
            seed = gr.Number(
                0,
                precision=0,
                minimum=0,
                maximum=2**31,
                label="seed of the drawing",
                elem_id="seed",
            )
        with gr.Column(scale=3):
            with gr.Row():
                tiles = [tile(TILES[name], name)[1] for name in names[:4]]
            with gr.Row():
                tiles += [tile(TILES[name], name)[1] for name in names[4:]]
                with gr.Column(min_width=SIDE - 60):
                    note = gr.Markdown(elem_id="note")
                    save = gr.Button("Download the picture", elem_id="save", size="md")
            file = gr.DownloadButton("file", elem_id="save_file")
    which = [network, step, teacher]
    sliders: list[Any] = [alpha, ratio, rule, temperature, layer, head, seed]

    def controls_of(values: tuple[Any, ...]) -> Controls:
        a, r, rule_, t, block, one_head, draw = values
        return Controls(
            float(a), float(r), rule_, float(t), int(block), int(one_head), int(draw or 0)
        )

    @told
    def draw(path: str | None, network: str, step: str, teacher: str, *values: Any) -> list[Any]:
        if not path:
            raise InputError("drop an image first")
        seen = explorer.view(choice_of(explorer, network, step, teacher), path, controls_of(values))
        text = f"{printable(seen.note)}. Drawn in {1000 * seen.seconds:.0f} ms."
        return [*(seen.tiles.get(name) for name in names), text.replace("<", "&lt;")]

    @told
    def chosen(network: str, step: str, teacher: str) -> list[Any]:
        """Another network: its checkpoints, its teacher, its own settings on the sliders."""
        steps = [str(one) for one in explorer.steps(network)]
        step = step if step in steps else NEWEST
        if network not in explorer.runs and teacher == OWN_TEACHER:
            teacher = next(
                (one for one in explorer.teachers if one not in (OWN_TEACHER, NO_TEACHER)),
                NO_TEACHER,
            )
        choice = choice_of(explorer, network, step, teacher)
        (blocks, heads), begin = explorer.limits(choice), explorer.start(choice)
        return [
            gr.Dropdown(choices=[NEWEST, *steps], value=step), gr.Dropdown(value=teacher),
            gr.Slider(value=begin.alpha), gr.Slider(value=begin.ratio), gr.Dropdown(value=begin.rule),
            gr.Slider(value=begin.temperature), gr.Slider(maximum=blocks, value=blocks),
            gr.Slider(maximum=heads, value=0),
        ]  # fmt: skip

    @told
    def write(path: str | None, network: str, step: str, teacher: str, *values: Any) -> str:
        if not path:
            raise InputError("drop an image first")
        choice = choice_of(explorer, network, step, teacher)
        return str(explorer.picture(choice, path, controls_of(values), folder))

    shown = [*tiles, note]
    quick: Any = {"show_progress": "hidden", "trigger_mode": "always_last", "concurrency_id": "draw",
                  "concurrency_limit": 1, "api_visibility": "private"}  # fmt: skip
    everything = [image, *which, *sliders]
    set_up = [step, teacher, *sliders[:-1]]
    for trigger in (page.load, network.input):
        trigger(chosen, which, set_up, **quick).then(draw, everything, shown, **quick)
    gr.on(
        [image.change, step.input, teacher.input, *(one.input for one in sliders)],
        draw, everything, shown, **quick,
    )  # fmt: skip
    save.click(write, everything, file, api_visibility="private").then(
        None, None, None, js="() => {document.querySelector('#save_file').click()}"
    )


def name_of(network: str) -> str:
    """A run or backbone over its picture: the last part of a path, as Markdown that changes nothing in it."""
    last = printable(network.rstrip("/").rsplit("/", 1)[-1])
    return "".join(f"\\{sign}" if sign in "\\`*_{}[]()#+-.!<>|~" else sign for sign in last)


def tile(label: str, name: str) -> tuple[gr.Markdown, gr.Image]:
    """One picture that cannot be changed, and its name above it; its buttons show under the pointer."""
    with gr.Column(min_width=SIDE - 60):
        title = gr.Markdown(label, elem_classes=["name"], elem_id=f"name_{name}")
        picture = gr.Image(
            label=label, show_label=False, type="numpy", format="png", interactive=False, height=SIDE,
            buttons=["download", "fullscreen"], elem_id=f"tile_{name}", elem_classes=["tile"], alt_text=label,
        )  # fmt: skip
    return title, picture


def dropped(example: Path, name: str) -> gr.Image:
    """Where an image is dropped; its path is what the functions get."""
    box = gr.Image(
        str(example), type="filepath", label="drop an image", height=200, elem_id=name,
        sources=["upload", "clipboard"],
    )  # fmt: skip
    decode = box.preprocess  # Gradio decodes an upload before any function of ours sees it

    def checked(payload: Any) -> Any:
        """The path of the upload; one line in the page for what is no picture that we would decode."""
        if payload is not None and payload.path:
            try:
                decode_image(read_file(Path(payload.path)), 3)
            except BadImage as error:
                text = printable(f"this image cannot be shown: {error}; give another one")
                text = text.replace("<", "&lt;")
                raise gr.Error(text, duration=None, print_exception=False) from error
        return decode(payload)

    # of this one box: a subclass of a Gradio component writes a .pyi file beside our module
    box.preprocess = checked  # type: ignore[method-assign]
    return box


def compare_tab(explorer: Explorer, example: Path, page: gr.Blocks) -> None:
    """An image to click on, and where each backbone sees the same."""
    names = explorer.names
    with gr.Row():
        image = dropped(example, "upload_compare")
        with gr.Column():
            first = gr.Dropdown(
                names, value=names[0] if names else None, label="first", elem_id="first"
            )
            second = gr.Dropdown(
                names, value=names[-1] if names else None, label="second", elem_id="second"
            )
            stretch = gr.Checkbox(
                False, label="each map from its own lowest value", elem_id="stretch"
            )
    place = gr.State((0.5, 0.5))
    with gr.Row():
        marked_title, marked = tile("click a patch", "click")
        left_title, left = tile("first", "first")
        right_title, right = tile("second", "second")
    note = gr.Markdown(elem_id="note_compare")
    titles = [marked_title, left_title, right_title]
    shown = [marked, left, right, note, *titles]

    @told
    def draw(
        path: str | None, one: str, other: str, stretch: bool, place: tuple[float, float]
    ) -> list[Any]:
        if not path:
            raise InputError("drop an image first")
        choices = [choice_of(explorer, name, NEWEST, NO_TEACHER) for name in (one, other)]
        seen = explorer.similarity(choices[0], choices[1], path, place, stretch)
        dark = " and ".join(f"{value:.2f}" for value in seen.darkest)
        text = f"Cosine of each patch's feature with the marked one. Bright: 1; dark: {dark}"
        heads = [
            "click a patch",
            *(f"{which}: {name_of(name)}" for which, name in (("first", one), ("second", other))),
        ]
        return [*seen.pictures, f"{text}. Drawn in {1000 * seen.seconds:.0f} ms.", *heads]

    @told
    def click(
        path: str | None, one: str, other: str, stretch: bool, picture: Any, event: gr.SelectData
    ) -> list[Any]:
        """The patch under the pointer; the picture has the shape of what is shown."""
        height, width = picture.shape[:2]
        at = (event.index[1] / height, event.index[0] / width)
        return [at, *draw(path, one, other, stretch, at)]

    quick: Any = {
        "show_progress": "hidden",
        "trigger_mode": "always_last",
        "api_visibility": "private",
    }
    gr.on(
        [page.load, image.change, first.input, second.input, stretch.input],
        draw,
        [image, first, second, stretch, place],
        shown,
        **quick,
    )
    marked.select(click, [image, first, second, stretch, marked], [place, *shown], **quick)
    image.upload(lambda: (0.5, 0.5), None, place, **quick)
