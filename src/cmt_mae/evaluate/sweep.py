"""The linear probes that the field quotes (specification 6.1, 6.2): heads trained side by side in one pass.

The heads share each batch and its BatchNorm (which has no parameters), and those on the same
feature share one matrix product. Nothing else connects them: each ends as it would alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmt_mae.core.errors import InputError
from cmt_mae.engine.optim import learning_rate
from cmt_mae.evaluate.lars import LARS

if TYPE_CHECKING:
    from cmt_mae.evaluate.features import Features

ProtocolName = Literal["logistic", "mae", "milan", "dino", "ibot", "sweep"]
Step = tuple[dict[str, Tensor], Tensor]  # features (B, D) by pool, labels (B,)


@dataclass(frozen=True)
class Head:
    """One linear classifier and how it is trained."""

    pool: str
    """The feature it reads."""
    blr: float
    """Learning rate at a batch of 256 images."""
    weight_decay: float = 0.0
    """Added to the gradient (not with LARS for the bias)."""
    norm: bool = True
    """BatchNorm1d(affine=False, eps=1e-6) before the linear layer."""


@dataclass(frozen=True)
class Training:
    """What all heads of one evaluation share."""

    optimizer: Literal["lars", "sgd"]
    """Both with momentum 0.9."""
    epochs: int
    """Passes over the training features."""
    batch_size: int
    """Images in a step. The learning rate is blr * batch_size / 256."""
    warmup_epochs: float = 0.0
    """Linear rise of the learning rate from 0."""
    lr_by: Literal["step", "epoch"] = "step"
    """Whether the schedule moves at every step (MAE) or stands still in an epoch (DINO)."""
    init: Literal["trunc_normal", "normal"] = "trunc_normal"
    """Distribution of the first weights, standard deviation 0.01; biases start at 0."""


class Heads(nn.Module):
    """A set of linear heads. Logits are (B, heads, classes)."""

    def __init__(
        self, heads: list[Head], dims: dict[str, int], classes: int, init: str, seed: int
    ) -> None:
        """Make the heads; those on one pool start from equal weights, drawn from ``seed``."""
        super().__init__()
        self.groups: dict[tuple[str, bool], list[int]] = {}
        for i, head in enumerate(heads):
            self.groups.setdefault((head.pool, head.norm), []).append(i)
        members = [i for group in self.groups.values() for i in group]
        self.place = torch.tensor(members).argsort() if members != sorted(members) else None
        # the running mean and variance depend on the data alone, so one a pool serves all
        pools = sorted({head.pool for head in heads if head.norm})
        self.norms = nn.ModuleList(
            nn.BatchNorm1d(dims[pool], affine=False, eps=1e-6) for pool in pools
        )
        self.norm_of = dict(zip(pools, self.norms, strict=True))
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for head in heads:
            generator = torch.Generator().manual_seed(seed)
            weight = torch.empty(classes, dims[head.pool])
            if init == "trunc_normal":
                nn.init.trunc_normal_(weight, std=0.01, generator=generator)
            else:
                nn.init.normal_(weight, std=0.01, generator=generator)
            self.weights.append(nn.Parameter(weight))
            self.biases.append(nn.Parameter(torch.zeros(classes)))

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        """(B, D) features by pool -> (B, heads, classes)."""
        normed = {pool: norm(x[pool]) for pool, norm in self.norm_of.items()}
        products = []
        for (pool, norm), members in self.groups.items():
            weight = torch.cat([self.weights[i] for i in members])
            bias = torch.cat([self.biases[i] for i in members])
            product = F.linear(normed[pool] if norm else x[pool], weight, bias)
            products.append(product.unflatten(1, (len(members), -1)))
        logits = torch.cat(products, 1)
        return (
            logits if self.place is None else logits.index_select(1, self.place.to(logits.device))
        )


def head_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each head: (B, heads, C), (B,) -> (heads,)."""
    batch, heads, classes = logits.shape
    labels = labels[:, None].expand(batch, heads)
    if classes < 64:  # softmax over a short last dimension is five times slower on a CPU
        return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(0)
    every = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return every.view(batch, heads).mean(0)


