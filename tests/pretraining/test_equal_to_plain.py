"""A whole run through the loop, both stages, equals the paper's equations written down plainly, in float64.

The plain side is timm's networks run in full, with an explicit softmax, every token and a plain optimizer; it
shares with ours the starting weights, the images and their uniform numbers, and nothing of its code.
"""

import copy
import math
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from cmt_mae.core.checkpoint import load_last
from cmt_mae.core.runs import RunDir, plain
from cmt_mae.engine.fit import fit
from cmt_mae.engine.processes import make_accelerator
from cmt_mae.method.teacher import Teacher
from cmt_mae.pretraining.assembly import build_frozen_networks, build_learner, crop_settings
from cmt_mae.pretraining.plan import make_plan
from cmt_mae.pretraining.task import Images, Pretraining
from tiny import Make

STUDENT = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
TEACHER = ((0.25, 0.5, 0.375), (0.5, 0.25, 0.25))
HIDDEN, ALPHA, START_M, LR, STEPS = 12, 0.3, 0.5, 0.03 * 8 / 256, 10  # of 16 patches; 5 steps a stage


def shaken(model: VisionTransformer) -> VisionTransformer:
    """With weights whose attention differs from patch to patch."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def look(vit: VisionTransformer, images: Tensor) -> tuple[Tensor, Tensor]:
    """The class token's attention to patches in the last block, mean of the heads (B, L); features (B, L, D)."""
    block: Any = vit.blocks[-1]
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
    for one in vit.blocks[:-1]:
        x = one(x)
    batch, count, width = x.shape
    qkv = block.attn.qkv(block.norm1(x)).reshape(batch, count, 3, block.attn.num_heads, -1)
    query, key, _ = qkv.permute(2, 0, 3, 1, 4)
    rows = (query @ key.transpose(-2, -1) / math.sqrt(width // block.attn.num_heads)).softmax(-1)
    return rows[:, :, 0, 1:].mean(1), vit.norm(block(x))[:, 1:]


class PlainCMT(nn.Module):
    """Student, decoder and two heads: every token through everything."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.student = VisionTransformer(
            img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=0
        )
        self.decoder = nn.Module()
        self.decoder.embed = nn.Linear(16, 16)
        self.decoder.mask_token = nn.Parameter(torch.zeros(1, 1, 16))
        self.decoder.pos_embed = nn.Parameter(torch.zeros(1, 17, 16))
        self.decoder.blocks = nn.ModuleList([Block(16, 2, qkv_bias=True)])
        self.decoder.norm = nn.LayerNorm(16, eps=1e-6)
        self.heads = nn.ModuleDict({"teacher": nn.Linear(16, 24), "momentum": nn.Linear(16, 16)})
        self.double().load_state_dict(state)
        self.student.pos_embed.requires_grad_(False)
        self.decoder.pos_embed.requires_grad_(False)

    def forward(self, images: Tensor, hidden: Tensor) -> Tensor:
        """Decoder tokens of the hidden patches, (B, M, 16). hidden (B, L) bool."""
        vit, decoder, batch = self.student, self.decoder, len(images)
        patches = vit.patch_embed(images) + vit.pos_embed[:, 1:]
        visible = patches[~hidden].reshape(batch, -1, 16)
        first = (vit.cls_token + vit.pos_embed[:, :1]).expand(batch, -1, -1)
        latents = decoder.embed(vit.norm(vit.blocks(torch.cat([first, visible], 1))))
        tokens = decoder.mask_token.repeat(batch, 16, 1)
        tokens[~hidden] = latents[:, 1:].reshape(-1, 16)
        tokens = torch.cat([latents[:, :1], tokens], 1) + decoder.pos_embed
        tokens = decoder.norm(decoder.blocks[0](tokens))[:, 1:]
        return tokens[hidden].reshape(batch, HIDDEN, 16)


def plain_steps(learner: PlainCMT, teacher: VisionTransformer, batches: Any) -> VisionTransformer:
    """Train ``learner`` for both stages; returns the momentum student."""
    decayed = [p for n, p in learner.named_parameters() if p.ndim > 1 and p.requires_grad]
    others = [p for n, p in learner.named_parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95))
    momentum = copy.deepcopy(learner.student)
    for step in range(STEPS):
        batch, epoch, two = next(batches), step / 5, step >= 5
        if step == 5:
            momentum = copy.deepcopy(learner.student)
        images = torch.where(batch["flip"][:, None, None, None], batch["images"].flip(-1), batch["images"])
        images = ((images.float() / 255).double() - 0.5) / 0.25
        pixels = images * 0.25 + 0.5
        mean, std = (torch.tensor(part).double().view(1, 3, 1, 1) for part in TEACHER)
        with torch.no_grad():
            a_t, f_t = look(teacher, (pixels - mean) / std)
            a_s, f_s = look(momentum, images)
            a_t, a_s = (a / a.sum(1, keepdim=True) for a in (a_t, a_s))
            guide = ALPHA * a_s + (1 - ALPHA) * a_t if two else a_t  # eq. 3
            uniform = batch["noise"][:, :16].double()
            priority = guide.log() - (-uniform.log()).log()  # drawn without replacement in proportion to it
            order = priority.argsort(1, descending=True)
            hidden = torch.zeros(len(images), 16, dtype=torch.bool).scatter_(1, order[:, :HIDDEN], True)
        tokens = learner(images, hidden)

        def distance(name: str, features: Tensor, tokens: Tensor = tokens, hidden: Tensor = hidden) -> Tensor:
            target = F.layer_norm(features, features.shape[-1:])[hidden].reshape(len(tokens), HIDDEN, -1)
            return (learner.heads[name](tokens) - target).square().mean()  # eq. 2

        loss = distance("teacher", f_t)
        if two:
            loss = ALPHA * distance("momentum", f_s) + (1 - ALPHA) * loss  # eq. 4
        rate = LR * epoch / 0.5 if epoch < 0.5 else LR * (1 + math.cos(math.pi * (epoch - 0.5) / 1.5)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if two:
            m = 1 - (1 - START_M) * (1 + math.cos(math.pi * (step - 5) / 5)) / 2
            with torch.no_grad():
                for slow, fast in zip(momentum.parameters(), learner.student.parameters(), strict=True):
                    slow.copy_(m * slow + (1 - m) * fast)
    return momentum


def test_ten_steps_through_the_switch_are_the_papers_equations(make: Make) -> None:
    config = make(alpha=ALPHA, momentum__start=START_M, teacher__feature="tokens", decoder__depth=1)
    config.data.mean, config.data.std = map(list, STUDENT)
    config.check()
    torch.manual_seed(1)
    vit = shaken(
        VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=0)
    ).double()
    # in float64 before its normalisation is folded into its weights, which rounds
    teacher = Teacher(
        copy.deepcopy(vit), config.teacher, mean=TEACHER[0], std=TEACHER[1], student_mean=STUDENT[0],
        student_std=STUDENT[1], grid=(4, 4),
    )  # fmt: skip
    source = config.data.open_train()
    learner = build_learner(config, teacher)
    shaken(learner.student)
    accelerator = make_accelerator("cpu", "fp32")
    images, plan = Images(source, crop_settings(config, teacher)), make_plan(config, len(source), 1)
    frozen = build_frozen_networks(config, teacher, STUDENT).double()
    task = Pretraining(config, accelerator, plan, learner.double(), frozen, images=images, stats=STUDENT)
    ours = PlainCMT({name: tensor.clone() for name, tensor in learner.state_dict().items()})
    momentum = plain_steps(ours, vit.eval(), task.batches(0))
    run = RunDir(config.out, plain(config), (), writes=True)
    fit(config.runtime, task, accelerator, run, task.facts(0))
    run.close()
    state = load_last(Path(config.out) / "checkpoints")
    assert state is not None
    assert state["step"] == STEPS
    for name, wanted in ours.state_dict().items():
        torch.testing.assert_close(state["learner"][name], wanted, rtol=0, atol=1e-10, msg=name)
    for name, wanted in momentum.state_dict().items():
        torch.testing.assert_close(state["momentum"][name], wanted, rtol=0, atol=1e-10, msg=name)
