"""Check that a data set in COCO's layout is complete and consistent, without a config."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mambavision.errors import DataError
from mambavision.openmmlab.data.coco import Findings, examine_annotations, read_annotations, some, unusable_files
from mambavision.openmmlab.prediction.sources import check_image
from mambavision.running.progress import progress

COCO_2017: list[tuple[str, str, int | None]] = [  # annotations, folder of images, number of images
    ("annotations/instances_train2017.json", "train2017", 118_287),
    ("annotations/instances_val2017.json", "val2017", 5_000),
]
COCO_CATEGORIES = 80
DOWNLOAD = (
    "COCO 2017 is available from https://cocodataset.org/#download: unpack train2017.zip (18 GB), val2017.zip (1 GB) "
    "and annotations_trainval2017.zip (241 MB) in"
)
SAMPLED = 200


def check(root: str | Path, ann: Sequence[str], images: Sequence[str], full: bool) -> None:
    """Print a table of a data set in COCO's layout.

    Args:
        root: Folder of the data set.
        ann: Annotation files below it; empty for COCO 2017.
        images: Folder of the images of each annotation file.
        full: Decode all images, not a sample.

    Raises:
        DataError: The data set is incomplete or contradicts itself.
    """
    root, is_coco = Path(root), not ann
    parts = COCO_2017 if is_coco else [(*each, None) for each in zip(ann, images, strict=True)]
    table = Table(title=str(root), title_justify="left")
    for column in ("annotations", "images", "objects", "categories", ""):
        table.add_column(column, overflow="fold")
    problems: list[str] = []
    remarks: list[str] = []
    for annotations, folder, expected in parts:
        findings = _examine_part(root / annotations, root / folder, full)
        counts = [len(findings.content.get(key, ())) for key in ("images", "annotations", "categories")]
        if expected and findings.content:
            for what, found, wanted in (("images", counts[0], expected), ("categories", counts[2], COCO_CATEGORIES)):
                if found != wanted:
                    findings.problems.append(f"{root / annotations}: {found} {what} instead of {wanted}")
        of = f" of {expected}" if expected else ""
        verdict = f"problems: {len(findings.problems)}" if findings.problems else "good"
        table.add_row(f"{annotations}\n{folder}/", f"{counts[0]}{of}", str(counts[1]), str(counts[2]), verdict)
        problems += findings.problems
        remarks += [f"{annotations}: {remark}" for remark in findings.remarks]
    Console().print(table)
    for line in [*(f"problem  {problem}" for problem in problems), *(f"remark   {remark}" for remark in remarks)]:
        print(line)
    if problems:
        remedy = f" {DOWNLOAD} {root}." if is_coco else ""
        raise DataError(f"{root}: {len(problems)} problem(s), the first: {problems[0]}.{remedy}")


def _examine_part(ann: Path, images: Path, full: bool) -> Findings:
    try:
        findings = Findings(read_annotations(ann))
    except DataError as error:
        return Findings(problems=[str(error).rstrip(".")])
    examine_annotations(findings)
    findings.problems = [f"{ann}: {problem}" for problem in findings.problems]
    missing, empty = unusable_files(findings.content["images"], images)
    without = {*missing, *empty}
    there = [image for image in findings.content["images"] if image["file_name"] not in without]
    broken, wrong = _examine_images(there[:: 1 if full else max(1, len(there) // SAMPLED)], images)
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

    def size(entry: dict[str, Any]) -> tuple[int, int] | None:
        try:
            return check_image(folder / entry["file_name"])
        except DataError:
            return None

    broken, wrong = [], []
    with ThreadPoolExecutor() as pool, progress("decoding", len(entries)) as line:
        for entry, found in zip(entries, pool.map(size, entries), strict=True):
            name, stated = entry["file_name"], (entry["height"], entry["width"])
            if found is None:
                broken.append(name)
            elif found != stated:
                wrong.append(f"{name} ({found[1]} x {found[0]}, stated: {stated[1]} x {stated[0]})")
            line.step()
    return broken, wrong
