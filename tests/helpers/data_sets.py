"""Small data sets of real scans of digits."""

from pathlib import Path


def write_digits(root: Path) -> Path:
    """Write an ImageNet-style folder of handwritten digits: 3 classes, 20 training and 5 validation images each."""
    from PIL import Image
    from sklearn.datasets import load_digits

    scans = load_digits(n_class=3)
    for digit in range(3):
        for number, pixels in enumerate(scans.images[scans.target == digit][:25]):
            folder = root / ("train" if number < 20 else "val") / f"digit {digit}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pixels * (255 / 16)).astype("uint8")).resize((32, 32)).save(folder / f"{number:02d}.png")
    return root


def write_coco_scenes(root: Path) -> Path:
    """Write four pictures of digits to train on and two held out, in COCO's format."""
    from scenes import Options, write_scenes

    write_scenes(root, "coco", Options(train=4, val=2, side=64, digit_sides=(28, 36), most=2))
    return root
