"""Checks of data sets in COCO's layout, and of configs that use them, before training starts."""

import contextlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mambavision.errors import DataError
from mambavision.running.process import this_process
from mambavision.text import nearest

_MAX_NUMBER = 1e12  # in annotations


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < _MAX_NUMBER  # NaN is not


def _is_box(value: Any) -> bool:
    return type(value) is list and len(value) == 4 and all(map(_is_number, value))


# Descriptions of valid values, and tests for them.
_ID = "an integer or a string", lambda value: type(value) in (int, str)
_TEXT = "a string", lambda value: type(value) is str
_NUMBER = "a finite number", _is_number
_BOX = "[x, y, width, height] in finite numbers", _is_box
_REQUIRED = {  # by MMDetection
    "images": {"id": _ID, "file_name": _TEXT, "width": _NUMBER, "height": _NUMBER},
    "annotations": {"id": _ID, "image_id": _ID, "category_id": _ID, "bbox": _BOX, "area": _NUMBER},
    "categories": {"id": _ID, "name": _TEXT},
}

Id = int | str

_logger = logging.getLogger(__name__)


@dataclass
class Findings:
    """Result of a check of annotations and images: problems, and remarks on flaws that MMDetection tolerates."""

    content: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def read_annotations(ann: Path) -> dict[str, list[dict[str, Any]]]:
    """Read an annotation file.

    Raises:
        DataError: The file is missing or not in COCO's format, has no images or objects, or contains a value of the
            wrong type or a duplicate id.
    """
    if not ann.is_file():
        siblings = [file.name for file in ann.parent.glob("*.json")]
        raise DataError(f"{ann}: no such file.{nearest(ann.name, siblings)}")
    if not ann.stat().st_size:
        raise DataError(f"{ann}: the file is empty; download or copy it again.")
    try:
        content = json.loads(ann.read_bytes())
    except (ValueError, OSError) as error:
        raise DataError(f"{ann}: is not valid JSON, perhaps truncated ({error}); download or copy it again.") from None
    for key in _REQUIRED:
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise DataError(f"{ann}: has no list of {key}; it must be in COCO's format for object detection.")
        if not entries:
            raise DataError(f"{ann}: has no {key}; check how it was exported.")
        _check_entries(ann, key, entries)
        repeated = [number for number, count in Counter(entry["id"] for entry in entries).items() if count > 1]
        if repeated:
            raise DataError(f"{ann}: {key} have the same id: {some(repeated)}; ids must be unique.")
    files = [image["file_name"] for image in content["images"]]
    repeated = [name for name, count in Counter(files).items() if count > 1]
    if repeated:
        raise DataError(
            f"{ann}: images have the same file_name: {some(repeated)}; list each image once, with all its objects."
        )
    return content


def _check_entries(ann: Path, key: str, entries: list[Any]) -> None:
    needed = _REQUIRED[key]
    for position, entry in enumerate(entries):
        if not isinstance(entry, dict) or not needed.keys() <= entry.keys():
            lacking = needed.keys() - entry.keys() if isinstance(entry, dict) else needed
            raise DataError(f"{ann}: entry {position} of {key} has no {', '.join(sorted(lacking))}.")
    for name, (kind, is_one) in needed.items():
        for position, entry in enumerate(entries):
            if not is_one(entry[name]):
                value = json.dumps(entry[name])
                shown = value if len(value) <= 40 else f"{value[:40]}..."
                raise DataError(f"{ann}: entry {position} of {key} has the {name} {shown}; it must be {kind}.")


def examine_annotations(findings: Findings) -> None:
    """Add the problems of the objects and categories in `findings.content`."""
    sizes = {image["id"]: (image["width"], image["height"]) for image in findings.content["images"]}
    categories = {category["id"] for category in findings.content["categories"]}
    names = Counter(category["name"] for category in findings.content["categories"])
    wrong: dict[str, list[Id]] = {"image_id of no image": [], "category_id of no category": []}
    odd: dict[str, list[Id]] = {"box without area": [], "box outside the image": [], "no segmentation": []}
    for entry in findings.content["annotations"]:
        number = entry["id"]
        if entry["category_id"] not in categories:
            wrong["category_id of no category"].append(number)
        if entry["image_id"] not in sizes:
            wrong["image_id of no image"].append(number)
        else:
            x, y, box_width, box_height = entry["bbox"]
            width, height = sizes[entry["image_id"]]
            if not (box_width > 0 and box_height > 0):
                odd["box without area"].append(number)
            elif x < -1 or y < -1 or x + box_width > width + 1 or y + box_height > height + 1:
                odd["box outside the image"].append(number)
        if not entry.get("segmentation"):
            odd["no segmentation"].append(number)
    findings.problems += [f"{what}: annotation {some(ids)}" for what, ids in wrong.items() if ids]
    findings.problems += [f"{count} categories have the name {name}" for name, count in names.items() if count > 1]
    if next(_objects(findings.content, categories), None) is None:
        findings.problems.append("no object that MMDetection would use")
    findings.remarks += [f"{what}: annotation {some(ids)}" for what, ids in odd.items() if ids]
    empty = len(sizes.keys() - {entry["image_id"] for entry in findings.content["annotations"]})
    if empty:
        findings.remarks.append(f"images without objects: {empty}")


