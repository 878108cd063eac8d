"""k-NN accuracy while a run goes on."""

from collections.abc import Sequence
from dataclasses import dataclass

from accelerate import Accelerator

from cmt_mae.backbones import Backbone
from cmt_mae.data.source import Source
from cmt_mae.evaluate.features import extract, open_labelled
from cmt_mae.evaluate.knn import knn_accuracy

POOL, NEIGHBOURS = "mean", 20


@dataclass
class OnlineProbe:
    """A labelled data set, opened once."""

    train: Source
    val: Source

    @staticmethod
    def open(
        path: str, limits: Sequence[float] = (), val_share: float = 0.0
    ) -> "OnlineProbe | None":
        """None for an empty path. limits, val_share: see `open_split`. Raises InputError for data without train,
        val or labels."""
        return OnlineProbe(*open_labelled(path, limits, val_share)) if path else None

    def measure(self, backbone: Backbone, accelerator: Accelerator) -> float:
        """Top-1 in percent of k-NN (k 20, T 0.07) on mean-pooled patch tokens."""
        train, val = (
            extract(
                backbone, source, device=accelerator.device, pools=(POOL,),
                rank=accelerator.process_index, world=accelerator.num_processes,
            )
            for source in (self.train, self.val)
        )  # fmt: skip
        k = min(NEIGHBOURS, len(train))
        return knn_accuracy(train, val, k=(k,))[f"{POOL}/k{k}/top1"]
