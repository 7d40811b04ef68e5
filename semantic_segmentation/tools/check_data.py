"""Check that the data sets of a config are complete and fit to it and together; see README.md and --help."""

import argparse
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmengine import Config
    from mmengine.config import ConfigDict
    from mmseg.datasets import BaseSegDataset

SPLITS = ("train", "val", "test")
# What the data roots hold, and where that comes from. CONVERTERS is a folder of the installed MMSegmentation.
LAYOUTS = {
    "ADE20KDataset": (
        "images/{training,validation}/*.jpg and annotations/{training,validation}/*.png, as in "
        "ADEChallengeData2016.zip of http://sceneparsing.csail.mit.edu",
        "ADE20K_ROOT",
    ),
    "CityscapesDataset": (
        "leftImg8bit/{train,val}/CITY/*_leftImg8bit.png and gtFine/{train,val}/CITY/*_gtFine_labelTrainIds.png, as in "
        "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip of https://www.cityscapes-dataset.com, with the "
        "masks made by: pip install cityscapesscripts; python CONVERTERS/cityscapes.py ROOT --nproc 8",
        "CITYSCAPES_ROOT",
    ),
    "COCOStuffDataset": (
        "images/{train2017,val2017}/*.jpg of https://cocodataset.org and "
        "annotations/{train2017,val2017}/*_labelTrainIds.png, made of annotations/{train2017,val2017}/*.png, as in "
        "stuffthingmaps_trainval2017.zip of https://github.com/nightrome/cocostuff, by: "
        "python CONVERTERS/coco_stuff164k.py ROOT --nproc 8",
        "COCO_STUFF_ROOT",
    ),
}
_SIZES, _MASKS = 200, 20  # examined of each split, unless all are


def main() -> None:
    args = options()

    from mambavision.running.program import run_cli

    run_cli(lambda: check(args))


