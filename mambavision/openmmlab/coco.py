"""Data sets in COCO's layout: what is wrong with them, and with a config that names them, before training starts."""

import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mambavision.errors import DataError, nearest
from mambavision.launch import this_process

_NEEDED = {  # by MMDetection
    "images": {"id", "file_name", "width", "height"},
    "annotations": {"id", "image_id", "category_id", "bbox", "area"},
    "categories": {"id", "name"},
}

_logger = logging.getLogger(__name__)


@dataclass
class Findings:
    """What is wrong with annotations and images: problems, and remarks on what MMDetection copes with."""

    content: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def read_annotations(ann: Path) -> dict[str, list[dict[str, Any]]]:
    """Read an annotation file.

    Raises:
        DataError: It is missing or not in COCO's format, has no images or objects, or an id twice.
    """
    if not ann.is_file():
        siblings = [file.name for file in ann.parent.glob("*.json")]
        raise DataError(f"{ann}: no such file.{nearest(ann.name, siblings)}")
    if not ann.stat().st_size:
        raise DataError(f"{ann}: the file is empty; download or copy it again.")
    try:
        content = json.loads(ann.read_bytes())
    except (ValueError, OSError) as error:
        raise DataError(f"{ann}: is no JSON, perhaps cut short ({error}); download or copy it again.") from None
    for key, needed in _NEEDED.items():
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise DataError(f"{ann}: has no list of {key}; it must be in COCO's format for object detection.")
        if not entries:
            raise DataError(f"{ann}: has no {key}; check how it was exported.")
        for position, entry in enumerate(entries):
            if not isinstance(entry, dict) or not needed <= entry.keys():
                lacking = needed - entry.keys() if isinstance(entry, dict) else needed
                raise DataError(f"{ann}: entry {position} of {key} has no {', '.join(sorted(lacking))}.")
        repeated = [number for number, count in Counter(entry["id"] for entry in entries).items() if count > 1]
        if repeated:
            raise DataError(f"{ann}: {key} have the same id: {some(repeated)}; ids must be unique.")
    return content


def examine_annotations(findings: Findings) -> None:
    """Add what is wrong with the objects of `findings.content`."""
    sizes = {image["id"]: (image["width"], image["height"]) for image in findings.content["images"]}
    categories = {category["id"] for category in findings.content["categories"]}
    wrong: dict[str, list[int]] = {
        "image_id of no image": [],
        "category_id of no category": [],
        "bbox is not [x, y, width, height]": [],
    }
    odd: dict[str, list[int]] = {"box without area": [], "box outside the image": [], "no segmentation": []}
    for entry in findings.content["annotations"]:
        number, box = entry["id"], entry["bbox"]
        if entry["category_id"] not in categories:
            wrong["category_id of no category"].append(number)
        if not (isinstance(box, list) and len(box) == 4 and all(isinstance(value, (int, float)) for value in box)):
            wrong["bbox is not [x, y, width, height]"].append(number)
        elif entry["image_id"] not in sizes:
            wrong["image_id of no image"].append(number)
        else:
            x, y, box_width, box_height = box
            width, height = sizes[entry["image_id"]]
            if not (box_width > 0 and box_height > 0):
                odd["box without area"].append(number)
            elif x < -1 or y < -1 or x + box_width > width + 1 or y + box_height > height + 1:
                odd["box outside the image"].append(number)
        if not entry.get("segmentation"):
            odd["no segmentation"].append(number)
    findings.problems += [f"{what}: annotation {some(ids)}" for what, ids in wrong.items() if ids]
    findings.remarks += [f"{what}: annotation {some(ids)}" for what, ids in odd.items() if ids]
    empty = len(sizes.keys() - {entry["image_id"] for entry in findings.content["annotations"]})
    if empty:
        findings.remarks.append(f"images without objects: {empty}")


def missing_files(images: Iterable[dict[str, Any]], folder: Path) -> list[str]:
    """Return the file names that are not in the folder, which is listed once: it may have 118,287 files."""
    there = {
        os.path.relpath(os.path.join(place, name), folder) for place, _, names in os.walk(folder) for name in names
    }
    names = (str(image["file_name"]) for image in images)
    return [name for name in names if name not in there and not (folder / name).exists()]


# Against a config


def check_datasets(cfg: Config, phases: Sequence[str] = ("train", "val")) -> None:
    """Check the data sets that a config names, as far as they are in COCO's layout.

    Of several processes on a machine the first one does it.

    Args:
        cfg: Config of MMDetection.
        phases: Which data sets: "train", "val", "test".

    Raises:
        DataError: The run could not start, would break off, or would take classes for others.
    """
    if this_process().local_rank:
        return
    for phase in phases:
        datasets = _coco_datasets((cfg.get(f"{phase}_dataloader") or {}).get("dataset"))
        files = [_check_dataset(dataset, cfg.get("model", {})) for dataset in datasets]
        evaluators = cfg.get(f"{phase}_evaluator") or []
        for evaluator in [evaluators] if isinstance(evaluators, dict) else evaluators:
            truth = evaluator.get("ann_file")
            if truth and files and Path(truth).resolve() not in [file.resolve() for file in files]:
                raise DataError(
                    f"{phase}_evaluator.ann_file is {truth}, but {phase}_dataloader reads {files[0]}: set both alike."
                )


