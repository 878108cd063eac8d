"""Names of every published kind of ViT file, brought to timm's."""

from __future__ import annotations

import timm
from torch import Tensor

from cmt_mae.backbones.backbone import IMAGENET_MEAN, IMAGENET_STD
from cmt_mae.backbones.build import Weights, infer_vit
from cmt_mae.backbones.container import Container, choose
from cmt_mae.errors import InputError


def read_foreign(
    container: Container, key: str | None, img_size: tuple[int, int] | None
) -> Weights:
    state = choose(container, key, ("model", "state_dict"))
    where = str(container.path)
    dropped = [k for k in state if k.startswith(("head.", "head_dist.", "pre_logits."))]
    state = {k: v for k, v in state.items() if k not in dropped}
    architecture, kwargs = infer_vit(state, where)
    mean, std, licence = IMAGENET_MEAN, IMAGENET_STD, None
    name = container.path.stem
    if timm.is_model(name):
        cfg = timm.get_pretrained_cfg(name)
        mean, std, licence = cfg.mean, cfg.std, cfg.license
        architecture, kwargs = name.split(".")[0], {"img_size": kwargs["img_size"]}
    return Weights(state, architecture, kwargs, mean, std, f"{where} (timm names)", licence, dropped=dropped)
