"""Settings of ``cmt-mae explain``."""

from dataclasses import dataclass, field
from pathlib import Path

from cmt_mae.core.backbone_facts import FACTS, BackboneFacts
from cmt_mae.core.errors import InputError
from cmt_mae.core.settings import Count, CountOrNone, Share, check_fields
from cmt_mae.core.text import hint, one_line
from cmt_mae.tools.inspect.canvas import FORMATS

OF_IMAGES = (
    "attention", "heads", "growth", "masks", "features", "predictions", "reconstruction", "neighbours",
)  # fmt: skip
"""Pictures of --images."""
KINDS = (*OF_IMAGES, "aim")
"""All there are; ``aim`` needs images with known objects and is made where it is asked for by name."""


@dataclass
class ExplainConfig(BackboneFacts):
    """Pictures of what networks look at, hide and predict.

    With --run RUN and --images all that this run allows, but `aim`, which is asked for by name. Nothing is
    trained.
    """

    run: str = ""
    """Run directory of `pretrain`."""
    backbone: str = ""
    """In place of a run: any backbone that `evaluate` takes (file, timm name, embedded, run directory)."""
    images: list[str] = field(default_factory=list)
    """Image files and folders (also tar shards, parquet, packed folders), one after another."""
    what: list[str] = field(default_factory=list)
    """Which pictures: attention (A_t, A_s, A_c and the mask), heads, growth (checkpoints in a row), masks (every
    rule), features (PCA), predictions (beside targets), reconstruction (pixel targets), neighbours, aim (does
    attention lie on the objects of --data?). Empty: all but aim, as far as the run allows."""
    out: str = ""
    """Folder for the pictures. Default: RUN/pictures."""
    count: Count = 4
    """Images in a picture, evenly chosen from the folders."""
    checkpoints: list[CountOrNone] = field(default_factory=list)
    """Steps of the checkpoints in `growth` (0 is the random start); the last one is used for all else. Empty:
    evenly chosen ones."""
    columns: Count = 6
    """Checkpoints in `growth`, neighbours."""
    size: list[Count] = field(default_factory=list)
    """Another input size than the network's: one side, or height and width, in pixels."""
    teacher: str = ""
    """Another teacher than the run's, as `pretrain --teacher`, or none. A run or backbone without one gets A_t."""
    grid_align: str = ""
    """As `pretrain --teacher.grid_align`: input | resample. Default: the run's, else input."""
    key: str = ""
    """Of a backbone with several entries, e.g. momentum."""
    alpha: Share | None = None
    """Weight of A_s in A_c, 0..1. Default: the run's at that step."""
    rule: str = ""
    """Mask rule of `attention`, `predictions` and `reconstruction`. Default: the run's."""
    layer: CountOrNone = 0
    """Block whose attention and features are shown, from 1; 0: the last."""
    gallery: str = ""
    """Images among which neighbours are looked for. Default: --images, all of them."""
    gallery_size: Count = 1000
    """At most so many of the gallery, evenly chosen."""
    data: str = ""
    """For aim: images with known objects, in COCO's or DAVIS's layout or a folder with images/ and masks/."""
    formats: list[str] = field(default_factory=lambda: ["png"])
    """png | svg | pdf; several with commas: png,svg."""
    seed: CountOrNone = 0
    """Of the masks."""
    progress: bool = True
    """Show the progress bar."""

    def check(self) -> None:
        """Raise InputError for settings that cannot work, before anything is loaded."""
        check_fields(self)
        for name in self.what:
            if name not in KINDS:
                raise InputError(
                    f"--what '{one_line(name, 60)}' is unknown{hint(name, KINDS)}: use {', '.join(KINDS)}"
                )
        for name in self.formats:
            if name not in FORMATS:
                raise InputError(
                    f"--formats '{one_line(name, 60)}' is unknown: use {', '.join(FORMATS)}"
                )
        if self.run and self.backbone:
            raise InputError("--run and --backbone are both given: leave one out")
        given = [name for name in FACTS if getattr(self, name)]
        if given and not self.backbone:
            raise InputError(
                f"--{given[0]} is of the file that --backbone names, and there is none: leave it out"
            )
        if not (self.run or self.backbone):
            raise InputError("nothing to look at: give --run RUN, or --backbone B")
        if len(self.size) > 2:
            raise InputError(f"--size {self.size}: give one side, or height and width, in pixels")
        wanted = [name for name in self.what if name in OF_IMAGES]
        if wanted and not self.images:
            raise InputError(f"--what {wanted[0]} needs images: give --images FOLDER or files")
        if not self.what and not self.images:
            raise InputError("no images: give --images FOLDER or files")
        if not self.out and not self.run:
            raise InputError("no place for the pictures: give --out FOLDER")

    def folder(self) -> Path:
        """Where the pictures go."""
        return Path(self.out) if self.out else Path(self.run) / "pictures"
