"""validate.py's work: one model or many, on one split."""

import argparse
import csv
import io
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import RealLabelsImagenet
from timm.layers import apply_test_time_pool
from timm.utils import check_batch_size_retry, decay_batch_step, natural_key
from torch import nn
from torch.utils.data import Dataset

from engine import data, report
from engine.evaluate import evaluate
from engine.execution import compiled, mixed_precision
from engine.loaders import Share, eval_loader
from engine.saved import Classifier, open_classifier
from mambavision.errors import DataError, UserError
from mambavision.factory import expand_model_name
from mambavision.files import check_writable, replacing
from mambavision.finite import NonFiniteError
from mambavision.launch import Process, join, leave, pick_device, this_process
from mambavision.ranges import check_ranges
from mambavision.reporting import start_logging
from mambavision.text import as_json, csv_cell

_logger = logging.getLogger(__name__)

_CHECKPOINT_SUFFIXES = (".pth.tar", ".pth", ".safetensors")
_IMAGENET_VALIDATION_IMAGES = 50_000


def validate(args: argparse.Namespace) -> None:
    """Score everything that the options name; print the results as JSON after a line ``--result``."""
    check_ranges(args)
    if args.data and args.data_dir and args.data != args.data_dir:
        raise UserError(f"two data folders: {args.data} and --data-dir {args.data_dir}; give one.")
    args.data_dir = args.data_dir or args.data
    data.check_options(args)
    if not args.dataset:
        data.find_split(args.data_dir, args.split, may_be_root=True)  # before any model is made or downloaded
    process = this_process()
    device = pick_device(args.device, process)
    start_logging(process.is_first)
    if args.results_file and process.is_first:
        check_writable(args.results_file)
    if args.pretrained and args.checkpoint:
        _logger.info("--pretrained does nothing here: the weights are those of --checkpoint")
    join(process, device)
    todo = list(jobs(args))
    if len(todo) == 1:
        results = [_score_with_retry(args, _opened(args, *todo[0], device), process, device)]
    else:
        results = [_score_or_explain(args, *job, process, device) for job in todo]
        if all("error" in result for result in results):
            raise UserError(f"none of the {len(results)} models could be scored; the last: {results[-1]['error']}")
    if process.is_first:
        _publish(args, results)
    leave(process)  # not after an error: the other processes would be waited for in vain


def jobs(args: argparse.Namespace) -> Iterator[tuple[str | None, str]]:
    """Yield what to score: (model name or None for the checkpoint's, checkpoint or empty for released weights)."""
    folder = Path(args.checkpoint)
    if args.checkpoint and folder.is_dir():
        files = [path for path in folder.iterdir() if path.name.endswith(_CHECKPOINT_SUFFIXES)]
        if not files:
            raise UserError(f"{folder}: holds no checkpoints ({', '.join(_CHECKPOINT_SUFFIXES)}).")
        yield from ((args.model, str(path)) for path in sorted(files, key=lambda path: natural_key(path.name)))
    elif args.checkpoint:
        yield args.model, args.checkpoint
    elif args.model is None:
        raise UserError("nothing to score: give --checkpoint, or --model for released weights.")
    else:
        yield from ((name, "") for name in _model_names(args.model))


def _model_names(model: str) -> list[str]:
    if Path(model).is_file():
        return Path(model).read_text(encoding="utf-8").split()
    return expand_model_name(model, pretrained=True, include_tags=False)


@dataclass
class _Opened:
    """A classifier and the data to score it on."""

    classifier: Classifier
    checkpoint: str
    dataset: Dataset
    columns: list[int] | None  # of the logits, if not all


def _opened(args: argparse.Namespace, name: str | None, checkpoint: str, device: torch.device) -> _Opened:
    classifier = open_classifier(args, name, checkpoint, device, exif_default=False)
    dataset = data.open_split(
        data_dir=args.data_dir,
        split=args.split,
        dataset=args.dataset,
        class_map=args.class_map,
        channels=classifier.data_config["input_size"][0],
        download=args.dataset_download,
        exif_transpose=classifier.exif_transpose,
        skip_corrupt=args.skip_corrupt,
    )
    columns = _columns(args.valid_labels, classifier.model.num_classes)
    _check_classes(dataset, classifier, columns, checkpoint)
    return _Opened(classifier, checkpoint, dataset, columns)


def _score_or_explain(
    args: argparse.Namespace, name: str | None, checkpoint: str, process: Process, device: torch.device
) -> dict[str, Any]:
    """Score one of many; if it cannot even be opened, which all processes notice alike, return why."""
    try:
        opened = _opened(args, name, checkpoint, device)
    except UserError as error:
        _logger.warning("left out: %s", error)
        return {"model": name} | ({"checkpoint": checkpoint} if checkpoint else {}) | {"error": str(error)}
    return _score_with_retry(args, opened, process, device, is_retried=True)


def _score_with_retry(
    args: argparse.Namespace, opened: _Opened, process: Process, device: torch.device, is_retried: bool = False
) -> dict[str, Any]:
    batch_size = args.batch_size
    while True:
        try:
            return _score(args, opened, process, device, batch_size)
        except RuntimeError as error:
            smaller = decay_batch_step(batch_size)
            is_memory = "memory" in str(error) and check_batch_size_retry(str(error))
            if not (args.retry or is_retried) or not is_memory or not smaller:
                raise
            _logger.warning("out of memory with batches of %d: trying %d", batch_size, smaller)
            batch_size = smaller
            torch.cuda.empty_cache()


