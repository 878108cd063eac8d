"""The networks of a run at one checkpoint, or a plain backbone, ready to be looked at."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from cmt_mae.backbones import Backbone, load_backbone
from cmt_mae.core import run_reader
from cmt_mae.core.backbone_facts import BackboneFacts
from cmt_mae.core.checkpoint import checkpoint_path, list_checkpoints, load_checkpoint, step_of
from cmt_mae.core.errors import InputError
from cmt_mae.core.parsing import parse
from cmt_mae.core.text import one_line
from cmt_mae.method.cmtmae import Alphas, MaskConfig, StudentWithDecoder
from cmt_mae.method.frozen import FrozenNetworks
from cmt_mae.method.masking import count_masked
from cmt_mae.method.teacher import Teacher, TeacherConfig
from cmt_mae.method.vit import Vit, build_student
from cmt_mae.pretraining import assembly
from cmt_mae.pretraining.plan import Plan, alphas_at
from cmt_mae.pretraining.settings import PretrainConfig

NO_TEACHER = "none"
"""Name that leaves the teacher out."""
Statistics = assembly.Statistics
Who = Literal["teacher", "student"]


@dataclass
class Networks:
    """Whose attention and features are looked at, and by which settings patches are hidden and predicted."""

    name: str
    """For titles: run and step, or the backbone's name."""
    student: Vit
    """Whose attention is A_s: the momentum student where the run has one by then, else the student."""
    momentum: bool
    """Whether ``student`` is the momentum student, which takes part in Eqs. 3 and 4."""
    teacher: Teacher | None
    """Whose attention is A_t, its map brought to the student's grid; None: there is none."""
    learner: StudentWithDecoder | None
    """Student, decoder and heads that predict; None for a plain backbone."""
    config: PretrainConfig
    """The run's settings (the method's defaults for a plain backbone), at this input size."""
    weights: Alphas
    """alpha of Eq. 3 (mask) and Eq. 4 (loss) at this step."""
    stats: Statistics
    """The student's normalisation: mean and standard deviation of each channel, in 0..1."""
    step: int | None = None
    """Of the checkpoint; None for a plain backbone."""
    target_means: dict[str, Any] | None = None
    """Running means of the targets in the checkpoint (``target.centre``)."""
    same_teacher: bool = True
    """Whether the teacher is the run's own, so that its features are what the heads predict."""

    @property
    def size(self) -> tuple[int, int]:
        """Input height and width in pixels."""
        return self.config.student.size()

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches, of the student and of every mask."""
        return self.config.student.grid()

    def known(self) -> list[Who]:
        """Whose maps and features there are."""
        return ["student"] if self.teacher is None else ["teacher", "student"]

    @property
    def n_mask(self) -> int:
        """How many patches the run hides."""
        return count_masked(self.grid[0] * self.grid[1], self.config.mask.ratio)

    @property
    def alpha(self) -> float:
        """Weight of A_s in what guides the run's mask at this step; 0: the teacher alone, 1: the student alone."""
        alone = {"teacher": 0.0, "momentum": 1.0}
        return alone.get(self.config.mask_source(), self.weights.mask)

    @cached_property
    def guides(self) -> FrozenNetworks:
        """The run's own code for targets, asked at every patch; it draws no mask worth looking at."""
        guides = FrozenNetworks(
            MaskConfig(rule="random", ratio=self.config.mask.ratio),
            replace(self.config.target, source=self.target_source(), tokens="all"),
            teacher=self.teacher, grid=self.grid, patch_size=self.config.student.patch_size,
            mean=self.stats[0], std=self.stats[1],
        )  # fmt: skip
        guides.momentum = self.student
        if self.target_means is not None:
            guides.means.load_state_dict(self.target_means, self.student.cls_token.device)
        return guides

    def target_source(self) -> Any:
        """What of the run's targets there is to look at; "" for nothing."""
        alpha = self.weights.loss
        source: str = self.config.target.source
        if self.learner is None:
            return ""
        if source == "collab":
            source = {0.0: "teacher", 1.0: "momentum"}.get(alpha, "collab")
        teacher = self.teacher is not None and self.same_teacher
        if source == "collab" and not teacher:
            return "momentum"
        return "" if source == "teacher" and not teacher else source


