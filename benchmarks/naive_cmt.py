"""CMT-MAE as one would write it on public parts: the other side of the benchmark.

timm's networks, the forward pass and the loss in the manner of MAE's published code, attention maps read by a
hook, `copy.deepcopy` for the momentum student, `torch.multinomial` for the mask, fused AdamW. Nothing here is
slow on purpose, nothing is clever: frozen networks run without gradient and in eval mode, every network runs
once a step, and attention stays fused where no map is needed.
"""

import copy
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from cmt_mae.method.vit import sincos_table

Materialise = Literal["last", "all"]


class NaiveCMT(nn.Module):
    """Student, decoder, frozen teacher and momentum student.

    materialise: in which blocks of teacher and momentum student the attention map exists as a matrix.
    ``last``: only where it is read. ``all``: in every block, as `output_attentions=True` of Hugging Face does.
    """

    def __init__(
        self,
        student: VisionTransformer,
        teacher: VisionTransformer,
        projection: Tensor | None,
        *,
        images: tuple[tuple[float, ...], tuple[float, ...]],
        teacher_images: tuple[tuple[float, ...], tuple[float, ...]],
        decoder: tuple[int, int, int] = (512, 8, 16),
        mask_ratio: float = 0.75,
        alpha: float = 0.3,
        materialise: Materialise = "last",
    ) -> None:
        """images, teacher_images: mean and std with which each network's input is normalised.

        projection: (E, D) behind the teacher's final norm, or None. decoder: width, depth, heads.
        """
        super().__init__()
        # Any: timm does not declare the types of its parts
        self.encoder: Any = student
        self.teacher: Any = teacher
        self.momentum: Any = None
        self.projection = projection
        self.alpha, self.mask_ratio, self.materialise = alpha, mask_ratio, materialise
        self.teacher.requires_grad_(False).eval()
        self.maps: dict[str, Tensor] = {}
        self.watch("teacher", self.teacher)

        width, depth, heads = decoder
        grid = student.patch_embed.grid_size
        self.decoder_embed = nn.Linear(student.embed_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(sincos_table(width, grid)[None], requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            [Block(width, heads, qkv_bias=True) for _ in range(depth)]
        )
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        target = teacher.embed_dim if projection is None else projection.shape[0]
        self.head_teacher = nn.Linear(width, target)
        self.head_momentum = nn.Linear(width, student.embed_dim)
        nn.init.normal_(self.mask_token, std=0.02)

        def numbers(values: tuple[float, ...]) -> Tensor:
            return torch.tensor(values).view(1, -1, 1, 1)

        self.mean, self.std = (numbers(v) for v in images)
        self.teacher_mean, self.teacher_std = (numbers(v) for v in teacher_images)

    def start_stage_two(self) -> None:
        """The momentum student begins as a copy of the student."""
        self.momentum = copy.deepcopy(self.encoder).requires_grad_(False).eval()
        self.watch("momentum", self.momentum)

    def watch(self, name: str, model: Any) -> None:
        """Keep the attention map (B, heads, N, N) of the last block at every forward pass."""
        blocks = model.blocks if self.materialise == "all" else model.blocks[-1:]
        for block in blocks:
            block.attn.fused_attn = False

        def keep(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            self.maps[name] = output

        model.blocks[-1].attn.attn_drop.register_forward_hook(keep)

    @torch.no_grad()
    def look(self, name: str, images: Tensor) -> tuple[Tensor, Tensor]:
        """Patch features (B, L, D) after the final norm, and the class token's attention (B, L), sum 1."""
        model = self.teacher if name == "teacher" else self.momentum
        assert model is not None
        features = model.forward_features(images)[:, model.num_prefix_tokens :]
        if name == "teacher" and self.projection is not None:
            features = features @ self.projection.T
        attention = self.maps[name][:, :, 0, model.num_prefix_tokens :].mean(1)
        return features, attention / attention.sum(-1, keepdim=True)

    @torch.no_grad()
    def draw_mask(self, attention: Tensor) -> Tensor:
        """(B, L) bool, True = hidden: attended patches are hidden, drawn without replacement."""
        n_mask = round(attention.shape[1] * self.mask_ratio)
        hidden = torch.multinomial(attention, n_mask)
        return torch.zeros_like(attention, dtype=torch.bool).scatter_(1, hidden, True)

    def forward_encoder(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Latents of class token and visible patches, and the order that puts tokens back in place."""
        x = self.encoder.patch_embed(images) + self.encoder.pos_embed[:, 1:]
        ids_shuffle = mask.int().argsort(dim=1, stable=True)
        ids_restore = ids_shuffle.argsort(dim=1)
        ids_keep = ids_shuffle[:, : int((~mask[0]).sum())]
        x = torch.gather(x, 1, ids_keep[:, :, None].expand(-1, -1, x.shape[-1]))
        cls = (self.encoder.cls_token + self.encoder.pos_embed[:, :1]).expand(len(x), -1, -1)
        return self.encoder.norm(self.encoder.blocks(torch.cat([cls, x], dim=1))), ids_restore

    def forward_decoder(self, latents: Tensor, ids_restore: Tensor) -> Tensor:
        """Tokens (B, L, W) at every patch."""
        x = self.decoder_embed(latents)
        missing = ids_restore.shape[1] + 1 - x.shape[1]
        patches = torch.cat([x[:, 1:], self.mask_token.expand(len(x), missing, -1)], dim=1)
        patches = torch.gather(patches, 1, ids_restore[:, :, None].expand(-1, -1, x.shape[-1]))
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)[:, 1:]

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss (Eq. 2 in stage one, Eq. 4 in stage two). images (B, 3, H, W) normalised for the student.

        mask: (B, L) bool, True = hidden; drawn from the attention (Eq. 3) without it.
        """
        pixels = images * self.std + self.mean
        targets, attention = self.look("teacher", (pixels - self.teacher_mean) / self.teacher_std)
        if self.momentum is not None:
            slow_targets, slow_attention = self.look("momentum", images)
            attention = self.alpha * slow_attention + (1 - self.alpha) * attention
        if mask is None:
            mask = self.draw_mask(attention)
        tokens = self.forward_decoder(*self.forward_encoder(images, mask))
        loss = masked_error(self.head_teacher(tokens), targets, mask)
        if self.momentum is not None:
            slow = masked_error(self.head_momentum(tokens), slow_targets, mask)
            loss = self.alpha * slow + (1 - self.alpha) * loss
        return loss

    @torch.no_grad()
    def update_momentum(self, m: float) -> None:
        """theta_hat <- m theta_hat + (1 - m) theta."""
        assert self.momentum is not None
        for slow, fast in zip(self.momentum.parameters(), self.encoder.parameters(), strict=True):
            slow.mul_(m).add_(fast, alpha=1 - m)


def masked_error(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error to the normalised target, over channels, then over hidden patches."""
    target = F.layer_norm(target, target.shape[-1:])
    error = ((prediction - target) ** 2).mean(dim=-1)
    return (error * mask).sum() / mask.sum()


def make_optimizer(model: NaiveCMT, lr: float = 1.5e-4) -> torch.optim.AdamW:
    """AdamW as MAE sets it: no weight decay for biases and 1-D parameters."""
    learned = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learned if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in learned if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def train_step(
    model: NaiveCMT, optimizer: torch.optim.Optimizer, images: Tensor, m: float = 0.996
) -> Tensor:
    """One step; returns the loss."""
    loss = model(images)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if model.momentum is not None:
        model.update_momentum(m)
    return loss.detach()
