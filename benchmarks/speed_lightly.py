"""lightly's MAE, trained as its documentation does (examples: MAE), for the comparison of steps.

It is no dependency of this project. To compare with it:

    pip install --no-deps --target DIR lightly lightly_utils
    PYTHONPATH=DIR python -m benchmarks.side_by_side --parts mae
"""

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn

from cmt_mae.pretraining.settings import PretrainConfig


def why_not() -> str:
    """Why lightly cannot be compared here; "" where it can."""
    if importlib.util.find_spec("lightly") is None:
        return "not installed on the machine of this measurement"
    try:
        import lightly.models.modules  # noqa: F401
    except Exception as error:  # whatever of its own dependencies is missing
        return f"cannot be imported ({error})"
    return ""


def lightly_step(config: PretrainConfig, images: Tensor) -> Callable[[], object]:
    """One optimizer step of lightly's parts at the same shapes. images (B, 3, H, W) normalised."""
    from lightly.models import utils
    from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM

    name, kwargs = config.student.architecture()
    vit: Any = timm.create_model(name, num_classes=0, **kwargs)
    backbone: Any = MaskedVisionTransformerTIMM(vit=vit)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the class of its own example, which it calls deprecated
        decoder: Any = MAEDecoderTIMM(
            num_patches=vit.patch_embed.num_patches, patch_size=config.student.patch_size,
            embed_dim=vit.embed_dim, decoder_embed_dim=config.decoder.width,
            decoder_depth=config.decoder.depth, decoder_num_heads=config.decoder.heads, mlp_ratio=4.0,
        )  # fmt: skip
    model = nn.ModuleList([backbone, decoder]).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    length, batch = backbone.sequence_length, len(images)

    def step() -> None:
        keep, hidden = utils.random_token_mask((batch, length), mask_ratio=config.mask.ratio)
        visible = decoder.embed(backbone.encode(images=images, idx_keep=keep))
        tokens = utils.repeat_token(decoder.mask_token, (batch, length))
        tokens = utils.set_at_index(tokens, keep, visible.type_as(tokens))
        predicted = decoder.predict(utils.get_at_index(decoder.decode(tokens), hidden))
        patches = utils.patchify(images, config.student.patch_size)
        target = utils.get_at_index(patches, hidden - 1)  # its places count the class token
        loss = nn.functional.mse_loss(predicted, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step
