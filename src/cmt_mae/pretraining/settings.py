"""Settings of a pre-training run: the command line, the recipes and the Python interface are these names."""

from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Annotated, Any, Literal, Self

from cmt_mae.backbones.backbone import IMAGENET_MEAN, IMAGENET_STD
from cmt_mae.core.errors import InputError
from cmt_mae.core.recipes import load_recipes, merge
from cmt_mae.core.settings import (
    RESUME_SAFE,
    TIMEOUT_S,
    Amount,
    Count,
    CountOrNone,
    PartOf,
    Positive,
    Precision,
    Range,
    Share,
    build,
    check_fields,
    resume_safe,
)
from cmt_mae.data.source import Source
from cmt_mae.data.sources import open_split
from cmt_mae.engine.task import LoopSettings
from cmt_mae.method.cmtmae import FROM_IMAGE, MaskConfig, TargetConfig, takes_class_token
from cmt_mae.method.decoder import DecoderConfig
from cmt_mae.method.masking import GUIDED
from cmt_mae.method.teacher import TeacherConfig
from cmt_mae.method.vit import StudentConfig

IMAGENET = (IMAGENET_MEAN, IMAGENET_STD)
Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each channel, for pixels in 0..1."""


@dataclass
class DataConfig:
    """The images."""

    path: str = resume_safe("")
    """A folder, tar shards, parquet files, hf://owner/name, or a folder made by `cmt-mae pack`."""
    range: list[float] = field(default_factory=list)
    """Values of black and white in images of more than 8 bits, like 0 4095; empty: measured on some of them."""
    val_share: PartOf = 0.0
    """Share of the images to hold out where there is no val split: not trained on, and what the probe measures."""
    scale: list[float] = field(default_factory=lambda: [0.2, 1.0])
    """Share of the photo's area that a random crop takes: least and most."""
    flip: bool = True
    """Mirror half of the crops."""
    crops: Literal["random", "fixed"] = "random"
    """random (new ones every epoch) | fixed (an image's crop never changes)."""
    shrink: bool = True
    """Decode a JPEG at 1/2, 1/4 or 1/8 where a crop is then still twice as large as wanted: much faster on
    photos of many megapixels. A crop moves to the nearest 2, 4 or 8 pixels; its values change by about 1 of
    255."""
    mean: list[float] = field(default_factory=list)
    """Per channel, in 0..1; empty: ImageNet's for three channels, else measured on the data."""
    std: list[Positive] = field(default_factory=list)
    """Per channel, in 0..1; empty: as mean."""
    max_bad: Share = resume_safe(0.01)
    """The run stops when a larger share of the images seen cannot be read."""
    workers: Annotated[int, Range(-1)] = resume_safe(-1)
    """Loader processes; -1: one for each core but one, at most 16; 0: in the main process."""
    timeout_s: Amount = resume_safe(TIMEOUT_S)
    """A loader process that gives no answer for so many seconds counts as hung and is started again; 0: wait
    for ever."""

    def open_train(self) -> Source:
        """The images to train on. Raises InputError."""
        return open_split(self.path, "train", self.range, self.val_share)


@dataclass
class MomentumConfig:
    """The moving average of the student (momentum encoder)."""

    start: Share = 0.996
    """m at the switch of stages, 0..1."""
    end: Share = 1.0
    """m at the end."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """cosine | linear | constant."""
    half_lives: Amount = 0.0
    """How often stage two halves what is left of the student at the switch: a constant m is chosen for that, in
    place of start and end; 0: as they say. (Short runs need a smaller m than long ones.)"""
    zero_head: bool = False
    """The momentum student's head starts at zero at the switch of stages, not at random."""


@dataclass
class OptimConfig:
    """AdamW and its schedule."""

    blr: Amount = 1.5e-4
    """Base learning rate: lr = blr * batch_size / 256."""
    weight_decay: Amount = 0.05
    """Not applied to biases and 1-D parameters."""
    betas: tuple[PartOf, PartOf] = (0.9, 0.95)
    """Of AdamW."""
    warmup_epochs: Amount = 40.0
    """Linear from 0."""
    min_lr: Amount = 0.0
    """At the end of the cosine."""
    clip: Amount = 0.0
    """Largest norm of the gradient; 0: no limit."""


