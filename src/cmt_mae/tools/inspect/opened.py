"""What one call of explain has opened: the run, its networks on the images, the pictures written."""

from functools import cached_property
from pathlib import Path

from matplotlib.figure import Figure

from cmt_mae.core.errors import InputError
from cmt_mae.method.masking import Mask
from cmt_mae.tools.inspect.canvas import save
from cmt_mae.tools.inspect.images import Album, Inputs, Photo, cut
from cmt_mae.tools.inspect.look import Inspector, hidden
from cmt_mae.tools.inspect.networks import Networks, Run, open_backbone
from cmt_mae.tools.inspect.settings import ExplainConfig


class NothingToShow(InputError):
    """A picture that this run, backbone or image set has nothing for."""


class Opened:
    """Everything is opened when it is first wanted, and kept for the next picture."""

    def __init__(self, config: ExplainConfig) -> None:
        self.config = config
        self.written: list[Path] = []
        self.left_out: dict[str, str] = {}
        self._photos: list[Photo] = []

    @cached_property
    def run(self) -> Run:
        """The run directory."""
        config = self.config
        return Run(
            config.run, teacher=config.teacher, grid_align=config.grid_align, size=config.size
        )

    @cached_property
    def look(self) -> Inspector:
        """The networks of the last checkpoint (or of the backbone) on the images."""
        return Inspector(self.networks, self.inputs(self.networks))

    @cached_property
    def networks(self) -> Networks:
        """Those of the last checkpoint that is asked for, or of the backbone."""
        config = self.config
        if config.run:
            return self.run.at(max(config.checkpoints, default=None))
        return open_backbone(
            config.backbone, key=config.key or None, teacher=config.teacher,
            grid_align=config.grid_align, size=config.size, facts=config,
        )  # fmt: skip

    def inputs(self, networks: Networks) -> Inputs:
        """The images, cut for these networks."""
        if not self._photos:
            channels = len(networks.stats[0])
            self._photos = list(Album(self.config.images).read(channels, self.config.count))
        return cut(self._photos, networks)

    def kinds(self) -> list[str]:
        """Class of each image; "" without."""
        return [photo.kind for photo in self._photos]

    def mask(self) -> tuple[str, Mask]:
        """The rule in force and what it hides."""
        config, look = self.config, self.look
        rule = config.rule or look.networks.config.mask.rule
        scores = look.scores(config.alpha, config.layer)
        return rule, hidden(look, rule, scores=scores, seed=config.seed)

    def save(self, figure: Figure, name: str) -> None:
        """Write a figure in every format."""
        self.written += save(figure, self.config.folder() / name, self.config.formats)
