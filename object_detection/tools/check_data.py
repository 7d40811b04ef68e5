"""Check that a data set in COCO's layout is complete and fits together; see README.md and --help."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mambavision.openmmlab.data.coco import Findings

COCO_2017 = [  # annotations, folder of images, their number
    ("annotations/instances_train2017.json", "train2017", 118_287),
    ("annotations/instances_val2017.json", "val2017", 5_000),
]
COCO_CATEGORIES = 80
DOWNLOAD = (
    "COCO 2017 is at https://cocodataset.org/#download: unpack train2017.zip (18 GB), val2017.zip (1 GB) and "
    "annotations_trainval2017.zip (241 MB) in"
)
_SAMPLED = 200


def main() -> None:
    args = options()

    from mambavision.running.program import run_cli

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
    add("--full", action="store_true", help=f"decode all images and check their sizes, not {_SAMPLED} of each part")
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
    from mambavision.openmmlab.data.coco import Findings, examine_annotations, read_annotations, some, unusable_files

    try:
        findings = Findings(read_annotations(ann))
    except DataError as error:
        return Findings(problems=[str(error).rstrip(".")])
    examine_annotations(findings)
    findings.problems = [f"{ann}: {problem}" for problem in findings.problems]
    missing, empty = unusable_files(findings.content["images"], images)
    without = {*missing, *empty}
    there = [image for image in findings.content["images"] if image["file_name"] not in without]
    broken, wrong = _examine_images(there[:: 1 if full else max(1, len(there) // _SAMPLED)], images)
    for what, names in (
        ("without", missing),
        ("empty files:", empty),
        ("cannot be decoded as an image:", broken),
        ("other sizes than stated:", wrong),
    ):
        if names:
            findings.problems.append(f"{images}: {what} {some(names)}")
    return findings


def _examine_images(entries: list[dict[str, Any]], folder: Path) -> tuple[list[str], list[str]]:
    """Return the images that cannot be decoded, and those whose size contradicts their entry."""
    from concurrent.futures import ThreadPoolExecutor

    from mambavision.errors import DataError
    from mambavision.openmmlab.prediction.sources import check_image
    from mambavision.openmmlab.reporting import progress

    def size(entry: dict[str, Any]) -> tuple[int, int] | None:
        try:
            return check_image(folder / entry["file_name"])
        except DataError:
            return None

    broken, wrong = [], []
    with ThreadPoolExecutor() as pool, progress("decoding", len(entries)) as advance:
        for entry, found in zip(entries, pool.map(size, entries), strict=True):
            name, stated = entry["file_name"], (entry["height"], entry["width"])
            if found is None:
                broken.append(name)
            elif found != stated:
                wrong.append(f"{name} ({found[1]} x {found[0]}, stated: {stated[1]} x {stated[0]})")
            advance(1)
    return broken, wrong


if __name__ == "__main__":
    main()
