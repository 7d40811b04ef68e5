"""Classifying images: the most probable classes as text, JSON and contact sheets."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset

from engine.acceleration import compiled, mixed_precision
from engine.contact_sheet import Tile, draw_contact_sheets
from engine.data import decode_image, image_extensions
from engine.model import Classifier, open_classifier
from engine.options import PredictOptions
from mambavision.errors import DataError, NonFiniteError
from mambavision.files import check_writable, replacing
from mambavision.inputs import find_files
from mambavision.running.logs import start_logging
from mambavision.running.process import pick_device, this_process
from mambavision.running.progress import ProgressLine, progress
from mambavision.running.ranges import check_ranges
from mambavision.text import as_json, escaped

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """A class that an image may show."""

    index: int
    name: str
    probability: float


def predict(options: PredictOptions) -> None:
    """Classify all inputs and write predictions.txt, predictions.json and contact sheets to --out."""
    check_ranges(options.flat())
    start_logging()
    device = pick_device(options.preprocessing.device, this_process())
    out = Path(options.out)
    check_writable(out / "predictions.txt")
    files = find_images(options.inputs, out, results="contact_sheet*.png")
    classifier = open_classifier(options.preprocessing, options.model, options.checkpoint, device, exif_default=True)
    names = _class_names(options.class_names, classifier)
    forward = compiled(options.speed, classifier.model)

    predictions: dict[Path, list[Candidate]] = {}
    corrupt: list[str] = []
    with progress("predicting", len(files), interval=100) as line:
        skipped = corrupt if options.skip_corrupt else None
        for batch_files, images in _batches(files, classifier, options.batch_size, skipped, line):
            probabilities = _probabilities(options, forward, images, device)
            for file, row in zip(batch_files, probabilities, strict=True):
                if not row.isfinite().all():
                    raise NonFiniteError(f"{file}: the model's outputs are not finite; try it without --amp.")
                predictions[file] = _best(row, names, options.topk)
    if not predictions:
        raise DataError(f"none of the {len(files)} images could be decoded.")
    _write(out, predictions, options.sheet_limit, names, classifier)
    if corrupt:
        _logger.warning("%d of %d images could not be decoded and were skipped: %s", len(corrupt), len(files), corrupt)


def find_images(inputs: Sequence[str], out: Path | None = None, results: str = "") -> list[Path]:
    """Return the image files given by paths, folders and patterns; see `mambavision.inputs.find_files`."""
    nothing = "no image there; give image files, folders of images, or a quoted pattern."
    return list(find_files(inputs, image_extensions(), out, results, nothing=nothing))


def _batches(
    files: list[Path],
    classifier: Classifier,
    batch_size: int,
    corrupt: list[str] | None,
    line: ProgressLine,
) -> Iterator[tuple[list[Path], torch.Tensor]]:
    """Yield files and their (batch, channels, H, W) images; add broken files to `corrupt`, or raise if it is None."""
    transform = create_transform(**classifier.data_config)
    names: list[Path] = []
    images: list[torch.Tensor] = []
    for file in files:
        try:
            image = classifier.open_image(file)
        except DataError as error:
            if corrupt is None:
                raise DataError(f"{error}; skip such files with --skip-corrupt.") from error
            corrupt.append(str(file))
        else:
            names.append(file)
            images.append(transform(image))
        line.step()
        if len(images) == batch_size:
            yield names, torch.stack(images)
            names, images = [], []
    if images:
        yield names, torch.stack(images)


@torch.inference_mode()
def _probabilities(
    options: PredictOptions,
    forward: Callable[[torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    device: torch.device,
) -> torch.Tensor:
    memory_format = torch.channels_last if options.preprocessing.channels_last else torch.contiguous_format
    with mixed_precision(options.speed, device)():
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
        names = _read_lines(path)
        if len(names) != count:
            raise DataError(f"{path}: has {len(names)} names, the model {count} classes.")
        return names
    unnamed = [f"class {index}" for index in range(count)]
    if classifier.classes is not None:  # fewer than outputs if it was trained with a larger --num-classes
        return classifier.classes + unnamed[len(classifier.classes) :]
    subset = infer_imagenet_subset(classifier.model)
    if subset:
        info = ImageNetInfo(subset)
        return [info.index_to_description(index) for index in range(count)]
    return unnamed


def _read_lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text in UTF-8 ({error}).") from error


def _write(
    out: Path, predictions: dict[Path, list[Candidate]], sheet_limit: int, names: list[str], classifier: Classifier
) -> None:
    text = "".join(
        f"{escaped(str(file))}\n"
        + "".join(f"    {100 * each.probability:6.2f} %  {escaped(each.name)}\n" for each in best)
        for file, best in predictions.items()
    )
    rows: list[dict[str, Any]] = [
        {"file": str(file), "predictions": [asdict(each) for each in best]} for file, best in predictions.items()
    ]
    with replacing(out / "predictions.txt") as file:
        file.write(text.encode())
    with replacing(out / "predictions.json") as file:
        file.write(as_json(rows).encode())
    chosen = evenly_spread(list(predictions), sheet_limit)
    tiles = [_tile(file, predictions[file][0], names, classifier.exif_transpose) for file in chosen]
    sheets = draw_contact_sheets(tiles, out)
    print(text, end="")
    written = [out / "predictions.txt", out / "predictions.json", *sheets]
    _logger.info("wrote %s", ", ".join(map(str, written)))


def evenly_spread(files: list[Path], limit: int) -> list[Path]:
    """Return at most `limit` of the files, evenly spaced."""
    if len(files) <= limit:
        return files
    return [files[index * len(files) // limit] for index in range(limit)]


def _tile(file: Path, best: Candidate, names: list[str], exif_transpose: bool) -> Tile:
    # The prediction can be judged if the folder has the name of a class.
    truth = escaped(file.parent.name) if file.parent.name in names else None
    return Tile(decode_image(file, exif_transpose=exif_transpose), escaped(best.name), best.probability, truth)