def options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split(";")[0] + ".")
    add = parser.add_argument
    add("config", help="config file, whose data sets are checked")
    add("--full", action="store_true", help=f"open all images and masks, not {_SIZES} and {_MASKS} of each split")
    add("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="settings to override")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Print what was found; raise a DataError if a data set is incomplete or contradicts the config."""
    from rich.console import Console
    from rich.table import Table

    from mambavision.errors import DataError
    from mambavision.openmmlab.config import load_config

    table = Table(title=args.config, title_justify="left")
    for column in ("split", "images", "classes", "verdict"):
        table.add_column(column, overflow="fold")
    problems: list[str] = []
    for split, findings in _examine(load_config(args.config, args.cfg_options), SPLITS, args.full):
        verdict = "\n".join(findings.problems) or "good"
        table.add_row(split, str(findings.images), str(findings.classes), verdict)
        problems += findings.problems
    Console().print(table)
    if problems:
        raise DataError(f"{args.config}: {len(problems)} problem(s) with the data, the first: {problems[0]}.")


def check_datasets(config: "Config", splits: Sequence[str] = SPLITS) -> None:
    """Raise a DataError at the first thing that is wrong with the data sets of a config; masks are sampled."""
    from mambavision.errors import DataError

    for _, findings in _examine(config, splits, full=False):
        if findings.problems:
            raise DataError(f"{findings.problems[0]}.")


@dataclass
class Findings:
    """What a data set is like, and what is wrong with it."""

    images: int = 0
    classes: int = 0
    problems: list[str] = field(default_factory=list)


def _examine(config: "Config", splits: Sequence[str], full: bool) -> Iterator[tuple[str, Findings]]:
    """Yield what the data sets of some splits are like: each once, and those inside of others too."""
    import mambavision.openmmlab  # noqa: F401 - stands in for mmcv's operators
    from mambavision.openmmlab.config import settings_in

    seen: list[Any] = []
    for split in splits:
        for setting in settings_in((config.get(f"{split}_dataloader") or {}).get("dataset", {})):
            if "data_prefix" in setting and setting not in seen:
                seen.append(setting)
                yield split, _findings(setting, config, full)


def _findings(setting: "ConfigDict", config: "Config", full: bool) -> Findings:
    from mambavision.openmmlab.data.masks import number_of_classes

    from mambavision.errors import DataError
    from mambavision.inputs import check_tree

    missing = _missing_folder(setting)
    if missing:
        return Findings(problems=[missing])
    try:
        for prefix in setting.data_prefix.values():
            if prefix:
                check_tree(Path(setting.get("data_root") or "", prefix))
    except DataError as error:
        return Findings(problems=[str(error).rstrip(".")])
    dataset = build_dataset(setting, config)
    entries = [dataset.get_data_info(index) for index in range(len(dataset))]
    findings = Findings(len(entries), len(dataset.metainfo.get("classes") or ()))
    if not entries:
        findings.problems.append(f"{dataset.data_prefix['img_path']}: no image *{dataset.img_suffix} there")
    known = number_of_classes(config)[0]
    if findings.classes != known:
        findings.problems.append(f"the data have {findings.classes} classes, and the model {known} (num_classes)")
    if dataset.data_prefix.get("seg_map_path"):
        findings.problems += _problems_of_masks(entries, setting, config, full)
    return findings


def _missing_folder(setting: "ConfigDict") -> str:
    root = Path(setting.get("data_root") or "")
    for folder in (root, *(root / prefix for prefix in setting.data_prefix.values() if prefix)):
        if not folder.is_dir():
            return f"{folder}: no such folder{_remedy(setting)}"
    return ""


def _remedy(setting: "ConfigDict") -> str:
    """Say what a known data set's folder must hold."""
    import mmseg

    if setting.get("type") not in LAYOUTS:
        return ""
    layout, variable = LAYOUTS[setting.type]
    folder = str(Path(mmseg.__path__[0], ".mim", "tools", "dataset_converters"))
    layout = layout.replace("CONVERTERS", folder).replace("ROOT", str(setting.data_root))
    return f"; the data root must hold {layout}; the variable {variable} names another root"


def build_dataset(setting: "ConfigDict", config: "Config", **others: Any) -> "BaseSegDataset":
    """Build a data set without its pipeline.

    Args:
        setting: Its setting.
        config: The config with that setting.
        others: Further arguments of the data set.

    Raises:
        UserError: The setting contradicts itself, or names files that are not there.
    """
    import mmseg.datasets  # noqa: F401 - registers them
    from mmengine.registry import init_default_scope
    from mmseg.registry import DATASETS

    from mambavision.errors import UserError

    init_default_scope(config.get("default_scope", "mmseg"))
    try:
        return DATASETS.build({**setting, "pipeline": [], **others})
    except (ValueError, AssertionError, OSError) as error:
        raise UserError(f"{config.filename}: {error}.") from error


def _problems_of_masks(
    entries: list[dict[str, Any]], setting: "ConfigDict", config: "Config", full: bool
) -> Iterator[str]:
    """Yield what is wrong with the masks of a data set's entries, one sentence of each kind."""
    folders = {os.path.dirname(entry["seg_map_path"]) for entry in entries}
    masks = {folder: set(os.listdir(folder)) if os.path.isdir(folder) else set() for folder in folders}
    missing = [entry["seg_map_path"] for entry in entries if not _is_in(masks, entry["seg_map_path"])]
    if missing:
        yield f"{_some(missing)}: no such mask{_remedy(setting)}"
    there = [entry for entry in entries if _is_in(masks, entry["seg_map_path"])]
    with ThreadPoolExecutor() as pool:
        wrong = [found for found in pool.map(_problem_of_header, _sample(there, _SIZES, full)) if found]
        if wrong:
            yield _some(wrong)
            return
        check = partial(_problem_of_labels, setting=setting, config=config)
        wrong = [found for found in pool.map(check, _sample(there, _MASKS, full)) if found]
        if wrong:
            yield _some(wrong)


def _is_in(folders: dict[str, set[str]], path: str) -> bool:
    return os.path.basename(path) in folders[os.path.dirname(path)]


def _sample(entries: list[Any], count: int, full: bool) -> list[Any]:
    return entries if full else entries[:: max(1, len(entries) // count)]


def _some(found: list[str]) -> str:
    return found[0] if len(found) == 1 else f"{found[0]} (and {len(found) - 1} more)"


def _problem_of_header(entry: dict[str, Any]) -> str:
    """Say how a mask's header contradicts its image's, or return an empty string."""
    from PIL import Image

    path = entry["img_path"]
    try:
        with Image.open(path) as image:
            size = image.size
            if image.getexif().get(0x0112, 1) >= 5:  # is turned by a quarter when it is loaded
                size = size[::-1]
        path = entry["seg_map_path"]
        with Image.open(path) as mask:
            if mask.mode not in ("L", "P", "1"):
                return f"{path}: is a picture of mode {mask.mode}, and a mask has 8 bits, the class of each pixel"
            if mask.size != size:
                return "{}: has {} x {} pixels, and its image {} x {}".format(path, *mask.size, *size)
    except OSError as error:
        return f"{path}: cannot be read as an image ({getattr(error, 'strerror', None) or error})"
    return ""


def _problem_of_labels(entry: dict[str, Any], setting: "ConfigDict", config: "Config") -> str:
    from mambavision.openmmlab.data.masks import loader_of, number_of_classes, problem_of

    try:
        labels = loader_of(setting)({**entry, "seg_fields": []})["gt_seg_map"]
    except (OSError, SyntaxError, ValueError) as error:
        return f"{entry['seg_map_path']}: cannot be read as an image ({error})"
    problem = problem_of(labels, None, *number_of_classes(config), bool(entry["reduce_zero_label"]))
    return f"{entry['seg_map_path']}: {problem}" if problem else ""


if __name__ == "__main__":
    main()
