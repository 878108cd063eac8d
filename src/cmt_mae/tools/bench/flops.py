"""Multiplications of a step, counted by torch on the step itself without computing it.

Counted are matrix products, 2 FLOP for each multiply-accumulate (MAC), as everywhere in the field: norms,
activations, softmax, the optimizer and the moving average are left out.
"""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cmt_mae.method.cmtmae import Alphas, StudentWithDecoder
from cmt_mae.method.frozen import FrozenNetworks
from cmt_mae.method.masking import noise_length
from cmt_mae.method.vit import grid_of


def flop_per_image(
    learner: StudentWithDecoder, frozen: FrozenNetworks, alphas: Alphas, n_mask: int
) -> dict[str, int]:
    """FLOP of one image: ``forward`` of all networks, and ``backward``.

    learner, frozen: as a run has them; nothing in them changes. Where the momentum student takes part and is not
    there yet, the student is counted in its place. alphas: of Eqs. 3 and 4, which tell the stage. n_mask: hidden
    patches.
    """
    student, momentum = learner.student, frozen.momentum
    device, (rows, columns) = next(student.parameters()).device, grid_of(student)
    pixels = (student.patch_embed.proj.in_channels, *student.patch_embed.img_size)
    # tensors without numbers; attention multiplied out, as torch does not count every fused kernel
    shapes = FakeTensorMode(allow_non_fake_inputs=True)
    counter = FlopCounterMode(display=False)
    if alphas.mask or alphas.loss:
        frozen.momentum = momentum or student
    try:
        with shapes, sdpa_kernel(SDPBackend.MATH), counter:
            images = torch.empty(1, *pixels, device=device)
            noise = torch.empty(1, noise_length(frozen.mask.rule, rows * columns), device=device)
            mask, targets, _ = frozen(images, noise, n_mask, alphas)
            loss, _ = learner(images, mask, targets, alphas.loss)
            forward = counter.get_total_flops()
            learnt = [p for p in learner.parameters() if p.requires_grad]
            torch.autograd.grad(loss, learnt, allow_unused=True)
    finally:
        frozen.momentum = momentum
    return {"forward": forward, "backward": counter.get_total_flops() - forward}
