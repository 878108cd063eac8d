"""A frozen ViT with random weights in a file: 48 px, patch 12, so its grid is that of a 4 x 4 student."""

from pathlib import Path

import timm
import torch

from cmt_mae.backbones import save_backbone

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def write_teacher(path: Path, heads: int, spread: float = 0.0) -> Path:
    """spread: of what is added to every weight, else its attention is flat."""
    torch.manual_seed(5)
    kwargs = {"img_size": 48, "patch_size": 12, "embed_dim": 24, "depth": 2, "num_heads": heads}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **kwargs)
    with torch.no_grad():
        for parameter in model.parameters() if spread else ():
            parameter.add_(spread * torch.randn(parameter.shape))
    save_backbone(
        path, model, architecture="vit_tiny_patch16_224", kwargs=kwargs, mean=IMAGENET[0],
        std=IMAGENET[1], img_size=48, licence="none", source="random weights of a test",
    )  # fmt: skip
    return path
