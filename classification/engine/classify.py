"""predict.py's work: the most probable classes of images, as text, JSON and contact sheets."""

import argparse
import glob
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset
from timm.data.readers import get_img_extensions
from timm.utils import natural_key

from engine import report
from engine.contact_sheet import Tile, draw_contact_sheets
from engine.data import decode_image
from engine.execution import compiled, mixed_precision
from engine.saved import Classifier, open_classifier
from mambavision.errors import DataError
from mambavision.files import check_writable, replacing
from mambavision.launch import pick_device, this_process
from mambavision.reporting import start_logging

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """One class that an image may show."""

    index: int
    name: str
    probability: float


def predict(args: argparse.Namespace) -> None:
    """Classify all inputs and write predictions.txt, predictions.json and contact sheets to --out."""
    start_logging()
    device = pick_device(args.device, this_process())
    out = Path(args.out)
    check_writable(out / "predictions.txt")
    files = find_images(args.inputs)
    classifier = open_classifier(args, args.model, args.checkpoint, device, exif_default=True)
    names = _class_names(args.class_names, classifier)
    forward = compiled(args, classifier.model)

    predictions: dict[Path, list[Candidate]] = {}
    corrupt: list[str] = []
    with report.progress("predicting", len(files), interval=100) as line:
        skipped = corrupt if args.skip_corrupt else None
        for batch_files, images in _batches(files, classifier, args.batch_size, skipped, line):
            probabilities = _probabilities(args, forward, images, device)
            for file, row in zip(batch_files, probabilities, strict=True):
                predictions[file] = _best(row, names, args.topk)
    if not predictions:
        raise DataError(f"none of the {len(files)} images could be decoded.")
    _write(out, predictions, args.sheet_limit, names, classifier)
    if corrupt:
        _logger.warning("%d of %d images could not be decoded and were left out: %s", len(corrupt), len(files), corrupt)


def find_images(inputs: Sequence[str]) -> list[Path]:
    """Return the image files that paths, folders and patterns name, each once, in natural order within each input.

    Raises:
        DataError: An input names no image.
    """
    extensions = get_img_extensions(as_set=True)
    files: dict[Path, None] = {}
    for given in inputs:
        paths = [Path(given)] if Path(given).exists() else [Path(path) for path in glob.glob(given, recursive=True)]
        found = [path for path in paths if path.is_file()]
        for folder in (path for path in paths if path.is_dir()):
            found += [path for path in folder.rglob("*") if path.suffix.lower() in extensions and path.is_file()]
        if not found:
            raise DataError(f"{given}: no image there; give image files, folders of images, or a quoted pattern.")
        files.update(dict.fromkeys(sorted(found, key=lambda path: natural_key(str(path)))))
    return list(files)


def _batches(
    files: list[Path],
    classifier: Classifier,
    batch_size: int,
    corrupt: list[str] | None,
    line: report.ProgressLine,
) -> Iterator[tuple[list[Path], torch.Tensor]]:
    """Yield files and their (batch, channels, H, W) images; broken files go to `corrupt`, or are an error if None."""
    transform = create_transform(**classifier.data_config)
    names: list[Path] = []
    images: list[torch.Tensor] = []
    for file in files:
        try:
            image = classifier.open_image(file)
        except DataError as error:
            if corrupt is None:
                raise DataError(f"{error}; leave such files out with --skip-corrupt.") from error
            corrupt.append(str(file))
        else:
            names.append(file)
            images.append(transform(image))
        line.step(str)
        if len(images) == batch_size:
            yield names, torch.stack(images)
            names, images = [], []
    if images:
        yield names, torch.stack(images)


@torch.inference_mode()
def _probabilities(
    args: argparse.Namespace,
    forward: Callable[[torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    device: torch.device,
) -> torch.Tensor:
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    with mixed_precision(args, device)():
        logits = forward(images.to(device, memory_format=memory_format))
    return logits.float().softmax(dim=1).cpu()


def _best(probabilities: torch.Tensor, names: list[str], count: int) -> list[Candidate]:
    values, indices = probabilities.topk(min(count, len(names)))
    return [
        Candidate(index, names[index], round(value, 6))
        for value, index in zip(values.tolist(), indices.tolist(), strict=True)
    ]


def _class_names(path: str | None, classifier: Classifier) -> list[str]:
    count = classifier.model.num_classes
    if path is not None:
        if not Path(path).is_file():
            raise DataError(f"{path}: no such file; give a text file with a class name on each line.")
        names = Path(path).read_text(encoding="utf-8").splitlines()
        if len(names) != count:
            raise DataError(f"{path}: has {len(names)} names, the model {count} classes.")
        return names
    unnamed = [f"class {index}" for index in range(count)]
    if classifier.classes is not None:  # fewer than outputs, if it was trained with a larger --num-classes
        return classifier.classes + unnamed[len(classifier.classes) :]
    subset = infer_imagenet_subset(classifier.model)
    if subset:
        info = ImageNetInfo(subset)
        return [info.index_to_description(index) for index in range(count)]
    return unnamed


def _write(
    out: Path, predictions: dict[Path, list[Candidate]], sheet_limit: int, names: list[str], classifier: Classifier
) -> None:
    text = "".join(
        f"{file}\n" + "".join(f"    {100 * each.probability:6.2f} %  {each.name}\n" for each in best)
        for file, best in predictions.items()
    )
    rows: list[dict[str, Any]] = [
        {"file": str(file), "predictions": [asdict(each) for each in best]} for file, best in predictions.items()
    ]
    with replacing(out / "predictions.txt") as file:
        file.write(text.encode())
    with replacing(out / "predictions.json") as file:
        file.write(json.dumps(rows, indent=2).encode())
    chosen = evenly_spread(list(predictions), sheet_limit)
    tiles = [_tile(file, predictions[file][0], names, classifier.exif_transpose) for file in chosen]
    sheets = draw_contact_sheets(tiles, out)
    print(text, end="")
    written = [out / "predictions.txt", out / "predictions.json", *sheets]
    _logger.info("wrote %s", ", ".join(map(str, written)))


def evenly_spread(files: list[Path], limit: int) -> list[Path]:
    """Return at most `limit` of the files."""
    if len(files) <= limit:
        return files
    return [files[index * len(files) // limit] for index in range(limit)]


def _tile(file: Path, best: Candidate, names: list[str], exif_transpose: bool) -> Tile:
    # In a folder that is called like a class, the prediction can be judged.
    truth = file.parent.name if file.parent.name in names else None
    return Tile(decode_image(file, exif_transpose=exif_transpose), best.name, best.probability, truth)
