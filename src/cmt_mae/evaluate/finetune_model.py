"""A backbone with a classifier on top, as MAE fine-tunes it (specification 6.3), and its files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import save as to_safetensors
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from cmt_mae.backbones import Backbone
from cmt_mae.backbones.save import same_bytes, save_backbone
from cmt_mae.core.errors import InputError
from cmt_mae.core.files import write_atomically
from cmt_mae.evaluate.finetune_protocols import Pool
from cmt_mae.evaluate.pyramid import trainable_copy

HEAD_STD = 2e-5  # MAE: the first outputs are all but equal


class Classifier(nn.Module):
    """Pooled tokens, norm, linear layer: timm's own network with ``global_pool="avg"`` (or ``"token"``).

    All of it stands below ``backbone.`` under timm's names, the head as ``fc_norm`` and ``head``, so that a
    kind of network which timm itself would not pool that way (distilled, SigLIP's) is trained all the same.
    """

    def __init__(
        self,
        backbone: Backbone,
        classes: int,
        *,
        pool: Pool = "mean",
        drop_path: float = 0.0,
        smoothing: float = 0.0,
        frozen_layers: int | Literal["all"] = 0,
    ) -> None:
        """pool: ``mean`` of the patch tokens before the final norm, then a fresh norm; ``cls``: the class token
        after the pre-trained final norm. frozen_layers: see ``freeze``. Head weights are drawn from torch's
        global generator.

        Raises InputError for a pool without its token and for more frozen layers than there are.
        """
        super().__init__()
        if pool not in ("mean", "cls"):
            raise InputError(f"unknown pool {pool!r}; use mean or cls")
        if pool == "cls" and not backbone.has_cls:
            raise InputError(f"pool 'cls': {backbone.architecture} has no class token; use mean")
        self.pool, self.smoothing, self.prefix = pool, smoothing, backbone.prefix_tokens
        vit = trainable_copy(backbone, drop_path)
        if getattr(vit, "attn_pool", None) is not None:
            vit.attn_pool = None  # SigLIP's pooling would have no part in the loss
        if pool == "mean":
            vit.fc_norm, vit.norm = fresh_norm(vit), nn.Identity()
        elif isinstance(vit.norm, nn.Identity):
            # its norm came after pooling: the same on one token
            vit.norm, vit.fc_norm = vit.fc_norm, nn.Identity()
        vit.head = nn.Linear(vit.embed_dim, classes)
        nn.init.trunc_normal_(vit.head.weight, std=HEAD_STD)
        nn.init.zeros_(vit.head.bias)
        self.backbone = vit
        freeze(vit, frozen_layers)

    def logits(self, images: Tensor) -> Tensor:
        """Normalised images (B, C, H, W) -> (B, classes)."""
        vit: Any = self.backbone
        tokens = vit.forward_features(images)
        pooled = tokens[:, self.prefix :].mean(1) if self.pool == "mean" else tokens[:, 0]
        logits: Tensor = vit.head(vit.fc_norm(pooled))
        return logits

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """batch: ``images`` normalised; ``labels`` (B,) int64, smoothed here, or (B, classes) shares that sum
        to 1, as mixing makes them (smoothed already). Returns the mean cross-entropy as ``loss``.
        """
        labels = batch["labels"]
        smoothing = self.smoothing if labels.ndim == 1 else 0.0
        loss = F.cross_entropy(
            self.logits(batch["images"]).float(), labels, label_smoothing=smoothing
        )
        return {"loss": loss}


def fresh_norm(vit: Any) -> nn.Module:
    """A norm of the kind and epsilon of the network's final one, with weight 1 and bias 0."""
    final = next(n for n in (vit.norm, vit.fc_norm) if not isinstance(n, nn.Identity))
    norm: nn.Module = copy.deepcopy(final)
    for name, parameter in norm.named_parameters():
        parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)
    return norm


def freeze(vit: Any, frozen_layers: int | Literal["all"]) -> None:
    """Stop training of the embeddings and the first so many blocks; stochastic depth is off in them.

    0: nothing is frozen. ``all``: every block and the pre-trained final norm; what stays is linear on top.

    Raises InputError for more layers than there are.
    """
    blocks = list(vit.blocks)
    count = len(blocks) if frozen_layers == "all" else frozen_layers
    if not 0 <= count <= len(blocks):
        raise InputError(f"frozen_layers {count}: the backbone has {len(blocks)} blocks")
    if count == 0:
        return
    last = [vit.fc_norm, vit.head, *blocks[count:]]
    last += [] if frozen_layers == "all" else [vit.norm]
    kept = {id(p) for module in last for p in module.parameters()}
    for parameter in vit.parameters():
        parameter.requires_grad_(id(parameter) in kept)
    for block in blocks[:count]:
        for name in ("drop_path1", "drop_path2"):
            if hasattr(block, name):
                setattr(block, name, nn.Identity())


def timm_kwargs(backbone: Backbone, pool: Pool) -> dict[str, Any]:
    """What ``timm.create_model(architecture, num_classes=..., **kwargs)`` needs for a Classifier's weights."""
    if pool == "cls":
        return {**backbone.kwargs, "global_pool": "token"}
    kind = type(backbone.model).__name__
    norm = {"VisionTransformer": {"fc_norm": True}, "Eva": {"use_fc_norm": True}}.get(kind, {})
    return {**backbone.kwargs, "global_pool": "avg", **norm}


def save_classifier(
    folder: Path, model: Classifier, backbone: Backbone, classes: list[str] | None, source: str
) -> None:
    """Write ``backbone.safetensors`` (any evaluation takes it) and ``classifier.safetensors``.

    The second is for ``timm.create_model(architecture, checkpoint_path=..., num_classes=..., **kwargs)``; its
    header, the entry ``cmt_mae_classifier``, holds those, the class names, mean and std.
    timm builds no distilled network with another pooling: of those nothing is written.
    """
    if isinstance(backbone.model, VisionTransformerDistilled):
        return
    kwargs = timm_kwargs(backbone, model.pool)
    vit: Any = copy.deepcopy(model.backbone).cpu().eval()
    state = {k: v.detach().clone().contiguous() for k, v in vit.state_dict().items()}
    header = {
        "architecture": backbone.architecture,
        "kwargs": {**kwargs, "num_classes": int(vit.head.out_features)},
        "classes": classes,
        "mean": backbone.mean,
        "std": backbone.std,
    }
    metadata = {"format": "pt", "cmt_mae_classifier": json.dumps(header)}
    write_atomically(
        folder / "classifier.safetensors",
        # not save_file, whose own kind of error hides a full disk
        lambda aside: aside.write_bytes(same_bytes(to_safetensors(state, metadata))),
    )
    vit.head = nn.Identity()
    with torch.no_grad():
        save_backbone(
            folder / "backbone.safetensors",
            vit,
            architecture=backbone.architecture,
            kwargs=kwargs,
            mean=backbone.mean,
            std=backbone.std,
            img_size=backbone.img_size,
            licence=backbone.licence,
            source=source,
        )