def train_heads(
    heads: list[Head],
    training: Training,
    steps: Iterable[Step],
    *,
    dims: dict[str, int],
    classes: int,
    steps_per_epoch: int,
    seed: int,
    device: torch.device,
) -> tuple[Heads, list[float]]:
    """Train all heads together on the batches of ``steps``.

    The sum of the losses is minimised: the gradient of a head's own weights is then that of its
    own loss, so no head feels another, even one that diverges.

    Args:
        dims: length of the feature of each pool.

    Returns:
        The heads in evaluation mode, and the mean training loss of each in the last epoch.
    """
    model = Heads(heads, dims, classes, training.init, seed).to(device)
    scale = training.batch_size / 256
    groups: list[dict[str, Any]] = [
        {"params": [w, b], "lr": head.blr * scale, "weight_decay": head.weight_decay}
        for head, w, b in zip(heads, model.weights, model.biases, strict=True)
    ]
    kind = LARS if training.optimizer == "lars" else torch.optim.SGD
    optimizer: torch.optim.Optimizer = kind(groups, lr=0.0, momentum=0.9)
    full = [group["lr"] for group in groups]
    last = torch.zeros(len(heads), device=device)
    model.train()
    for step, (x, labels) in enumerate(steps):
        epoch = step / steps_per_epoch if training.lr_by == "step" else step // steps_per_epoch
        share = learning_rate(epoch, 1.0, training.warmup_epochs, training.epochs)
        for group, lr in zip(optimizer.param_groups, full, strict=True):
            group["lr"] = lr * share
        x = {pool: value.to(device) for pool, value in x.items()}
        losses = head_losses(model(x), labels.to(device))
        optimizer.zero_grad(set_to_none=True)
        losses.sum().backward()
        optimizer.step()
        if step >= (training.epochs - 1) * steps_per_epoch:
            last += losses.detach() / steps_per_epoch
    return model.eval(), last.tolist()


