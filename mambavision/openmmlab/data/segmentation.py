"""Check that segmentation data are complete, consistent, and fit the config."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import mmseg
import mmseg.datasets  # registers the data sets
from mmengine import Config
from mmengine.config import ConfigDict
from mmengine.registry import init_default_scope
from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS
from PIL import Image
from rich.console import Console
from rich.table import Table

from mambavision.errors import DataError, UserError
from mambavision.inputs import check_tree
from mambavision.openmmlab.config import load_config, settings_in
from mambavision.openmmlab.data.masks import loader_of, number_of_classes, problem_of

SPLITS = ("train", "val", "test")
# Content of the data roots, and its origin. CONVERTERS is a folder of the installed MMSegmentation.
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
SAMPLED_SIZES, SAMPLED_MASKS = 200, 20  # of each split, unless all are checked


def check(config: str, full: bool, cfg_options: Sequence[str]) -> None:
    """Print a table of the data sets of a config.

    Args:
        config: Config file.
        full: Open all images and masks, not a sample.
        cfg_options: Settings that override the config.

    Raises:
        DataError: A data set is incomplete or contradicts the config.
    """
    table = Table(title=config, title_justify="left")
    for column in ("split", "images", "classes", "verdict"):
        table.add_column(column, overflow="fold")
    problems: list[str] = []
    for split, findings in _examine(load_config(config, cfg_options), SPLITS, full):
        verdict = "\n".join(findings.problems) or "good"
        table.add_row(split, str(findings.images), str(findings.classes), verdict)
        problems += findings.problems
    Console().print(table)
    if problems:
        raise DataError(f"{config}: {len(problems)} problem(s) with the data, the first: {problems[0]}.")


def check_datasets(config: Config, splits: Sequence[str] = SPLITS) -> None:
    """Raise a DataError for the first problem of the data sets of a config; masks are sampled."""
    for _, findings in _examine(config, splits, full=False):
        if findings.problems:
            raise DataError(f"{findings.problems[0]}.")


@dataclass
class Findings:
    """Size and problems of a data set."""

    images: int = 0
    classes: int = 0
    problems: list[str] = field(default_factory=list)


def _examine(config: Config, splits: Sequence[str], full: bool) -> Iterator[tuple[str, Findings]]:
    """Yield findings on each data set of some splits once, including nested ones."""
    seen: list[Any] = []
    for split in splits:
        for setting in settings_in((config.get(f"{split}_dataloader") or {}).get("dataset", {})):
            if "data_prefix" in setting and setting not in seen:
                seen.append(setting)
                yield split, _findings(setting, config, full)


def _findings(setting: ConfigDict, config: Config, full: bool) -> Findings:
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
        findings.problems.append(f"the data have {findings.classes} classes, but the model has {known} (num_classes)")
    if dataset.data_prefix.get("seg_map_path"):
        findings.problems += _problems_of_masks(entries, setting, config, full)
    return findings


def _missing_folder(setting: ConfigDict) -> str:
    root = Path(setting.get("data_root") or "")
    for folder in (root, *(root / prefix for prefix in setting.data_prefix.values() if prefix)):
        if not folder.is_dir():
            return f"{folder}: no such folder{_remedy(setting)}"
    return ""


def _remedy(setting: ConfigDict) -> str:
    """Describe the folder layout of a known data set."""
    if setting.get("type") not in LAYOUTS:
        return ""
    layout, variable = LAYOUTS[setting.type]
    folder = str(Path(mmseg.__path__[0], ".mim", "tools", "dataset_converters"))
    layout = layout.replace("CONVERTERS", folder).replace("ROOT", str(setting.data_root))
    return f"; the data root must contain {layout}; the environment variable {variable} names another root"


def build_dataset(setting: ConfigDict, config: Config, **others: Any) -> BaseSegDataset:
    """Build a data set without its pipeline.

    Args:
        setting: Its setting.
        config: The config with that setting.
        others: Further arguments of the data set.

    Raises:
        UserError: The setting contradicts itself, or names missing files.
    """
    init_default_scope(config.get("default_scope", "mmseg"))
    try:
        return DATASETS.build({**setting, "pipeline": [], **others})
    except (ValueError, AssertionError, OSError) as error:
        raise UserError(f"{config.filename}: {error}.") from error


def _problems_of_masks(entries: list[dict[str, Any]], setting: ConfigDict, config: Config, full: bool) -> Iterator[str]:
    """Yield the problems of a data set's masks, one sentence for each kind."""
    folders = {os.path.dirname(entry["seg_map_path"]) for entry in entries}
    masks = {folder: set(os.listdir(folder)) if os.path.isdir(folder) else set() for folder in folders}
    missing = [entry["seg_map_path"] for entry in entries if not _is_in(masks, entry["seg_map_path"])]
    if missing:
        yield f"{_some(missing)}: no such mask{_remedy(setting)}"
    there = [entry for entry in entries if _is_in(masks, entry["seg_map_path"])]
    with ThreadPoolExecutor() as pool:
        wrong = [found for found in pool.map(_problem_of_header, _sample(there, SAMPLED_SIZES, full)) if found]
        if wrong:
            yield _some(wrong)
            return
        check = partial(_problem_of_labels, setting=setting, config=config)
        wrong = [found for found in pool.map(check, _sample(there, SAMPLED_MASKS, full)) if found]
        if wrong:
            yield _some(wrong)


def _is_in(folders: dict[str, set[str]], path: str) -> bool:
    return os.path.basename(path) in folders[os.path.dirname(path)]


def _sample(entries: list[Any], count: int, full: bool) -> list[Any]:
    return entries if full else entries[:: max(1, len(entries) // count)]


def _some(found: list[str]) -> str:
    return found[0] if len(found) == 1 else f"{found[0]} (and {len(found) - 1} more)"


def _problem_of_header(entry: dict[str, Any]) -> str:
    """Describe how a mask's header contradicts its image's; empty if it does not."""
    path = entry["img_path"]
    try:
        with Image.open(path) as image:
            size = image.size
            if image.getexif().get(0x0112, 1) >= 5:  # rotated by 90 degrees when loaded
                size = size[::-1]
        path = entry["seg_map_path"]
        with Image.open(path) as mask:
            if mask.mode not in ("L", "P", "1"):
                return f"{path}: is an image of mode {mask.mode}, but a mask has 8 bits, the class index of each pixel"
            if mask.size != size:
                return "{}: has {} x {} pixels, but its image {} x {}".format(path, *mask.size, *size)
    except OSError as error:
        return f"{path}: cannot be read as an image ({getattr(error, 'strerror', None) or error})"
    return ""


def _problem_of_labels(entry: dict[str, Any], setting: ConfigDict, config: Config) -> str:
    try:
        labels = loader_of(setting)({**entry, "seg_fields": []})["gt_seg_map"]
    except (OSError, SyntaxError, ValueError) as error:
        return f"{entry['seg_map_path']}: cannot be read as an image ({error})"
    problem = problem_of(labels, None, *number_of_classes(config), bool(entry["reduce_zero_label"]))
    return f"{entry['seg_map_path']}: {problem}" if problem else ""