@dataclass(kw_only=True)
class RuntimeConfig(LoopSettings):
    """Settings that do not affect the result."""

    keep_last: Count = 2
    """How many of the newest checkpoints are kept."""
    keep_every: Amount = 0.0
    """Keep for good a checkpoint every so many epochs; 0: none."""
    keep_switch: bool = False
    """Write and keep for good a checkpoint at the switch of stages: `ablate` begins runs from it that have stage
    one in common."""
    picture_every: Amount = 0.0
    """Epochs between pictures of attention and mask; 0: at the switch of stages and at the end."""
    probe_data: str = ""
    """A labelled folder with train and val: k-NN accuracy is logged while training."""
    probe_every: Amount = 5.0
    """Epochs between two k-NN measurements."""
    extend: bool = False
    """Train a finished run on, to more `epochs`, with a warm-up and a cosine of its own."""
    yes: bool = False
    """Begin also where a CPU would take more than a day."""


@dataclass
class PretrainConfig:
    """Pre-train a vision transformer with CMT-MAE or one of its relatives."""

    out: str = resume_safe("")
    """Run directory. The same command again continues the run in it."""
    data: DataConfig = field(default_factory=DataConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    momentum: MomentumConfig = field(default_factory=MomentumConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig, metadata=RESUME_SAFE)
    epochs: Positive = 800.0
    """Passes over the images, both stages together."""
    extended: list[float] = field(default_factory=list)
    """Epochs after which a finished run was trained on; `--extend` writes it."""
    stage1_share: Share = 0.5
    """Share of the epochs (before any extension) that stage one takes, 0..1."""
    stage1_epochs: Amount | None = None
    """Epochs of stage one; overrides stage1_share."""
    batch_size: Count = 4096
    """Images an optimizer step, over all processes and accumulation."""
    alpha: Share = 0.3
    """Weight of the momentum student in Eqs. 3 and 4, 0..1."""
    alpha_mask: Share | None = None
    """Of Eq. 3 alone."""
    alpha_loss: Share | None = None
    """Of Eq. 4 alone."""
    alpha_ramp_epochs: Amount = 0.0
    """alpha grows linearly over so many epochs of stage two; 0: constant, as the paper."""
    precision: Precision = "auto"
    """auto (bf16 on GPUs, else fp32) | bf16 | fp32."""
    frozen_precision: Literal["auto", "bf16"] = "auto"
    """auto (as precision) | bf16 (teacher and momentum student are held and run wholly in bf16, attention maps
    excepted; the moving average itself stays in fp32)."""
    seed: CountOrNone = 0
    """Of weights, order, crops and masks."""
    init_from: str = ""
    """Start from a backbone (any that `evaluate` reads) or from a run directory (decoder and heads too); teacher:
    from the teacher's own weights."""

    def __post_init__(self) -> None:
        """A text in place of a section: ``data="photos/"`` is its path, ``teacher="embedded"`` its name."""
        if isinstance(self.data, str):
            self.data = DataConfig(path=self.data)
        if isinstance(self.teacher, str):
            self.teacher = TeacherConfig(name=self.teacher)

    @classmethod
    def from_recipe(cls, recipes: str, **settings: Any) -> Self:
        """Settings of one recipe, or of several joined by commas, with others on top.

        ``PretrainConfig.from_recipe("cmt_all,micro64", data="photos/", teacher="embedded", out="runs/a",
        mask={"ratio": 0.6})``: a section is a dict, a section of settings, or for data and teacher a text.

        Raises:
            InputError: an unknown recipe or setting, or a value that a setting cannot have.
        """
        nested = load_recipes(recipes)
        short = {"data": "path", "teacher": "name"}
        for name, value in settings.items():
            if name in short and isinstance(value, str):
                value = {short[name]: value}
            whole = is_dataclass(value) and not isinstance(value, type)
            merge(nested, {name: asdict(value) if whole else value})
        return build(cls, nested)

    def check(self) -> None:
        """Raise InputError for settings that cannot work, before anything is loaded."""
        self.__post_init__()  # where a text took a section's place since
        if not self.out:
            raise InputError("no folder for the run: give --out FOLDER")
        if not self.data.path:
            raise InputError(
                "no images: give --data FOLDER (or tar shards, parquet, a packed folder)"
            )
        check_fields(self)
        if not 0.0 <= self.stage_one() <= self.epochs:
            raise InputError(
                f"stage1_epochs {self.stage1_epochs} is longer than epochs {self.epochs}"
            )
        if self.teacher.cache and self.data.crops != "fixed" and self.teacher.view == "crop":
            raise InputError(
                "teacher.cache keeps the teacher's outputs for one crop an image: set data.crops to fixed, or "
                "teacher.view to photo"
            )
        if takes_class_token(self.target) and self.target.source in FROM_IMAGE:
            raise InputError(
                f"target.tokens {self.target.tokens} needs a network as target, not {self.target.source}: use "
                "masked or all"
            )
        if self.needs_momentum():
            self._check_blocks()
        if (
            self.needs_momentum()
            and "momentum" in (self.target.source, self.mask_source())
            and self.stage_one()
        ):
            raise InputError(
                "the momentum student alone guides this run, so there is no stage one: set stage1_epochs to 0"
            )

    def _check_blocks(self) -> None:
        """What is read from the student's blocks is there."""
        # timm's name alone may say the depth: of preset init_from, start.take_shape has written it
        depth = self.student.depth or self.student.architecture()[1]["depth"]
        if self.target.momentum_last_k > depth:
            raise InputError(
                f"target.momentum_last_k {self.target.momentum_last_k}: the student has {depth} blocks, give at "
                "most so many"
            )
        if not -depth <= self.mask.student_block < depth:
            raise InputError(
                f"mask.student_block {self.mask.student_block}: the student has {depth} blocks, give {-depth} to "
                f"{depth - 1}"
            )

    def stage_one(self) -> float:
        """Epochs of stage one; 0 where no momentum student takes part."""
        if not self.needs_momentum():
            return self.epochs
        if self.stage1_epochs is not None:
            return self.stage1_epochs
        return self.first_epochs() * self.stage1_share

    def first_epochs(self) -> float:
        """Epochs before any extension."""
        return self.extended[0] if self.extended else self.epochs

    def phase(self, epoch: float) -> tuple[float, float]:
        """(first, last) epoch of the schedule at ``epoch``: of the run itself or of an extension."""
        borders = [0.0, *self.extended, self.epochs]
        number = max(i for i, border in enumerate(borders[:-1]) if border <= epoch)
        return borders[number], borders[number + 1]

    def mask_source(self) -> str:
        """Whose attention guides the mask, or "none" for rules without attention."""
        return self.mask.source if self.mask.rule in GUIDED else "none"

    def needs_momentum(self) -> bool:
        """Whether a momentum student is ever run."""
        mask = self.mask_source() == "momentum" or (
            self.mask_source() == "collab" and self.alpha_of("mask") > 0
        )
        target = self.target.source == "momentum" or (
            self.target.source == "collab" and self.alpha_of("loss") > 0
        )
        return mask or target

    def needs_teacher(self) -> bool:
        """Whether the teacher is ever run (in stage one it replaces the mixture)."""
        two_stages = self.stage_one() > 0
        mask = self.mask_source() == "teacher" or (
            self.mask_source() == "collab" and (two_stages or self.alpha_of("mask") < 1)
        )
        target = self.target.source == "teacher" or (
            self.target.source == "collab" and (two_stages or self.alpha_of("loss") < 1)
        )
        return mask or target

    def alpha_of(self, part: str) -> float:
        """alpha of Eq. 3 ("mask") or Eq. 4 ("loss")."""
        own = self.alpha_mask if part == "mask" else self.alpha_loss
        return self.alpha if own is None else own