class Run:
    """A run directory: its settings, checkpoints and teacher, read once; ``at`` gives the networks of a step."""

    def __init__(
        self,
        folder: str | Path,
        *,
        teacher: str = "",
        grid_align: Any = "",
        size: Sequence[int] = (),
    ) -> None:
        """teacher: another one than the run's, or "none". grid_align: as teacher.grid_align of the run.

        size: another input size, height and width in pixels; positions are resampled to it.
        Raises InputError where the folder is no run, or something of it cannot be read.
        """
        self.folder = Path(folder)
        self.trained = read_config(self.folder)
        self.backbone = load_backbone(str(self.folder))
        self.stats: Statistics = (self.backbone.mean, self.backbone.std)
        config = self.trained
        if size:
            config = replace(config, student=replace(config.student, img_size=list(size)))
        if grid_align:
            config = replace(config, teacher=replace(config.teacher, grid_align=grid_align))
        self.config, self.own_teacher = config, teacher in ("", config.teacher.name)
        self.teacher: Teacher | None = None
        if self.own_teacher and config.needs_teacher():
            self.teacher = _own_teacher(config, self.stats, self.folder)
        elif teacher not in ("", NO_TEACHER):
            self.teacher = open_teacher(teacher, grid_align, config, self.stats)
        self.plan = read_plan(self.folder)

    def steps(self) -> list[int]:
        """Steps of the checkpoints there are, oldest first."""
        return [step_of(path) for path in list_checkpoints(self.folder / "checkpoints")]

    def at(self, step: int | None = None) -> Networks:
        """The networks after ``step`` optimizer steps: of a checkpoint, or 0 for the random start.

        None: the newest checkpoint, or the backbone files alone where no checkpoint is left.
        Raises InputError for a step without checkpoint.
        """
        known = self.steps()
        if step is None:
            if not known:
                return self._from_backbones()
            step = known[-1]
        if step == 0 and 0 not in known:
            with torch.random.fork_rng(devices=[]):
                start = assembly.build_learner(self.trained, self.teacher)
            return self._networks(0, start.state_dict(), None)
        if step not in known:
            there = ", ".join(map(str, known)) or "none"
            raise InputError(
                f"{self.folder} has no checkpoint of step {step} (there are: {there}): choose one of these"
            )
        state = load_checkpoint(checkpoint_path(self.folder / "checkpoints", step))
        found = self._networks(step, state["learner"], state["momentum"])
        return replace(found, target_means=state.get("target_means"))

    def _networks(
        self, step: int, learned: dict[str, Tensor], average: dict[str, Tensor] | None
    ) -> Networks:
        """From the weights of a checkpoint, at the input size asked for."""
        config, before = self.config, self.trained.student.grid()
        grid = config.student.grid()
        student = build_student(config.student)
        widths = {
            name.split(".")[1]: int(tensor.shape[0])
            for name, tensor in learned.items()
            if name.startswith("heads.") and name.endswith(".weight")
        }
        learner = StudentWithDecoder(student, config.decoder, config.target, widths)
        try:
            learner.load_state_dict(fitted(learned, before, grid))
            seen = learner.student
            if average is not None:
                seen = build_student(config.student)
                seen.load_state_dict(fitted(average, before, grid))
        except RuntimeError as error:
            raise InputError(
                f"the checkpoint of step {step} in {self.folder} does not fit its config.yaml "
                f"({one_line(error, 120)}): bring the right one back"
            ) from error
        return Networks(
            name=f"{self.folder.name}, step {step}",
            student=seen.requires_grad_(False).eval(),
            momentum=average is not None,
            teacher=self.teacher,
            learner=learner.requires_grad_(False).eval(),
            config=config,
            weights=self._weights(step),
            stats=self.stats,
            step=step,
            same_teacher=self.own_teacher,
        )

    def _from_backbones(self) -> Networks:
        """backbone.safetensors, and backbone_momentum.safetensors where there is one."""
        average = (self.folder / "backbone_momentum.safetensors").is_file()
        found = load_backbone(
            str(self.folder),
            img_size=self.config.student.size(),
            key="momentum" if average else None,
        )
        step = self.plan.total_steps if self.plan else 0
        return Networks(
            name=self.folder.name,
            student=found.model.requires_grad_(False).eval(),
            momentum=average,
            teacher=self.teacher,
            learner=None,
            config=self.config,
            weights=self._weights(step) if average else Alphas(0.0, 0.0),
            stats=self.stats,
            same_teacher=self.own_teacher,
        )

    def _weights(self, step: int) -> Alphas:
        """alpha of the step that came last; of a run without a readable plan those of the settings."""
        if self.plan is None:
            return Alphas(self.config.alpha_of("mask"), self.config.alpha_of("loss"))
        return alphas_at(self.config, self.plan, max(0, step - 1))