def cached_steps(features: Features, training: Training, seed: int) -> Iterator[Step]:
    """Shuffled batches of fixed features; the rest of an epoch that fills no batch is dropped."""
    generator = torch.Generator().manual_seed(seed)
    n, batch = len(features), training.batch_size
    for _ in range(training.epochs):
        order = torch.randperm(n, generator=generator)
        for rows in order[: n // batch * batch].split(batch):
            yield {pool: v[rows] for pool, v in features.pools.items()}, features.labels[rows]


@torch.no_grad()
def head_accuracy(
    model: Heads, features: Features, device: torch.device, chunk: int = 1024
) -> list[dict[str, float]]:
    """top1 and (with more than 5 classes) top5 of each head, in percent, every image once.

    A head whose weights are not finite has diverged; its guesses count as wrong.
    """
    finite = torch.stack([w.isfinite().all() for w in model.weights]).cpu()
    hits1, hits5, classes = torch.zeros(len(finite)), torch.zeros(len(finite)), 0
    for rows in torch.arange(len(features)).split(chunk):
        logits = model({pool: v[rows].to(device) for pool, v in features.pools.items()})
        classes = logits.shape[-1]
        guess = logits.topk(min(5, classes), dim=-1).indices.cpu()
        hit = guess == features.labels[rows][:, None, None]
        hits1 += hit[..., 0].sum(0) * finite
        hits5 += hit.any(-1).sum(0) * finite
    percent = 100 / len(features)
    table = []
    for top1, top5 in zip(hits1.tolist(), hits5.tolist(), strict=True):
        table.append({"top1": top1 * percent} | ({"top5": top5 * percent} if classes > 5 else {}))
    return table


# With the learning rate tied to the batch, how far a head can move depends on how many images it
# sees: 115 million in MAE's probe on ImageNet, 0.85 million on Imagenette in the same 90 epochs.
# There, on features of DeiT-Tiny's blocks 2, 4 and 12, 90 epochs of LARS ended 4 to 19 points under
# scikit-learn's best logistic regression, 3 million images 0 to 3 points under it.
IMAGES_SEEN = 3_000_000
MOST_EPOCHS = 30_000


@dataclass(frozen=True)
class LinearProtocol:
    """A linear probe. The first entry of each list is its own choice, the default head."""

    training: Training
    pools: tuple[str, ...]
    blrs: tuple[float, ...]
    weight_decays: tuple[float, ...] = (0.0,)
    norms: tuple[bool, ...] = (True,)
    takes_best: bool = False
    """Whether the number to quote is the best head's on the val images."""
    lengthen: bool = True
    """Whether cached features of a small set get more epochs (see IMAGES_SEEN)."""


def published(name: ProtocolName, width: int, has_cls: bool) -> LinearProtocol:
    """The protocol for a ViT of this width; all but logistic, which trains no heads by steps.

    mae: main_linprobe.py and FINETUNE.md (lr 0.1 * batch / 256). milan: its README. Both also train
    the rates that their authors and MILAN use and mean-pooled features; these are reported beside.
    dino, ibot: eval_linear.py, eval_linear_multi.py: class tokens of the last four blocks for small
    ViTs, class token beside mean-pooled patches for ViT-B and larger. sweep: ours.

    Raises:
        InputError: unknown name.
    """
    large = width >= 1024
    mae_pools = ("cls", "mean") if has_cls else ("mean",)
    dino_pool = ("blocks4" if width <= 384 else "cls+mean") if has_cls else "mean"
    dino = Training("sgd", 100, 1024, lr_by="epoch", init="normal")
    if name == "mae":
        training = Training("lars", 50 if large else 90, 16384, warmup_epochs=10)
        return LinearProtocol(training, mae_pools, (0.1, 0.05, 0.02))
    if name == "milan":
        training = Training("lars", 100, 16384, warmup_epochs=10)
        return LinearProtocol(
            training, mae_pools, (0.02, 0.05, 0.1) if large else (0.05, 0.02, 0.1)
        )
    if name == "dino":
        return LinearProtocol(dino, (dino_pool,), (0.001,), norms=(False,))
    if name == "ibot":
        grid = [float(f"{n}e{e}") for e in range(-4, 1) for n in range(1, 10)]
        blrs = (0.001, *(blr for blr in grid if blr != 0.001))  # DINO's rate is the default head
        return LinearProtocol(
            dino, (dino_pool,), blrs, norms=(False,), takes_best=True, lengthen=False
        )
    if name == "sweep":
        return LinearProtocol(
            Training("sgd", 100, 1024, warmup_epochs=10),
            ("cls", "mean", "cls+mean") if has_cls else ("mean",),
            (0.01, 0.001, 0.003, 0.03, 0.1, 0.3),
            weight_decays=(0.0, 0.001),
            norms=(True, False),
            lengthen=False,
        )
    raise InputError(f"unknown protocol {name!r}; use logistic, mae, milan, dino, ibot or sweep")


def make_heads(protocol: LinearProtocol) -> list[Head]:
    """Every combination; the default head is the first."""
    every = itertools.product(protocol.pools, protocol.norms, protocol.blrs, protocol.weight_decays)
    return [Head(pool, blr, wd, norm) for pool, norm, blr, wd in every]


def fit_training(
    protocol: LinearProtocol, n: int, *, epochs: int | None, batch_size: int | None, cached: bool
) -> Training:
    """The protocol's training for ``n`` images, with the user's epochs and batch where given.

    The batch is at most n (the learning rate follows it), the warm-up keeps its share of the
    epochs, and cached features get the epochs that show IMAGES_SEEN images in all.

    Raises:
        InputError: fewer than 2 images a batch, or no epoch.
    """
    given = protocol.training
    batch = min(given.batch_size if batch_size is None else batch_size, n)
    if batch < 2:
        raise InputError(
            f"linear probe: a batch of {batch} ({n} training images); it needs 2 or more"
        )
    if epochs is None:
        epochs = given.epochs
        if cached and protocol.lengthen:
            epochs = max(epochs, min(MOST_EPOCHS, -(-IMAGES_SEEN // n)))
    if epochs < 1:
        raise InputError(f"linear probe: {epochs} epochs; it needs at least 1")
    warmup = given.warmup_epochs * epochs / given.epochs
    return replace(given, epochs=epochs, batch_size=batch, warmup_epochs=warmup)