def _objects(content: dict[str, list[dict[str, Any]]], categories: Set[Id]) -> Iterator[dict[str, Any]]:
    """Yield the annotations of some categories that MMDetection does not ignore."""
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    for entry in content["annotations"]:
        if entry["category_id"] in categories and entry["image_id"] in sizes and not entry.get("ignore"):
            x, y, width, height = entry["bbox"]
            image_width, image_height = sizes[entry["image_id"]]
            is_inside = -width < x < image_width and -height < y < image_height
            if is_inside and width >= 1 and height >= 1 and entry["area"] > 0:
                yield entry


def unusable_files(images: Iterable[dict[str, Any]], folder: Path) -> tuple[list[str], list[str]]:
    """Return the names of missing files, and those of empty files."""
    sizes = _file_sizes(folder)
    missing: list[str] = []
    empty: list[str] = []
    for name in (image["file_name"] for image in images):
        size = sizes.get(name)
        if size is None and (folder / name).is_file():  # behind a link, or spelled differently
            size = (folder / name).stat().st_size
        if not size:
            (missing if size is None else empty).append(name)
    return missing, empty


def _file_sizes(folder: Path) -> dict[str, int]:
    """Return the sizes of all files below a folder, which is scanned only once: it may have 118,287 files."""
    top = os.path.join(folder, "")
    sizes, pending = {}, [top]
    while pending:
        with contextlib.suppress(OSError), os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                elif entry.is_file():
                    sizes[entry.path.removeprefix(top)] = entry.stat().st_size
    return sizes


# Checks against a config


def check_datasets(cfg: Config, phases: Sequence[str] = ("train", "val")) -> None:
    """Check the data sets of a config that are in COCO's layout.

    Every process checks them, so that all end if there is a problem; the first process logs the remarks.

    Args:
        cfg: Config of MMDetection.
        phases: Data sets to check: "train", "val", "test".

    Raises:
        DataError: The run would fail, or confuse classes.
    """
    for phase in phases:
        datasets = _coco_datasets((cfg.get(f"{phase}_dataloader") or {}).get("dataset"))
        files = [_check_dataset(dataset, cfg.get("model", {}), phase == "train") for dataset in datasets]
        evaluators = cfg.get(f"{phase}_evaluator") or []
        for evaluator in [evaluators] if isinstance(evaluators, dict) else evaluators:
            truth = evaluator.get("ann_file")
            if truth and files and Path(truth).resolve() not in [file.resolve() for file in files]:
                raise DataError(
                    f"{phase}_evaluator.ann_file is {truth}, but {phase}_dataloader reads {files[0]}; set both to the "
                    "same file."
                )


def _coco_datasets(node: Any) -> Iterator[dict[str, Any]]:
    """Yield the configs of all CocoDatasets among data sets that may be wrapped."""
    from mmdet.datasets import CocoDataset

    if isinstance(node, (list, tuple)):
        for each in node:
            yield from _coco_datasets(each)
    elif isinstance(node, dict):
        kind = _dataset_class(node)
        # Subclasses with another format, such as LVIS's, are not checked here.
        if kind is not None and getattr(kind, "load_data_list", None) is CocoDataset.load_data_list:
            yield node
        for key in ("dataset", "datasets"):
            yield from _coco_datasets(node.get(key))


def _dataset_class(dataset: dict[str, Any]) -> Any:
    """Return the class of a data set, or None if it is unknown."""
    from mmdet.registry import DATASETS

    kind = dataset.get("type")
    return DATASETS.get(kind) if isinstance(kind, str) else kind


