"""Put the student of a run of the recipe ``embedded_teacher`` into the package, in half precision.

python -m benchmarks.embed_teacher --run runs/embedded
"""

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path

import torch
import yaml

from benchmarks.ladder import RESULTS
from benchmarks.ladder_table import measure, training_facts
from cmt_mae.backbones import load_backbone, save_backbone
from cmt_mae.core.files import write_json
from cmt_mae.core.runs import environment

TARGET = Path(__file__).parents[1] / "src" / "cmt_mae" / "teachers" / "embedded.safetensors"
MOST_BYTES = 3 * 2**20


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
            **training_facts(run),
            **measure("embedded", options.data, run.parent),
            **environment(),
        }
        write_json(RESULTS / "embedded_teacher.json", content)


if __name__ == "__main__":
    main()
