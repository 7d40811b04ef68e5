"""Options of predict.py."""

from dataclasses import dataclass

from engine.options.fields import ProgramOptions, group, non_negative, option, positive
from engine.options.shared import (
    PreprocessingOptions,
    SpeedOptions,
    checkpoint_option,
    inputs_option,
    model_option,
)


@dataclass
class PredictOptions(ProgramOptions):
    """Options of predict.py."""

    description = "Classify images; writes predictions.json, predictions.txt and contact sheets."

    inputs: list[str] = inputs_option()
    out: str = option("predictions", metavar="DIR", help="output folder")
    topk: int = option(5, type=positive, help="number of classes to list for each image")
    class_names: str | None = option(
        None, metavar="FILE", help="text file with one class name per line; default: the checkpoint's"
    )
    sheet_limit: int = option(100, type=non_negative, help="images on contact sheets, evenly spaced over the inputs")
    skip_corrupt: bool = option(False, help="skip images that cannot be decoded, and count them")
    batch_size: int = option(32, "-b", type=positive, help="images per batch")
    model: str | None = model_option()
    checkpoint: str = checkpoint_option()
    preprocessing: PreprocessingOptions = group(PreprocessingOptions, "weights and preprocessing")
    speed: SpeedOptions = group(SpeedOptions, "speed")
