"""torch.compile of transformer blocks, and going on without it where this machine has no working compiler."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import nn


def why_not(device: torch.device, backend: str = "inductor") -> str:
    """Compile a tiny block, run it forward and backward; "" where that works, else the reason in one line.

    What is missing (a C++ compiler, Triton, a driver) shows only when something is really compiled.
    """
    block = Block(16, 2).to(device)
    tokens = torch.ones(2, 3, 16, device=device, requires_grad=True)
    try:
        torch.compile(block, dynamic=False, backend=backend)(tokens).sum().backward()
    except Exception as error:  # dynamo, inductor, gcc and Triton raise whatever they like
        text = " ".join(str(error).split())
        return f"{type(error).__name__}: {text[:200]}"
    return ""


def compile_blocks(networks: Iterable[nn.Module | None], backend: str = "inductor") -> int:
    """Compile every block below the networks (their ``blocks``) in place, with static shapes; how many.

    Names of parameters stay as they are, copies are not compiled, and equal blocks share one piece of code.
    """
    count = 0
    modules = (module for one in networks if one is not None for module in one.modules())
    for module in modules:
        blocks: Any = getattr(module, "blocks", None)
        for block in blocks if isinstance(blocks, nn.Sequential | nn.ModuleList) else ():
            if block._compiled_call_impl is None:
                block.compile(dynamic=False, backend=backend)
                count += 1
    return count


def uncompiled() -> AbstractContextManager[None]:
    """Inside, compiled blocks run as written: for other shapes, which would each be compiled once more."""
    made: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return made
