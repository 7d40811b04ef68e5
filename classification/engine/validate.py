"""Scoring one or many models on a labelled split."""

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

from engine import data
from engine.acceleration import compiled, mixed_precision
from engine.batches import eval_loader
from engine.evaluate import evaluate
from engine.model import Classifier, open_classifier
from engine.options import ValidateOptions
from engine.options.validate import ModelOptions, ScoringOptions
from mambavision.errors import DataError, NonFiniteError, UserError
from mambavision.factory import expand_model_name
from mambavision.files import check_writable, replacing
from mambavision.running.group import Group
from mambavision.running.logs import start_logging
from mambavision.running.process import pick_device, this_process
from mambavision.running.progress import progress
from mambavision.running.ranges import check_ranges
from mambavision.text import as_json, csv_cell

_logger = logging.getLogger(__name__)

_CHECKPOINT_SUFFIXES = (".pth.tar", ".pth", ".safetensors")
_IMAGENET_VALIDATION_IMAGES = 50_000


def validate(options: ValidateOptions) -> None:
    """Score the given models; print the results as JSON after a line ``--result``."""
    check_ranges(options.flat())
    given, scoring = options.data, options.scoring
    if given.data and given.data_dir and given.data != given.data_dir:
        raise UserError(f"two data folders: {given.data} and --data-dir {given.data_dir}; give one.")
    given.data_dir = given.data_dir or given.data
    data.check_data_options(given.dataset, given.skip_corrupt, options.preprocessing.exif_transpose)
    if not given.dataset:
        data.find_split(given.data_dir, given.split, may_be_root=True)  # before any model is created or downloaded
    process = this_process()
    group = Group(process, pick_device(options.preprocessing.device, process))
    start_logging(group.is_first)
    if scoring.results_file and group.is_first:
        check_writable(scoring.results_file)
    if options.model.pretrained and options.model.checkpoint:
        _logger.info("--pretrained has no effect: the weights are those of --checkpoint")
    group.join()
    todo = list(jobs(options.model))
    if len(todo) == 1:
        results = [_score_with_retry(options, _opened(options, *todo[0], group.device), group, scoring.retry)]
    else:
        results = [_score_or_explain(options, *job, group) for job in todo]
        if all("error" in result for result in results):
            raise UserError(f"none of the {len(results)} models could be scored; the last: {results[-1]['error']}")
    if group.is_first:
        _publish(scoring, results)
    group.leave()


def jobs(options: ModelOptions) -> Iterator[tuple[str | None, str]]:
    """Yield (model name, checkpoint) pairs to score; None for the checkpoint's model, empty for released weights."""
    folder = Path(options.checkpoint)
    if options.checkpoint and folder.is_dir():
        files = [path for path in folder.iterdir() if path.name.endswith(_CHECKPOINT_SUFFIXES)]
        if not files:
            raise UserError(f"{folder}: contains no checkpoints ({', '.join(_CHECKPOINT_SUFFIXES)}).")
        yield from ((options.model, str(path)) for path in sorted(files, key=lambda path: natural_key(path.name)))
    elif options.checkpoint:
        yield options.model, options.checkpoint
    elif options.model is None:
        raise UserError("nothing to score: give --checkpoint, or --model for released weights.")
    else:
        yield from ((name, "") for name in _model_names(options.model))


def _model_names(model: str) -> list[str]:
    if Path(model).is_file():
        return Path(model).read_text(encoding="utf-8").split()
    return expand_model_name(model, pretrained=True, include_tags=False)


@dataclass
class _Opened:
    """A classifier and the data to score it on."""

    classifier: Classifier
    checkpoint: str
    dataset: data.ImageData
    columns: list[int] | None  # columns of the logits to use; None for all


def _opened(options: ValidateOptions, name: str | None, checkpoint: str, device: torch.device) -> _Opened:
    use_test_size = not options.model.use_train_size
    classifier = open_classifier(
        options.preprocessing, name, checkpoint, device, exif_default=False, use_test_size=use_test_size
    )
    dataset = data.open_split(
        data_dir=options.data.data_dir,
        split=options.data.split,
        dataset=options.data.dataset,
        class_map=options.data.class_map,
        channels=classifier.data_config["input_size"][0],
        download=options.data.dataset_download,
        exif_transpose=classifier.exif_transpose,
        skip_corrupt=options.data.skip_corrupt,
    )
    columns = _columns(options.scoring.valid_labels, classifier.model.num_classes)
    _check_classes(dataset, classifier, columns, checkpoint)
    return _Opened(classifier, checkpoint, dataset, columns)


def _score_or_explain(options: ValidateOptions, name: str | None, checkpoint: str, group: Group) -> dict[str, Any]:
    """Score one of many models; if it cannot be opened, which all processes notice alike, return the reason."""
    try:
        opened = _opened(options, name, checkpoint, group.device)
    except UserError as error:
        _logger.warning("skipped: %s", error)
        return {"model": name} | ({"checkpoint": checkpoint} if checkpoint else {}) | {"error": str(error)}
    return _score_with_retry(options, opened, group, retry=True)


