"""How often a classifier is right: every validation image once over all processes."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from cmt_mae.backbones import Backbone
from cmt_mae.data.centre import eval_batches
from cmt_mae.data.source import Source
from cmt_mae.evaluate.features import Where, gather_rows, normalise
from cmt_mae.evaluate.finetune_model import Classifier
from cmt_mae.evaluate.finetune_protocols import eval_crop


@torch.no_grad()
def predict(
    model: Classifier,
    source: Source,
    backbone: Backbone,
    accelerator: Accelerator,
    *,
    batch_size: int,
    workers: int,
    timeout_s: float,
) -> tuple[Tensor, Tensor]:
    """Classes of every image, the likeliest five first, (N, at most 5), and labels (N,), both int64 on the CPU.

    Each process forwards its share of the centre crops; all of them return everything, each image once, in the
    order of ``source``.
    """
    where = Where(accelerator.device, accelerator.process_index, accelerator.num_processes)
    deep = min(5, model.backbone.head.out_features)
    rows = [torch.empty((0, 2 + deep), dtype=torch.int64)]
    batches = eval_batches(
        source,
        size=backbone.img_size,
        channels=len(backbone.mean),
        batch_size=batch_size,
        resize_ratio=eval_crop(backbone.img_size)[0],
        rank=where.rank,
        world=where.world,
        workers=workers,
        timeout_s=timeout_s,
    )
    for images, labels, index in batches:
        with accelerator.autocast():
            logits = model.logits(normalise(images.to(where.device), backbone))
        # stable: among equal values the lower class, on any device
        best = logits.float().sort(dim=1, descending=True, stable=True).indices[:, :deep].cpu()
        rows.append(torch.cat([index[:, None], labels[:, None], best], 1))
    found = gather_rows(torch.cat(rows), where)
    found = found[found[:, 0].argsort()]
    if not torch.equal(found[:, 0], torch.arange(len(source))):
        raise RuntimeError(f"{len(found)} predictions for {len(source)} images")
    return found[:, 2:], found[:, 1]


def accuracy(best: Tensor, labels: Tensor, classes: int) -> tuple[dict[str, float], Tensor]:
    """(metrics in percent, confusion matrix (classes, classes) int64: rows are the truth).

    best: (N, at most 5) classes, the likeliest first. ``top5`` only with more than 5 classes. ``class_mean`` is
    the mean over the classes that have images of each one's accuracy.
    """
    hit = best == labels[:, None]
    confusion = torch.bincount(labels * classes + best[:, 0], minlength=classes**2)
    confusion = confusion.reshape(classes, classes)
    count = confusion.sum(1)
    each = confusion.diagonal()[count > 0].double() / count[count > 0]
    metrics = {"top1": 100 * hit[:, 0].double().mean().item()}
    if classes > 5:
        metrics["top5"] = 100 * hit.any(1).double().mean().item()
    metrics["class_mean"] = 100 * each.mean().item()
    return metrics, confusion


def class_facts(confusion: Tensor, names: list[str]) -> dict[str, Any]:
    """``Result.details``: accuracy of each class and the confusion matrix without its zeros.

    ``scipy.sparse.coo_matrix((count, (truth, prediction)))`` makes it whole again.
    """
    truth, prediction = confusion.nonzero().unbind(1)
    count = confusion.sum(1).tolist()
    right = confusion.diagonal().tolist()
    return {
        "classes": [
            {"name": name, "images": n, "top1": 100 * r / n if n else None}
            for name, n, r in zip(names, count, right, strict=True)
        ],
        "confusion": {
            "truth": truth.tolist(),
            "prediction": prediction.tolist(),
            "count": confusion[truth, prediction].tolist(),
        },
    }
