"""Put the student of a run of the recipe ``embedded_teacher`` into the package, in half precision.

python -m benchmarks.embed_teacher --run runs/embedded
"""

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.timing import RESULTS
from cmt_mae.backbones import load_backbone
from cmt_mae.backbones.save import save_backbone
from cmt_mae.core.files import write_json
from cmt_mae.core.runs import environment
from cmt_mae.evaluate.knn import KnnConfig, evaluate_knn
from cmt_mae.evaluate.linear import LinearConfig, evaluate_linear

TARGET = Path(__file__).parents[1] / "src" / "cmt_mae" / "teachers" / "embedded.safetensors"
MOST_BYTES = 3 * 2**20


def measure(data: str, out: str) -> dict[str, float]:
    """k-NN (k 20) and linear probe (MAE's protocol on cached centre crops), class token and mean."""
    common: dict[str, Any] = {
        "backbone": "embedded", "data": data, "out": out, "workers": 0, "pools": ("mean", "cls"),
    }  # fmt: skip
    knn, linear = evaluate_knn(KnnConfig(**common)), evaluate_linear(LinearConfig(**common, protocol="mae"))
    return {
        "knn_mean": round(knn.metrics["mean/k20/top1"], 2),
        "knn_cls": round(knn.metrics["cls/k20/top1"], 2),
        "linear_mean": round(linear.metrics["mean/top1"], 2),
        "linear_cls": round(linear.metrics["cls/top1"], 2),
    }


def main() -> None:
    """Write src/cmt_mae/teachers/embedded.safetensors and say how large it is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument(
        "--data", default="", help="Imagenette packed at 128 px, with train and val"
    )
    options = parser.parse_args()
    run = options.run
    backbone = load_backbone(str(run))
    settings = yaml.safe_load((run / "config.yaml").read_text())
    facts = json.loads((run / "run.json").read_text())
    save_backbone(
        TARGET,
        backbone.model,
        architecture=backbone.architecture,
        kwargs=backbone.kwargs,
        mean=backbone.mean,
        std=backbone.std,
        img_size=backbone.img_size,
        licence="apache-2.0 (trained on Imagenette, ImageNet terms: research use)",
        source="cmt-mae's embedded teacher: recipe embedded_teacher, features of DeiT-Tiny, Imagenette",
        extra={
            "epochs": settings["epochs"],
            "seed": settings["seed"],
            "teacher": facts["teacher"]["digest"],
        },
        dtype=torch.float16,
    )
    size = TARGET.stat().st_size
    assert size <= MOST_BYTES, size
    print(f"{TARGET}: {size} bytes, digest {load_backbone('embedded').digest}")
    if options.data:
        content = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "what": "top-1 in percent on Imagenette's validation photos",
            "recipe": "embedded_teacher",
            "bytes": size,
            "steps": facts["plan"]["total_steps"],
            **measure(options.data, str(run.parent / "measured")),
            **environment(),
        }
        write_json(RESULTS / "embedded_teacher.json", content)


if __name__ == "__main__":
    main()
