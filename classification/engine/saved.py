"""Opening a classifier as it was trained: model, weights, preprocessing and class names from one checkpoint."""

import argparse
import logging
import os
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import nn

from engine import metadata
from engine.build import create_any, data_config, input_size
from engine.data import DECODING_ERRORS, decode_image, image_mode, why_undecodable
from mambavision.checkpoint import EMA_KEYS, load_weights, read_checkpoint
from mambavision.errors import CheckpointError, DataError, UserError

_logger = logging.getLogger(__name__)


@dataclass
class Classifier:
    """A model with what is needed to use it."""

    name: str
    model: nn.Module
    data_config: dict[str, Any]  # timm's: input_size, mean, std, crop_pct, crop_mode, interpolation
    classes: list[str] | None  # None if the checkpoint does not name them
    exif_transpose: bool

    def open_image(self, file: str | os.PathLike) -> Image.Image:
        """Return an image with the channels of the model.

        Raises:
            DataError: It cannot be decoded.
        """
        try:
            return decode_image(file, image_mode(self.data_config["input_size"][0]), self.exif_transpose)
        except DECODING_ERRORS as error:
            raise DataError(f"{file}: cannot be decoded ({why_undecodable(error)})") from error


def open_classifier(
    args: argparse.Namespace,
    name: str | None,
    checkpoint: str,
    device: torch.device,
    *,
    exif_default: bool,
    untrained: bool = False,
) -> Classifier:
    """Create a model and load its weights.

    Options win over what the checkpoint says, and the checkpoint over the model's defaults.

    Args:
        args: Options of validate.py or predict.py.
        name: Model name; None to take the checkpoint's.
        checkpoint: Path; empty for the released weights.
        exif_default: Whether to turn images upright if neither options nor checkpoint say.
        untrained: Leave the weights as they are before training; the checkpoint says the rest.
    """
    if not (name or checkpoint):
        raise UserError("no model: give --checkpoint, or --model for released weights.")
    saved = read_checkpoint(checkpoint, args.trust_checkpoint) if checkpoint else {}
    metadata.check_model(saved, checkpoint)
    name = name or saved.get("arch")
    if not isinstance(name, str):
        raise UserError(f"{checkpoint}: does not name its model; give it with --model.")
    own = saved.get("model_kwargs", {}) if name == saved.get("arch") else {}
    options = {
        "num_classes": args.num_classes,
        "in_chans": args.input_size[0] if args.input_size else args.in_chans,
        "global_pool": args.gp,
        **args.model_kwargs,
    }
    arguments = own | {key: value for key, value in options.items() if value is not None}
    trained = own.get("num_classes")
    if args.num_classes and trained and args.num_classes != trained:
        raise CheckpointError(f"{checkpoint}: has {trained} classes, not {args.num_classes}: leave out --num-classes.")
    try:
        model = create_any(name, pretrained=not (checkpoint or untrained), arguments=arguments)
    except UserError as error:
        if not own or isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{checkpoint}: its model cannot be created: {error}") from error
    if checkpoint and not untrained:
        if not args.use_ema and any(saved.get(key) for key in EMA_KEYS):
            _logger.info("%s: took the raw weights; it holds averaged ones too, for --use-ema", checkpoint)
        load_weights(model, saved, checkpoint, ema=args.use_ema)

    given = {key: getattr(args, key) for key in ("input_size", "crop_pct", "crop_mode", "mean", "std", "interpolation")}
    config = saved.get("data_config", {}) | {key: value for key, value in given.items() if value}
    if args.img_size:
        config["input_size"] = (input_size(model)[0], args.img_size, args.img_size)
    config = data_config(model, config, use_test_size=not getattr(args, "use_train_size", False))

    exif = args.exif_transpose
    if exif is None:
        exif = saved.get("exif_transpose", exif_default)
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    model = model.to(device=device, memory_format=memory_format).eval()
    return Classifier(name, model, config, saved.get("classes"), exif)