def open_backbone(
    name: str,
    *,
    key: str | None = None,
    teacher: str = "",
    grid_align: str = "",
    size: Sequence[int] = (),
    facts: BackboneFacts | None = None,
) -> Networks:
    """Any backbone that ``load_backbone`` knows, beside a teacher where one is named.

    Raises InputError where it is none, or its patches are no squares.
    """
    backbone: Backbone = load_backbone(name, img_size=list(size) or None, key=key, facts=facts)
    vit: Vit = backbone.model
    rows, columns = (int(side) for side in vit.patch_embed.patch_size)
    if rows != columns:
        raise InputError(
            f"{name} has patches of {rows} x {columns} pixels: only square ones are shown"
        )
    config = PretrainConfig()
    config.student.img_size, config.student.patch_size = list(backbone.img_size), rows
    config.student.in_chans = len(backbone.mean)
    stats: Statistics = (backbone.mean, backbone.std)
    known = teacher not in ("", NO_TEACHER)
    return Networks(
        name=Path(name).name.removesuffix(".safetensors"),
        student=vit.requires_grad_(False).eval(),
        momentum=False,
        teacher=open_teacher(teacher, grid_align, config, stats) if known else None,
        learner=None,
        config=config,
        weights=Alphas(config.alpha, config.alpha) if known else Alphas(0.0, 0.0),
        stats=stats,
    )


@dataclass
class NamedTeacher(TeacherConfig):
    """A teacher that is given by its name alone."""

    given: ClassVar[bool] = False


def open_teacher(name: str, grid_align: Any, config: PretrainConfig, stats: Statistics) -> Teacher:
    """A teacher of this name for the student of the settings; see TeacherConfig.grid_align."""
    settings = NamedTeacher(name=name, grid_align=grid_align or "input")
    return assembly.make_teacher(settings, config.student.grid(), stats)[0]


def _own_teacher(config: PretrainConfig, stats: Statistics, folder: Path) -> Teacher:
    """The run's teacher. Raises InputError, saying what to do, where it cannot be loaded."""
    try:
        return assembly.make_teacher(config.teacher, config.student.grid(), stats)[0]
    except InputError as error:
        raise InputError(
            f"the teacher of {folder} cannot be loaded ({error}): say with --teacher where it is, or --teacher "
            f"{NO_TEACHER} to go without"
        ) from error


def read_config(folder: Path) -> PretrainConfig:
    """Settings of a run from its config.yaml. Raises InputError where the folder is no run of ours."""
    content, path = run_reader.read_config(folder), folder / "config.yaml"
    if "student" not in content or "mask" not in content:
        raise InputError(f"{path} is not that of a `cmt-mae pretrain` run: give the run directory")
    config: PretrainConfig = parse(str(path), PretrainConfig, [], content)
    return config


def read_plan(folder: Path) -> Plan | None:
    """What run.json says of steps and stages; None where it is missing or of another make."""
    try:
        return Plan(**run_reader.read_run(folder).facts["plan"])
    except (InputError, LookupError, TypeError):
        return None


def fitted(
    state: dict[str, Tensor], before: tuple[int, int], grid: tuple[int, int]
) -> dict[str, Tensor]:
    """Weights with every table of positions (1, 1 + L, D) resampled from one grid to another (bicubic)."""
    if before == grid:
        return state
    return {
        name: resample_abs_pos_embed(tensor, list(grid), list(before), num_prefix_tokens=1)
        if name.rsplit(".", 1)[-1] == "pos_embed"
        else tensor
        for name, tensor in state.items()
    }
