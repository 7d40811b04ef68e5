"""Demo of detection: a small Mask R-CNN finds and outlines handwritten digits on photographs, on the CPU.

Digits and photographs come with scikit-learn; see `scenes`. If the demo of classification has been run, the backbone
starts from its weights, with the same scans held out.
"""

from pathlib import Path

from scene_demo import Demo, Score
from scenes import Options

DEMO = Demo(
    title="Mask R-CNN on digits",
    task=Path(__file__).resolve().parents[2] / "object_detection",
    config="configs/mamba_vision/mask_rcnn_mamba_vision_digits.py",
    layout="coco",
    held_out="val",
    scenes=Options(train=2000),
    scores=(
        Score("box AP", "coco/bbox_mAP", 100, 65.0),
        Score("box AP50", "coco/bbox_mAP_50", 100, 95.0),
        Score("mask AP", "coco/segm_mAP", 100, 65.0),
    ),
)

if __name__ == "__main__":
    DEMO.main("demo-detection")