def _score_with_retry(options: ValidateOptions, opened: _Opened, group: Group, retry: bool) -> dict[str, Any]:
    batch_size = options.data.batch_size
    while True:
        try:
            return _score(options, opened, group, batch_size)
        except RuntimeError as error:
            smaller = decay_batch_step(batch_size)
            is_memory = "memory" in str(error) and check_batch_size_retry(str(error))
            if not retry or not is_memory or not smaller:
                raise
            _logger.warning("out of memory with batches of %d: trying %d", batch_size, smaller)
            batch_size = smaller
            torch.cuda.empty_cache()


def _score(options: ValidateOptions, opened: _Opened, group: Group, batch_size: int) -> dict[str, Any]:
    classifier, dataset, device = opened.classifier, opened.dataset, group.device
    model, is_test_pooled = _prepared(options, classifier)
    config = classifier.data_config | ({"crop_pct": 1.0} if is_test_pooled else {})
    loader = eval_loader(
        dataset,
        config,
        batch_size=batch_size,
        workers=options.data.workers,
        group=group,
        prefetch=device.type != "cpu" and not options.data.no_prefetcher,
        pin_memory=options.data.pin_mem,
    )
    autocast = mixed_precision(options.speed, device)
    memory_format = torch.channels_last if options.preprocessing.channels_last else torch.contiguous_format
    with torch.inference_mode(), autocast():  # warm-up, for compilation and the choice of kernels
        model(torch.zeros(batch_size, *config["input_size"], device=device).to(memory_format=memory_format))
    real_labels = _real_labels(options.scoring.real_labels, dataset, group)
    with progress(classifier.name, len(loader), options.scoring.log_freq, group.is_first) as line:
        scores = evaluate(
            model,
            loader,
            device,
            autocast=autocast,
            memory_format=memory_format,
            distributed=group.is_distributed,
            classes=opened.columns,
            real_labels=real_labels,
            on_batch=lambda batch, images: line.step(),
        )
    data.log_skipped(dataset)
    if not math.isfinite(scores["loss"]):
        raise NonFiniteError(f"{classifier.name}: its outputs are not finite; try it without --amp.")
    if real_labels is not None:
        scores["top1"], scores["top5"] = real_labels.get_accuracy(k=1), real_labels.get_accuracy(k=5)
    result = _result(classifier, config, scores)
    if opened.checkpoint:
        result |= {"checkpoint": opened.checkpoint, "weights": "ema" if options.preprocessing.use_ema else "raw"}
    return result


def _prepared(options: ValidateOptions, classifier: Classifier) -> tuple[nn.Module, bool]:
    model: Any = classifier.model
    is_test_pooled = False
    if options.model.test_pool:
        model, is_test_pooled = apply_test_time_pool(model, classifier.data_config)
    model = compiled(options.speed, model)
    if options.model.num_gpu > 1:
        model = nn.DataParallel(model, device_ids=list(range(options.model.num_gpu)))
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


def _check_classes(dataset: data.ImageData, classifier: Classifier, columns: list[int] | None, checkpoint: str) -> None:
    names = data.class_names(dataset)
    if columns is None:
        data.check_same_classes(classifier.classes, names, checkpoint, "the data")
    predicted = len(columns) if columns is not None else classifier.model.num_classes
    # A classifier may have unused outputs (--num-classes in training) if its checkpoint names the used ones.
    has_unused = columns is None and classifier.classes == names and len(names or ()) < predicted
    if names is not None and len(names) != predicted and not has_unused:
        raise DataError(
            f"the data has {len(names)} classes and the model predicts {predicted}: give a checkpoint trained on these "
            "classes, or say which of the model's classes they are with --valid-labels or --class-map."
        )


def _real_labels(path: str | None, dataset: data.ImageData, group: Group) -> RealLabelsImagenet | None:
    if path is None:
        return None
    if len(dataset) != _IMAGENET_VALIDATION_IMAGES or group.is_distributed:
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


def _publish(options: ScoringOptions, results: list[dict[str, Any]]) -> None:
    results.sort(key=lambda result: result.get("top1", -1), reverse=True)
    text = as_json(results[0] if len(results) == 1 else results, indent=4)
    if options.results_file:
        with replacing(options.results_file) as file:
            file.write((text if options.results_format == "json" else _as_csv(results)).encode())
    print(f"--result\n{text}", flush=True)


def _as_csv(results: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=dict.fromkeys(key for result in results for key in result))
    writer.writeheader()
    writer.writerows({key: csv_cell(value) for key, value in result.items()} for result in results)
    return text.getvalue()
