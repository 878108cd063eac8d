"""Multiplications: the table of the specification, and torch's own counter on the real modules."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from timm.layers import QuickGELU
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cmt_mae.method import targets as targets_module
from cmt_mae.method.cmtmae import Alphas, MaskConfig, StudentWithDecoder, TargetConfig
from cmt_mae.method.decoder import DecoderConfig
from cmt_mae.method.frozen import FrozenNetworks
from cmt_mae.method.masking import noise_length
from cmt_mae.method.teacher import Teacher, TeacherConfig
from cmt_mae.method.vit import StudentConfig, build_student
from cmt_mae.tools.bench.flops import OURS, PLAIN, Cuts, Step, step_macs, step_of

HALF = (0.5, 0.5, 0.5)
STAGE_ONE, STAGE_TWO = Alphas(0.0, 0.0), Alphas(0.3, 0.3)


def parts(
    student: StudentConfig,
    teacher: VisionTransformer | None,
    *,
    projection: Tensor | None = None,
    mask: MaskConfig | None = None,
    target: TargetConfig | None = None,
    decoder: DecoderConfig | None = None,
    teacher_config: TeacherConfig | None = None,
) -> tuple[StudentWithDecoder, FrozenNetworks]:
    """StudentWithDecoder and guides as a run has them, momentum student included."""
    mask, target = mask or MaskConfig(), target or TargetConfig()
    vit = build_student(student)
    wrapped = None
    if teacher is not None:
        settings = teacher_config or TeacherConfig()
        wrapped = Teacher(
            teacher, settings, mean=HALF, std=HALF, student_mean=HALF, student_std=HALF,
            grid=student.grid(), projection=projection,
        )  # fmt: skip
    widths = {"pixel": 3 * student.patch_size**2, "momentum": vit.embed_dim}
    widths["teacher"] = wrapped.width if wrapped else 0
    names = ("teacher", "momentum") if target.source == "collab" else (target.source,)
    learner = StudentWithDecoder(
        vit, decoder or DecoderConfig(), target, {name: widths[name] for name in names}
    )
    guides = FrozenNetworks(
        mask, target, teacher=wrapped, grid=student.grid(), patch_size=student.patch_size, mean=HALF, std=HALF
    )  # fmt: skip
    guides.start_momentum(vit)
    return learner, guides


# --- spec 11, ViT-B and ViT-L ---------------------------------------------------------------------


def full_size(preset: str, source: str = "collab") -> tuple[StudentWithDecoder, FrozenNetworks]:
    """ViT-B or ViT-L with CLIP-B/16 on the meta device: sizes without numbers."""
    pixel = source == "pixel"
    with torch.device("meta"):
        clip = VisionTransformer(num_classes=0, pre_norm=True, act_layer=QuickGELU)
        return parts(
            StudentConfig(preset=preset),
            None if pixel else clip,
            projection=torch.empty(512, 768),
            mask=MaskConfig(rule="random" if pixel else "sampled_high"),
            target=TargetConfig(source=source),
        )


@pytest.fixture(scope="module", params=["base", "large"])
def sizes(request: pytest.FixtureRequest) -> tuple[str, dict[str, Step]]:
    """The steps of MAE and of both stages."""
    name = request.param
    learner, guides = full_size(name)
    mae_learner, mae_guides = full_size(name, "pixel")
    return name, {
        "mae": step_of(mae_learner, mae_guides, STAGE_ONE, 147),
        "one": step_of(learner, guides, STAGE_ONE, 147),
        "two": step_of(learner, guides, STAGE_TWO, 147),
    }


TABLE = {  # GMAC: encoder, decoder, backward, teacher, momentum, total
    ("base", "one"): (4.408, 5.347, 19.395, 17.640, 0.0, 46.79),
    ("base", "two"): (4.408, 5.424, 19.550, 17.640, 17.563, 64.59),
    ("large", "one"): (15.377, 5.353, 41.306, 17.640, 0.0, 79.68),
    ("large", "two"): (15.377, 5.457, 41.512, 17.640, 61.554, 141.54),
}
ORDER = ("encoder", "decoder", "backward", "teacher", "momentum")


@pytest.mark.parametrize("stage", ["one", "two"])
def test_the_table_of_the_specification(sizes: Any, stage: str) -> None:
    name, steps = sizes
    macs = step_macs(steps[stage], PLAIN)
    expected = TABLE[name, stage]
    found = [macs[part] / 1e9 for part in ORDER]
    for value, wanted in zip(found, expected, strict=False):
        assert value == pytest.approx(wanted, abs=0.0006)
    assert sum(macs.values()) / 1e9 == pytest.approx(expected[-1], abs=0.0051)
    assert macs["mask"] == 0


def test_mae_of_the_specification(sizes: Any) -> None:
    name, steps = sizes
    macs = step_macs(steps["mae"], PLAIN)
    forward, backward = {"base": (9.781, 19.447), "large": (20.756, 41.357)}[name]
    assert (macs["encoder"] + macs["decoder"]) / 1e9 == pytest.approx(forward, abs=0.00051)
    assert macs["backward"] / 1e9 == pytest.approx(backward, abs=0.00051)


def test_shares_that_the_legal_cuts_leave(sizes: Any) -> None:
    """All four cuts: 97.9 / 97.9 / 98.7 / 98.8 percent of the naive step; singly 0.4, 0.1, 0.9, 0.7 ..."""
    name, steps = sizes
    single = [
        Cuts(visible_embedding=True),
        Cuts(predicted_heads=True),
        Cuts(last_decoder_block=True),
        Cuts(last_guide_block="asked"),
    ]
    every = Cuts(True, True, True, "asked")
    wanted = {
        ("base", "one"): (0.4, 0.1, 0.9, 0.7, 97.9),
        ("base", "two"): (0.3, 0.2, 0.7, 1.0, 97.9),
        ("large", "one"): (0.3, 0.05, 0.5, 0.4, 98.7),
        ("large", "two"): (0.2, 0.1, 0.3, 0.6, 98.8),
    }
    for stage in ("one", "two"):
        whole = sum(step_macs(steps[stage], PLAIN).values())
        saved = [100 - 100 * sum(step_macs(steps[stage], cut).values()) / whole for cut in single]
        left = 100 * sum(step_macs(steps[stage], every).values()) / whole
        *each, rest = wanted[name, stage]
        for value, expected in zip(saved, each, strict=True):
            assert value == pytest.approx(expected, abs=0.051)
        assert left == pytest.approx(rest, abs=0.051)
    guide = steps["two"].teacher
    assert guide is not None
    stage_one = [step_macs(steps["one"], Cuts(last_guide_block=how)) for how in ("all", "asked")]
    teacher = [macs["teacher"] + macs["mask"] for macs in stage_one]
    unprojected = 50 * guide.net.projection  # the specification's 0.309 is of the bare ViT
    assert (teacher[0] - teacher[1] - unprojected) / 1e9 == pytest.approx(0.309, abs=0.0005)


def test_mask_only_use_needs_keys_and_one_query() -> None:
    """Spec 11, cut 6: pixel targets, the last block costs 0.117 instead of 1.454 GMAC."""
    learner, guides = full_size("base")
    guides.target = learner.target = TargetConfig("pixel", "mae")
    learner.heads = torch.nn.ModuleDict({"pixel": torch.nn.Linear(512, 768)})
    step = step_of(learner, guides, STAGE_ONE, 147)
    assert step.teacher is not None
    last = step.teacher.net.block(197)
    assert last / 1e9 == pytest.approx(1.454, abs=0.0005)
    assert step_macs(step, OURS)["mask"] / 1e9 == pytest.approx(0.117, abs=0.0005)
    assert step_macs(step, OURS)["teacher"] == step.teacher.net.before_last()


# --- torch's counter on the modules as they run --------------------------------------------------------


def counted(
    learner: StudentWithDecoder, guides: FrozenNetworks, weights: Alphas, n_mask: int, size: Any
) -> list[int]:
    """MAC of guides, learner and backward of one image by FlopCounterMode; attention multiplied out, since
    torch counts neither the CPU's fused kernel nor plainly its backward. Monitors are left out."""
    patches = guides.grid[0] * guides.grid[1]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, 3, *size, generator=generator)
    noise = torch.rand(1, noise_length(guides.mask.rule, patches), generator=generator)
    macs = []

    def count(run: Any) -> Any:
        rank = patch.object(targets_module, "effective_rank", lambda _: torch.zeros(()))
        with rank, FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            result = run()
        macs.append(counter.get_total_flops() // 2)
        assert counter.get_total_flops() % 2 == 0
        return result

    mask, targets, _ = count(lambda: guides(images, noise, n_mask, weights))
    loss, _ = count(lambda: learner(images, mask, targets, weights.loss))
    count(loss.backward)
    return macs


def check_against_torch(
    learner: StudentWithDecoder, guides: FrozenNetworks, weights: Alphas, n_mask: int, size: Any
) -> dict[str, int]:
    """Equal to the last multiplication."""
    macs = step_macs(step_of(learner, guides, weights, n_mask), OURS)
    expected = [
        macs["teacher"] + macs["momentum"] + macs["mask"],
        macs["encoder"] + macs["decoder"],
        macs["backward"],
    ]
    assert counted(learner, guides, weights, n_mask, size) == expected
    return macs


SMALL = StudentConfig(img_size=[32, 48], patch_size=8, width=32, depth=3, heads=4)


def small_teacher(**more: Any) -> VisionTransformer:
    """Another width, depth and MLP than the student's, four registers."""
    sizes: dict[str, Any] = {
        "img_size": (64, 96), "patch_size": 16, "embed_dim": 48, "depth": 4, "num_heads": 3,
        "mlp_ratio": 3, "num_classes": 0, "reg_tokens": 4,
    }  # fmt: skip
    return VisionTransformer(**(sizes | more))


SETTINGS: dict[str, dict[str, Any]] = {
    "the method": {},
    "mask alone": {"target": TargetConfig("pixel", "mae")},
    "targets alone": {"mask": MaskConfig(rule="random")},
    "teacher alone": {
        "mask": MaskConfig(source="teacher"),
        "target": TargetConfig(source="teacher"),
    },
    "mask of the teacher, target of the momentum student": {
        "mask": MaskConfig(source="teacher"),
        "target": TargetConfig(source="momentum"),
    },
    "all tokens": {"target": TargetConfig(tokens="all")},
    "all and class": {"target": TargetConfig(tokens="all+cls")},
    "mean of the last blocks": {
        "target": TargetConfig(momentum_last_k=2),
        "teacher_config": TeacherConfig(feature="last_k", last_k=2),
    },
    "prompting decoder": {"decoder": DecoderConfig(kind="prompting", width=16, depth=2, heads=2)},
    "no decoder block": {"decoder": DecoderConfig(width=16, depth=0, heads=2)},
}


@pytest.mark.parametrize(
    "weights", [STAGE_ONE, STAGE_TWO, Alphas(1.0, 1.0)], ids=["one", "two", "a1"]
)
@pytest.mark.parametrize("name", SETTINGS)
def test_equals_torchs_counter(name: str, weights: Alphas) -> None:
    if weights is STAGE_ONE and "momentum" in name:
        weights = STAGE_TWO
    settings = {"decoder": DecoderConfig(width=16, depth=2, heads=2), **SETTINGS[name]}
    last_k = "teacher_config" in settings
    learner, guides = parts(
        SMALL, small_teacher(), projection=None if last_k else torch.randn(20, 48), **settings
    )
    macs = check_against_torch(learner, guides, weights, 18, (32, 48))
    assert macs["encoder"] > 0
    assert macs["backward"] > macs["encoder"]


@pytest.mark.parametrize("kind", ["columns", "probe"])
def test_teachers_without_class_token(kind: str) -> None:
    pooling = "avg" if kind == "columns" else "map"
    teacher = small_teacher(class_token=False, global_pool=pooling, reg_tokens=0)
    learner, guides = parts(
        SMALL, teacher, decoder=DecoderConfig(width=16, depth=1, heads=2), projection=None
    )
    macs = check_against_torch(learner, guides, STAGE_TWO, 18, (32, 48))
    assert macs["mask"] > 0


def test_teacher_with_another_grid() -> None:
    """Resampled features: the last block finishes every token."""
    learner, guides = parts(
        SMALL, small_teacher(img_size=(96, 96)), projection=torch.randn(20, 48),
        teacher_config=TeacherConfig(grid_align="resample"), decoder=DecoderConfig(width=16, depth=1, heads=2),
    )  # fmt: skip
    check_against_torch(learner, guides, STAGE_TWO, 18, (32, 48))


def test_vit_b_at_224_equals_torchs_counter() -> None:
    """The paper's own widths and token counts; two blocks each, since depth only multiplies."""
    clip = VisionTransformer(num_classes=0, pre_norm=True, act_layer=QuickGELU, depth=2)
    learner, guides = parts(
        StudentConfig(depth=2),
        clip,
        projection=torch.randn(512, 768),
        decoder=DecoderConfig(depth=2),
    )
    check_against_torch(learner, guides, STAGE_TWO, 147, (224, 224))