def _score(
    args: argparse.Namespace, opened: _Opened, process: Process, device: torch.device, batch_size: int
) -> dict[str, Any]:
    classifier, dataset = opened.classifier, opened.dataset
    model, is_test_pooled = _prepared(args, classifier)
    config = classifier.data_config | ({"crop_pct": 1.0} if is_test_pooled else {})
    loader = eval_loader(
        dataset,
        config,
        batch_size=batch_size,
        workers=args.workers,
        device=device,
        share=Share(process.rank, process.world_size),
        prefetch=device.type != "cpu" and not args.no_prefetcher,
        pin_memory=args.pin_mem,
    )
    autocast = mixed_precision(args, device)
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    with torch.inference_mode(), autocast():  # warm up: compilation and kernel choice are not part of the pass
        model(torch.zeros(batch_size, *config["input_size"], device=device).to(memory_format=memory_format))
    real_labels = _real_labels(args.real_labels, dataset, process)
    with report.progress(classifier.name, len(loader), args.log_freq, process.is_first) as line:
        scores = evaluate(
            model,
            loader,
            device,
            autocast=autocast,
            memory_format=memory_format,
            distributed=process.is_distributed,
            classes=opened.columns,
            real_labels=real_labels,
            on_batch=lambda batch, images: line and line.step(str),
        )
    data.log_skipped(dataset)
    if not math.isfinite(scores["loss"]):
        raise NonFiniteError(f"{classifier.name}: its outputs are not finite; try it without --amp.")
    if real_labels is not None:
        scores["top1"], scores["top5"] = real_labels.get_accuracy(k=1), real_labels.get_accuracy(k=5)
    result = _result(classifier, config, scores)
    if opened.checkpoint:
        result |= {"checkpoint": opened.checkpoint, "weights": "ema" if args.use_ema else "raw"}
    return result


def _prepared(args: argparse.Namespace, classifier: Classifier) -> tuple[nn.Module, bool]:
    model, is_test_pooled = classifier.model, False
    if args.test_pool:
        model, is_test_pooled = apply_test_time_pool(model, classifier.data_config)
    model = compiled(args, model)
    if args.num_gpu > 1:
        model = nn.DataParallel(model, device_ids=list(range(args.num_gpu)))
    return model, is_test_pooled


def _columns(path: str | None, num_classes: int) -> list[int] | None:
    if path is None:
        return None
    try:
        columns = [int(line) for line in Path(path).read_text(encoding="utf-8").split()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: is not a list of class indices, one on each line ({error}).") from error
    outside = [index for index in columns if not 0 <= index < num_classes]
    if outside:
        raise DataError(f"{path}: index {outside[0]} is outside of the model's {num_classes} classes.")
    return columns


def _check_classes(dataset: Dataset, classifier: Classifier, columns: list[int] | None, checkpoint: str) -> None:
    names = data.class_names(dataset)
    if columns is None:
        data.check_same_classes(classifier.classes, names, checkpoint, "the data")
    predicted = len(columns) if columns is not None else classifier.model.num_classes
    # A classifier may have outputs to spare (--num-classes in training) if its checkpoint names the others.
    has_spare = columns is None and classifier.classes == names and len(names or ()) < predicted
    if names is not None and len(names) != predicted and not has_spare:
        raise DataError(
            f"the data has {len(names)} classes and the model predicts {predicted}: give a checkpoint trained on these "
            "classes, or say which of the model's classes they are with --valid-labels or --class-map."
        )


def _real_labels(path: str | None, dataset: Dataset, process: Process) -> RealLabelsImagenet | None:
    if path is None:
        return None
    if len(dataset) != _IMAGENET_VALIDATION_IMAGES or process.is_distributed:
        raise UserError(
            f"--real-labels needs the {_IMAGENET_VALIDATION_IMAGES} ImageNet validation images ({len(dataset)} found) "
            "and a single process."
        )
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file; it comes with the ImageNet-ReaL labels as real.json.")
    return RealLabelsImagenet(dataset.filenames(basename=True), real_json=path)


def _result(classifier: Classifier, config: dict[str, Any], scores: dict[str, float]) -> dict[str, Any]:
    return {
        "model": classifier.name,
        "top1": round(scores["top1"], 4),
        "top1_err": round(100 - scores["top1"], 4),
        "top5": round(scores["top5"], 4),
        "top5_err": round(100 - scores["top5"], 4),
        "loss": round(scores["loss"], 4),
        "param_count": round(sum(parameter.numel() for parameter in classifier.model.parameters()) / 1e6, 2),
        "img_size": config["input_size"][-1],
        "crop_pct": config["crop_pct"],
        "interpolation": config["interpolation"],
    }


def _publish(args: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    results.sort(key=lambda result: result.get("top1", -1), reverse=True)
    text = as_json(results[0] if len(results) == 1 else results, indent=4)
    if args.results_file:
        with replacing(args.results_file) as file:
            file.write((text if args.results_format == "json" else _as_csv(results)).encode())
    print(f"--result\n{text}", flush=True)


def _as_csv(results: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=dict.fromkeys(key for result in results for key in result))
    writer.writeheader()
    writer.writerows({key: csv_cell(value) for key, value in result.items()} for result in results)
    return text.getvalue()