def _check_dataset(dataset: dict[str, Any], model: dict[str, Any], is_trained: bool) -> Path:
    """Check one data set against the model; return its annotation file."""
    ann, images = _places(dataset)
    findings = Findings(read_annotations(ann))
    classes = dataset_meta(dataset)["classes"]
    _check_classes(ann, [category["name"] for category in findings.content["categories"]], classes)
    heads = head_classes(model)
    if heads - {len(classes)}:
        raise DataError(
            f"{ann}: the config trains {len(classes)} classes, but num_classes of the model's heads is "
            f"{' and '.join(map(str, sorted(heads)))}: set it to {len(classes)} in all of them."
        )
    missing, empty = unusable_files(findings.content["images"], images)
    if missing:
        raise DataError(f"{images}: lacks images of {ann}: {some(missing)}.")
    if empty:
        raise DataError(f"{images}: has empty files: {some(empty)}; download or copy them again.")
    examine_annotations(findings)
    if this_process().is_first:
        for remark in findings.problems + findings.remarks:
            _logger.warning("%s: %s", ann, remark)
    _check_objects(ann, findings.content, dataset, classes, is_trained)
    return ann


def _places(dataset: dict[str, Any]) -> tuple[Path, Path]:
    """Return a data set's annotation file and folder of images."""
    root = Path(dataset.get("data_root") or "")
    ann, images = root / dataset.get("ann_file", ""), root / dataset.get("data_prefix", {}).get("img", "")
    for folder in (root, images):
        if not folder.is_dir():
            raise DataError(
                f"{folder}: no such folder; the data set needs the annotations {ann} and images in {images}: set "
                "data_root in the config, or for this project's configs the environment variable COCO_ROOT."
            )
    return ann, images


def _check_objects(
    ann: Path,
    content: dict[str, list[dict[str, Any]]],
    dataset: dict[str, Any],
    classes: Sequence[str],
    is_trained: bool,
) -> None:
    """Check that there are objects of the config's classes, with masks if the model needs them."""
    objects = list(_objects(content, {each["id"] for each in content["categories"] if each["name"] in classes}))
    smallest = 0 if dataset.get("test_mode") else (dataset.get("filter_cfg") or {}).get("min_size", 0)
    usable = {image["id"] for image in content["images"] if min(image["width"], image["height"]) >= smallest}
    if is_trained and usable.isdisjoint(each["image_id"] for each in objects):
        where = f" in images of at least {smallest} pixels (filter_cfg.min_size)" if smallest else ""
        raise DataError(f"{ann}: has no object of the config's classes{where}: nothing to train on.")
    bare = [each["id"] for each in objects if not each.get("segmentation")]
    if bare and True in _values(dataset.get("pipeline"), "with_mask"):
        raise DataError(
            f"{ann}: annotations without segmentation: {some(bare)}; a model with masks needs one for every object; "
            "remove these objects, or train a model without masks."
        )


def dataset_meta(dataset: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata of a data set, such as ``classes``, from its config or else its class."""
    while "type" in dataset and "metainfo" not in dataset and ("dataset" in dataset or "datasets" in dataset):
        dataset = dataset["dataset"] if "dataset" in dataset else dataset["datasets"][0]
    kind = _dataset_class(dataset)
    meta = kind._load_metainfo(dataset.get("metainfo")) if hasattr(kind, "_load_metainfo") else {}
    if isinstance(meta.get("classes"), str):
        raise DataError(
            f"metainfo.classes is the string {meta['classes']!r}: write ({meta['classes']!r},) for a single class, or "
            "the name of a file with a class on each line."
        )
    return meta


def _check_classes(ann: Path, categories: list[str], classes: Iterable[str]) -> None:
    classes = list(classes)
    absent = [name for name in classes if name not in categories]
    if absent:
        raise DataError(
            f"{ann}: has no category {absent[0]!r}, which is a class of the config"
            f"{f' (nor {len(absent) - 1} others)' if absent[1:] else ''}.{nearest(absent[0], categories)} It has "
            f"{some(categories, 20)}; set these as metainfo=dict(classes=...)."
        )
    used = [name for name in categories if name in classes]
    if used != classes:
        # MMDetection numbers classes in the order of the file, but names them in that of the config.
        raise DataError(
            f"{ann}: has the config's classes in another order or twice, so MMDetection would confuse them; "
            f"list them in this order: {', '.join(map(repr, dict.fromkeys(used)))}."
        )


def head_classes(model: dict[str, Any]) -> set[int]:
    """Return the distinct numbers of classes of a detector's heads; a consistent config has one."""
    return set(_values(model, "num_classes", skip=("backbone", "rpn_head", "semantic_head")))


def _values(node: Any, key: str, skip: Sequence[str] = ()) -> Iterator[Any]:
    """Yield all values of a key, at any depth except below the keys to skip."""
    if isinstance(node, dict):
        if key in node:
            yield node[key]
        for name, value in node.items():
            if name not in skip:
                yield from _values(value, key, skip)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from _values(value, key, skip)


def some(items: Sequence, limit: int = 3) -> str:
    """``1, 2, 3, ... (17 in all)``"""
    shown = ", ".join(map(str, items[:limit]))
    return shown if len(items) <= limit else f"{shown}, ... ({len(items)} in total)"