def _coco_datasets(node: Any) -> Iterator[dict[str, Any]]:
    """Yield the configs of all CocoDatasets among data sets that may be wrapped."""
    from mmdet.datasets import CocoDataset

    if isinstance(node, (list, tuple)):
        for each in node:
            yield from _coco_datasets(each)
    elif isinstance(node, dict):
        kind = _dataset_class(node)
        # Subclasses with a format of their own, such as LVIS's, are for MMDetection to check.
        if kind is not None and getattr(kind, "load_data_list", None) is CocoDataset.load_data_list:
            yield node
        for key in ("dataset", "datasets"):
            yield from _coco_datasets(node.get(key))


def _dataset_class(dataset: dict[str, Any]) -> type | None:
    from mmdet.registry import DATASETS

    kind = dataset.get("type")
    return DATASETS.get(kind) if isinstance(kind, str) else kind


def _check_dataset(dataset: dict[str, Any], model: dict[str, Any]) -> Path:
    """Check one data set against the model; return its annotation file."""
    root = Path(dataset.get("data_root") or "")
    ann, images = root / dataset.get("ann_file", ""), root / dataset.get("data_prefix", {}).get("img", "")
    for folder in (root, images):
        if not folder.is_dir():
            raise DataError(
                f"{folder}: no such folder; the data set needs the annotations {ann} and images in {images}: set "
                "data_root in the config, or for this project's configs the environment variable COCO_ROOT."
            )
    findings = Findings(read_annotations(ann))
    classes = dataset_meta(dataset)["classes"]
    _check_classes(ann, [category["name"] for category in findings.content["categories"]], classes)
    heads = head_classes(model)
    if heads - {len(classes)}:
        raise DataError(
            f"{ann}: the config trains {len(classes)} classes, but num_classes of the model's heads is "
            f"{' and '.join(map(str, sorted(heads)))}: set it to {len(classes)} in all of them."
        )
    missing = missing_files(findings.content["images"], images)
    if missing:
        raise DataError(f"{images}: has not all images that {ann} names: {some(missing)}.")
    examine_annotations(findings)
    for remark in findings.problems + findings.remarks:
        _logger.warning("%s: %s", ann, remark)
    trained = {category["id"] for category in findings.content["categories"] if category["name"] in classes}
    bare = [
        each["id"]
        for each in findings.content["annotations"]
        if not each.get("segmentation") and each["category_id"] in trained and each["area"] > 0
    ]
    if bare and True in _values(dataset.get("pipeline"), "with_mask"):
        raise DataError(
            f"{ann}: annotations without segmentation: {some(bare)}; a model with masks needs it of every object: "
            "remove these objects, or train a detector of boxes."
        )
    return ann


def dataset_meta(dataset: dict[str, Any]) -> dict[str, Any]:
    """Return what a data set's config or, failing that, its class says about it, such as ``classes``."""
    while "type" in dataset and "metainfo" not in dataset and ("dataset" in dataset or "datasets" in dataset):
        dataset = dataset["dataset"] if "dataset" in dataset else dataset["datasets"][0]
    kind = _dataset_class(dataset)
    meta = kind._load_metainfo(dataset.get("metainfo")) if hasattr(kind, "_load_metainfo") else {}
    if isinstance(meta.get("classes"), str):
        raise DataError(
            f"metainfo.classes is the text {meta['classes']!r}: write ({meta['classes']!r},) for a single class, or "
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
            f"{some(categories, 20)}: name these as metainfo=dict(classes=...)."
        )
    used = [name for name in categories if name in classes]
    if used != classes:
        # MMDetection numbers classes in the order of the file and names them in that of the config.
        raise DataError(
            f"{ann}: has the config's classes in another order or twice, and MMDetection would mix up their names; "
            f"write them in this order: {', '.join(map(repr, dict.fromkeys(used)))}."
        )


def head_classes(model: dict[str, Any]) -> set[int]:
    """Return the numbers of classes of a detector's heads; without errors in the config there is one."""
    return set(_values(model, "num_classes", skip=("backbone", "rpn_head", "semantic_head")))


def _values(node: Any, key: str, skip: Sequence[str] = ()) -> Iterator[Any]:
    """Yield everything that has this key, at any depth, but not below the keys to skip."""
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
    return shown if len(items) <= limit else f"{shown}, ... ({len(items)} in all)"
