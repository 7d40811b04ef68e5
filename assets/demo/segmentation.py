"""Demo of segmentation: a small UPerNet labels the pixels of handwritten digits on photographs, on the CPU.

Digits and photographs come with scikit-learn; see `scenes`. If the demo of classification has been run, the backbone
starts from its weights, with the same scans held out.
"""

from pathlib import Path

from scene_demo import Demo, Score
from scenes import Options

DEMO = Demo(
    title="UPerNet on digits",
    task=Path(__file__).resolve().parents[2] / "semantic_segmentation",
    config="configs/mamba_vision/upernet_mamba_vision_digits.py",
    layout="ade20k",
    held_out="images/validation",
    scores=(Score("mIoU", "mIoU", 1, 65.0),),
    # Many digits of similar size: with one or two large ones per picture, the model had not learned to distinguish
    # digits after 600 iterations.
    scenes=Options(train=1500, val=150, side=128, digit_sides=(32, 44), most=8, angle=10),
    side=240,
    columns=3,
)

if __name__ == "__main__":
    DEMO.main("demo-segmentation")
