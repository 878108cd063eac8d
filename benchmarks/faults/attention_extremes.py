"""The class token's row at extreme activations against torch's SDPA in fp64; prints one line of JSON."""

import json
import math
import sys
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from cmt_mae.method.attention import attention_map, class_rows
from cmt_mae.method.last_block import finish
from cmt_mae.method.targets import distance, normalise_target
from cmt_mae.method.vit import LastBlockInput, forward_to_last

SHAPE: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 3,
    "num_classes": 0,
}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "registers": {"reg_tokens": 4, "no_embed_class": True},
    "qk norm": {"qk_norm": True},
}
EPS32 = 2.0**-24


def exact_rows(model: VisionTransformer, state: LastBlockInput) -> tuple[Tensor, Tensor]:
    """(rows (B, heads, N), largest |logit|) of the class token: SDPA in fp64 with the identity as values.

    Queries and keys are timm's, made as the network runs (to be called under the same autocast).
    """
    attn: Any = model.blocks[-1].attn
    made = attn.qkv(model.blocks[-1].norm1(state.tokens))
    query, key, _ = (
        part.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for part in made.chunk(3, dim=-1)
    )
    query, key = attn.q_norm(query).double(), attn.k_norm(key).double()
    with torch.autocast("cpu", enabled=False):
        values = torch.eye(key.shape[2], dtype=torch.float64).expand(*key.shape[:2], -1, -1)
        rows = F.scaled_dot_product_attention(query[:, :, :1], key, values)[:, :, 0]
        logits = (query[:, :, :1] @ key.transpose(-2, -1)) * float(attn.scale)
    return rows, logits.abs().amax()


def one_row(
    kind: str, weights: float, images: float, bf16: bool, seed: int
) -> tuple[float, float, bool]:
    """(largest difference, largest |logit|, whether all is finite), weights and pixels scaled."""
    torch.manual_seed(seed)
    model = VisionTransformer(**SHAPE, **KINDS[kind]).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.mul_(weights)
            block.norm1.weight.add_(torch.randn(48))
    x = images * torch.randn(2, 3, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        state = forward_to_last(model, x)
        ours = class_rows(model, state)
        raw, mass = attention_map(model, state)
        out = finish(model, state)
        exact, largest = exact_rows(model, state)
    finite = all(bool(torch.isfinite(t).all()) for t in (ours, raw, mass, out))
    return (ours.double() - exact).abs().max().item(), largest.item(), finite


def tolerance(largest_logit: float) -> float:
    """Of a softmax whose fp32 logits, sums of 16 products, are off by their rounding: at most 1."""
    return min(1.0, 2e-6 + 2 * (math.expm1(min(50.0, 40 * EPS32 * largest_logit))))


def main(quick: bool) -> None:
    """Scales of weights and pixels by powers of ten, fp32 and bf16."""
    failures: list[str] = []
    trials, worst, largest_seen = 0, 0.0, 0.0
    weights = (1.0, 1e3) if quick else tuple(10.0**k for k in range(9))
    pixels = (1.0, 1e4) if quick else (1e-6, 1.0, 1e2, 1e4, 1e8)
    for kind in KINDS:
        for w in weights:
            for scale in pixels:
                for bf16 in (False, True):
                    off, largest, finite = one_row(kind, w, scale, bf16, seed=trials)
                    case = (
                        f"{kind}, weights x {w:g}, pixels x {scale:g}, {'bf16' if bf16 else 'fp32'}"
                    )
                    if not finite:
                        failures.append(f"{case}: not finite (largest logit {largest:.2g})")
                    elif off > tolerance(largest):
                        failures.append(f"{case}: off by {off:.2g} at largest logit {largest:.2g}")
                    if largest < 100:
                        worst = max(worst, off)
                    largest_seen, trials = max(largest_seen, largest), trials + 1
    trials += targets_and_loss(failures)
    figures = {
        "attention rows at extreme activations": trials,
        "largest |logit| among them": f"{largest_seen:.3g}",
        "largest difference from SDPA in fp64 where |logit| < 100": f"{worst:.2g}",
    }
    print(json.dumps({"failures": failures, "trials": trials, "figures": figures}))


def targets_and_loss(failures: list[str]) -> int:
    """Targets and losses of features up to 1e15 in bf16: normalised in fp32, finite, gradient finite."""
    count = 0
    for norm in ("layer_norm", "l2", "mae"):
        for scale in (0.0, 1e-30, 1e-6, 1.0, 1e6, 1e15):
            features = (scale * torch.randn(2, 5, 16)).bfloat16()
            prediction = torch.randn(2, 5, 16, dtype=torch.bfloat16, requires_grad=True)
            loss = distance(prediction, normalise_target(features, norm), norm=norm)
            loss.backward()
            assert prediction.grad is not None
            if not (torch.isfinite(loss) and torch.isfinite(prediction.grad).all()):
                failures.append(f"target {norm} of features x {scale:g}: loss {loss.item()}")
            count += 1
    return count


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:] == ["1"])
