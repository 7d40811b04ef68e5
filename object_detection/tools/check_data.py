"""Check that a data set in COCO's layout is complete and fits together; see README.md and --help."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mambavision.openmmlab.coco import Findings

COCO_2017 = [  # annotations, folder of images, their number
    ("annotations/instances_train2017.json", "train2017", 118_287),
    ("annotations/instances_val2017.json", "val2017", 5_000),
]
COCO_CATEGORIES = 80
DOWNLOAD = (
    "COCO 2017 is at https://cocodataset.org/#download: unpack train2017.zip (18 GB), val2017.zip (1 GB) and "
    "annotations_trainval2017.zip (241 MB) in"
)
_SAMPLED_SIZES = 200


def main() -> None:
    args = options()

    from mambavision.errors import run_cli

    run_cli(lambda: check(args))


def options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Check a data set in COCO's layout: COCO 2017, or the one that --ann and --images name."
    )
    add = parser.add_argument
    root = os.environ.get("COCO_ROOT", "data/coco")
    add("--root", default=root, metavar="DIR", help="its folder (default: $COCO_ROOT or data/coco, here %(default)s)")
    add("--ann", action="append", default=[], metavar="FILE", help="annotations, below --root; may be repeated")
    add("--images", action="append", default=[], metavar="DIR", help="folder of the images of the same --ann")
    add("--full", action="store_true", help=f"open all images to check their sizes, not {_SAMPLED_SIZES} of each part")
    args = parser.parse_args(argv)
    if len(args.ann) != len(args.images):
        parser.error("give as many --images as --ann")
    return args


def check(args: argparse.Namespace) -> None:
    """Print what was found; raise a DataError if the data set is incomplete or contradicts itself."""
    from rich.console import Console
    from rich.table import Table

    from mambavision.errors import DataError

    root, is_coco = Path(args.root), not args.ann
    parts = COCO_2017 if is_coco else [(ann, images, None) for ann, images in zip(args.ann, args.images, strict=True)]
    table = Table(title=str(root), title_justify="left")
    for column in ("annotations", "images", "objects", "categories", ""):
        table.add_column(column, overflow="fold")
    problems, remarks = [], []
    for ann, images, expected in parts:
        findings = _examine_part(root / ann, root / images, args.full)
        counts = [len(findings.content.get(key, ())) for key in ("images", "annotations", "categories")]
        if expected and findings.content:
            for what, found, wanted in (("images", counts[0], expected), ("categories", counts[2], COCO_CATEGORIES)):
                if found != wanted:
                    findings.problems.append(f"{root / ann}: {found} {what} instead of {wanted}")
        of = f" of {expected}" if expected else ""
        verdict = f"problems: {len(findings.problems)}" if findings.problems else "good"
        table.add_row(f"{ann}\n{images}/", f"{counts[0]}{of}", str(counts[1]), str(counts[2]), verdict)
        problems += findings.problems
        remarks += [f"{ann}: {remark}" for remark in findings.remarks]
    Console().print(table)
    for line in [*(f"problem  {problem}" for problem in problems), *(f"remark   {remark}" for remark in remarks)]:
        print(line)
    if problems:
        remedy = f" {DOWNLOAD} {root}." if is_coco else ""
        raise DataError(f"{root}: {len(problems)} problem(s), the first: {problems[0]}.{remedy}")


def _examine_part(ann: Path, images: Path, full: bool) -> "Findings":
    from mambavision.errors import DataError
    from mambavision.openmmlab.coco import Findings, examine_annotations, missing_files, read_annotations, some

    try:
        findings = Findings(read_annotations(ann))
    except DataError as error:
        return Findings(problems=[str(error).rstrip(".")])
    examine_annotations(findings)
    findings.problems = [f"{ann}: {problem}" for problem in findings.problems]
    missing = missing_files(findings.content["images"], images)
    if missing:
        findings.problems.append(f"{images}: without {some(missing)}")
    absent = set(missing)
    there = [image for image in findings.content["images"] if image["file_name"] not in absent]
    step = 1 if full else max(1, len(there) // _SAMPLED_SIZES)
    wrong = [wrong for image in there[::step] if (wrong := _wrong_size(image, images))]
    if wrong:
        findings.problems.append(f"{images}: other sizes than stated: {some(wrong)}")
    return findings


def _wrong_size(image: dict[str, Any], folder: Path) -> str:
    """Return how an image's size contradicts its entry, or an empty string."""
    from PIL import Image

    try:
        with Image.open(folder / image["file_name"]) as picture:
            width, height = picture.size
            if picture.getexif().get(0x0112, 1) >= 5:  # is turned by a quarter when it is loaded
                width, height = height, width
    except OSError:
        return f"{image['file_name']} (no image)"
    if (width, height) == (image["width"], image["height"]):
        return ""
    return f"{image['file_name']} ({width} x {height}, stated: {image['width']} x {image['height']})"


if __name__ == "__main__":
    main()
