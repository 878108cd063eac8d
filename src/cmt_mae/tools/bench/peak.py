"""What a device can reach: its data sheet, or large matrix products."""

import time
from typing import Any

import torch

# Dense FLOP/s of tensor cores by the makers' data sheets, bf16; fp32 goes through TF32 only if asked for.
KNOWN_BF16 = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "GH200": 989e12,
    "B200": 2250e12, "A100": 312e12, "A10G": 70e12, "L40S": 362e12, "L4": 121e12,
    "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip


def synchronise(device: torch.device) -> None:
    """Wait for the GPU; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_flops(device: torch.device, precision: str, how: str = "auto") -> dict[str, Any]:
    """FLOP/s that this device can reach: of the data sheet for known GPUs in bf16, else measured.

    how: auto | measured. Measured is the best of several large matrix products in the same precision and with
    the same threads; real steps cannot be faster, since they are made of smaller ones.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    if how == "auto" and precision == "bf16":
        for known in sorted(KNOWN_BF16, key=len, reverse=True):
            if known in name:
                return {"flops": KNOWN_BF16[known], "how": f"data sheet of {known}, dense bf16"}
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    size, tries = (8192, 20) if device.type == "cuda" else (1536, 4)
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    best = 0.0
    for _ in range(tries + 1):
        synchronise(device)
        begin = time.perf_counter()
        a @ b
        synchronise(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - begin))
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} thread(s)"
    return {
        "flops": best,
        "how": f"measured: best of {tries + 1} products {size} x {size}, {precision}{threads}",
    }
