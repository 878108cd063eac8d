"""Mask rules of the relatives: BEiT, SimMIM, AttMask, MILAN, HPM. Pure functions as in masking.py."""

import torch
from torch import Tensor


def priority_of(
    rule: str,
    n_mask: int,
    noise: Tensor,
    grid: tuple[int, int],
    scores: Tensor | None,
    drawn: Tensor | None,
    *,
    hint_share: float,
    guided_share: float,
    square_side: int,
) -> Tensor:
    """Priorities (B, L) by one of these rules, whose highest are hidden; arguments as ``sample_mask``.

    drawn (B, L): the scores with noise, whose order is drawing by attention (``masking.perturbed``).
    """
    n_patches = grid[0] * grid[1]
    uniform, second = noise[:, :n_patches], noise[:, n_patches : 2 * n_patches]
    if rule == "block":
        return block_priority(noise[:, 2 * n_patches :], grid, uniform)
    if rule == "square":
        return square_priority(uniform, second, grid, square_side)
    assert scores is not None
    assert drawn is not None
    if rule == "high":
        return scores
    if rule == "low":
        return -scores
    if rule == "hint":
        return hint_priority(scores, uniform, n_mask, hint_share)
    if rule == "sampled_visible":
        return -drawn
    return mixed_priority(drawn, second, n_mask, guided_share)


def hint_priority(scores: Tensor, uniform: Tensor, n_mask: int, share: float) -> Tensor:
    """AttMask-Hint: the most attended patches are hidden but a few of the very top are revealed.

    r = int(share * n_mask) random ones of the top int(share * L) are shown; the next r in line are hidden
    instead, so the count stays (spec 2.3: 14 of the top 19 at 147 of 196).
    """
    n_patches = scores.shape[1]
    top, revealed = int(share * n_patches), int(share * n_mask)
    rank = scores.argsort(dim=1, descending=True, stable=True).argsort(1)
    draw = uniform.masked_fill(rank >= top, -1.0)
    shown = draw.argsort(dim=1, descending=True, stable=True)[
        :, : min(revealed, top, n_patches - n_mask)
    ]
    return (-rank.float()).scatter(1, shown, -float(2 * n_patches))


def mixed_priority(guided: Tensor, uniform: Tensor, n_mask: int, share: float) -> Tensor:
    """The first int(share * n_mask) hidden patches by attention, the rest at random (HPM's ramp)."""
    n_guided = int(share * n_mask)
    rank = guided.argsort(dim=1, descending=True, stable=True).argsort(1)
    return torch.where(rank < n_guided, 2.0, uniform)


def square_priority(uniform: Tensor, second: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """SimMIM: squares of side x side patches are hidden whole; the last one is cut to the exact count."""
    rows, columns = grid
    cell_rows, cell_columns = -(-rows // side), -(-columns // side)
    cells = uniform[:, : cell_rows * cell_columns].reshape(-1, cell_rows, cell_columns)
    order = cells.flatten(1).argsort(1).argsort(1).reshape_as(cells).to(second.dtype)
    spread = order.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, :rows, :columns]
    return spread.flatten(1) + second


def block_priority(numbers: Tensor, grid: tuple[int, int], uniform: Tensor) -> Tensor:
    """BEiT's block-wise rule, on the device and with an exact count.

    Rectangles are drawn one after another (area 16 patches up to 40 % of the grid, aspect 0.3 to 1/0.3) and
    hidden in this order; the one that passes the count is hidden in part, at random. (BEiT instead skips a
    rectangle that would pass it.) numbers: (B, 5 * rectangles) uniform.
    """
    rows, columns = grid
    area_u, aspect_u, top_u, left_u, _ = numbers.unflatten(1, (5, -1)).unbind(1)
    count = area_u.shape[1]
    largest = max(1.0, 0.4 * rows * columns)
    smallest = min(16.0, largest)
    area = smallest + area_u * (largest - smallest)
    log_aspect = torch.log(torch.tensor(1 / 0.3)).item()
    aspect = torch.exp((2 * aspect_u - 1) * log_aspect)
    height = (area * aspect).sqrt().round().clamp(1, rows)
    width = (area / aspect).sqrt().round().clamp(1, columns)
    top = (top_u * (rows - height + 1)).floor()
    left = (left_u * (columns - width + 1)).floor()
    row = torch.arange(rows, device=numbers.device)[None, None, :, None]
    column = torch.arange(columns, device=numbers.device)[None, None, None, :]
    inside = (
        (row >= top[..., None, None])
        & (row < (top + height)[..., None, None])
        & (column >= left[..., None, None])
        & (column < (left + width)[..., None, None])
    ).flatten(2)
    drawn = torch.arange(count, device=numbers.device)[None, :, None].expand_as(inside)
    first = torch.where(inside, drawn, count).amin(1)
    return -first.to(uniform.dtype) + uniform
