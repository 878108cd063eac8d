"""Small photographic-looking scenes with ground truth, for demo and tests without a download.

Ten classes of things with their own shapes and surface structures, in free colours, among clutter,
with light, shadows, occlusion and a camera's blur and grain. Rendered by a small ray caster in
numpy; the same seed gives the same bytes.
"""

from cmt_mae.data.scenes.scene import SEMANTIC_CLASSES, Scene, render_scene
from cmt_mae.data.scenes.things import CLASSES
from cmt_mae.data.scenes.video import Video, render_video, write_davis
from cmt_mae.data.scenes.write import COCO_IDS, write_ade20k, write_coco, write_imagefolder

__all__ = [
    "CLASSES",
    "COCO_IDS",
    "SEMANTIC_CLASSES",
    "Scene",
    "Video",
    "render_scene",
    "render_video",
    "write_ade20k",
    "write_coco",
    "write_davis",
    "write_imagefolder",
]
