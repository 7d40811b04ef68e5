"""Models of the programs: creating them, opening trained classifiers, and the preprocessing they need."""

import logging
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from PIL import Image
from timm.data import resolve_data_config
from timm.layers import convert_splitbn_model, convert_sync_batchnorm
from timm.models import get_model_input_config, model_entrypoint
from torch import nn

from engine import metadata
from engine.data import DECODING_ERRORS, decode_image, image_mode, why_undecodable
from engine.options.shared import PreprocessingOptions
from engine.options.train import AveragingOptions, ModelOptions
from engine.remedies import naming_flags
from mambavision import create_model, load_checkpoint
from mambavision.checkpoint import EMA_KEYS, load_weights, read_checkpoint
from mambavision.errors import CheckpointError, DataError, UserError
from mambavision.text import nearest
from mambavision.timm_model import TimmModel

_logger = logging.getLogger(__name__)

# Models raise these for arguments of invalid types and values, which few of them check.
IMPOSSIBLE_ARGUMENTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)
_UNKNOWN_ARGUMENT = re.compile(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'")


def create_any(name: str, pretrained: bool, arguments: dict[str, Any]) -> TimmModel:
    """Create a model by name; raise a UserError for arguments that it does not accept."""
    try:
        return create_model(name, pretrained=pretrained, **arguments)
    except IMPOSSIBLE_ARGUMENTS as error:
        raise UserError(f"{name}: {_why_not_created(name, error)}") from error


def _why_not_created(name: str, error: Exception) -> str:
    message = str(error)
    unknown = _UNKNOWN_ARGUMENT.search(message)
    if not unknown:
        if isinstance(error, TypeError | ValueError):  # usually raised by a check, and meant for users
            return f"{message}."
        reason = (message.strip() or type(error).__name__).splitlines()[0].rstrip(".")
        return f"cannot be created with these arguments ({reason})."
    model_class = vars(sys.modules[model_entrypoint(name).__module__]).get(unknown[1])
    known = signature(model_class).parameters if model_class else ()
    return f"got an unexpected keyword argument {unknown[2]!r}.{nearest(unknown[2], known)}"


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """Return channels, height and width of the images that a model is designed for."""
    return get_model_input_config(model)["input_size"]


def set_image_size(model: TimmModel, size: tuple[int, int]) -> None:
    """Adapt a model with weights for one image size to another (height, width)."""
    # Vision transformers and the like need this; others accept any size.
    if hasattr(model, "set_input_size") and not getattr(model, "dynamic_img_size", False):
        model.set_input_size(img_size=size)


def placed(model: TimmModel, device: torch.device, channels_last: bool) -> TimmModel:
    """Move a model to a device, and its weights into the memory format."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return model.to(device=device, memory_format=memory_format)  # type: ignore[call-overload]  # not in torch's stubs


def data_config(model: nn.Module, options: Mapping[str, Any], use_test_size: bool = False) -> dict[str, Any]:
    """Return timm's data config: the given options, otherwise the model's own; always with the model's channels.

    Args:
        model: The model.
        options: Any of input_size, mean, std, crop_pct, crop_mode and interpolation that override its defaults.
        use_test_size: Prefer the test size of the model, if it has one.

    Raises:
        UserError: The mean or std is for another number of channels.
    """
    channels = input_size(model)[0]
    statistics = {key: tuple(options[key]) for key in ("mean", "std") if options.get(key)}
    for key, values in statistics.items():
        if len(values) not in (1, channels):
            raise UserError(f"--{key} has {len(values)} values, and the images have {channels} channels; give as many.")
    others = {key: value for key, value in options.items() if key not in statistics}
    config = resolve_data_config(others, model=model, use_test_size=use_test_size)
    config["input_size"] = (channels, *config["input_size"][1:])
    for key in ("mean", "std"):
        values = statistics.get(key, config[key])
        config[key] = tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels
    return config


def channels_of(options: ModelOptions) -> int | None:
    """Return the image channels that the options ask for; None for the model's own."""
    return options.model_kwargs.get("in_chans", options.input_size[0] if options.input_size else None)


def model_arguments(options: ModelOptions, classes: list[str] | None) -> dict[str, Any]:
    """Return the arguments of the model's constructor, as they are saved in checkpoints."""
    arguments = {
        "num_classes": options.num_classes or (len(classes) if classes else None),
        "in_chans": channels_of(options),
        "drop_rate": options.drop_rate,
        "attn_drop_rate": options.attn_drop_rate,
        "drop_path_rate": options.drop_path,
        **options.model_kwargs,
    }
    if classes and arguments["num_classes"] < len(classes):
        raise UserError(
            f"--num-classes {arguments['num_classes']} is less than the {len(classes)} classes of the data."
        )
    return {key: value for key, value in arguments.items() if value is not None}


@naming_flags(training=True)
def build_model(
    options: ModelOptions, averaging: AveragingOptions, arguments: dict[str, Any], splits: int
) -> TimmModel:
    """Create the model that train.py trains, with its initial weights.

    Args:
        options: Options of the model.
        averaging: Options of batch statistics.
        arguments: Arguments of the model's constructor.
        splits: Augmentation splits of a batch.
    """
    model = create_any(options.model, options.pretrained, arguments)
    if options.initial_checkpoint:
        report = load_checkpoint(
            model, options.initial_checkpoint, skip_head=options.skip_head, trust=options.trust_checkpoint
        )
        _logger.info("%s: %s", options.initial_checkpoint, report)
    if options.loadcheckpoint:
        report = load_checkpoint(model, options.loadcheckpoint, strict=False, trust=options.trust_checkpoint)
        _logger.info("%s: %s", options.loadcheckpoint, report)
    if options.grad_checkpointing:
        model.set_grad_checkpointing()
    if averaging.split_bn:
        model = convert_splitbn_model(model, max(splits, 2))
    if averaging.sync_bn and _can_synchronise():
        model = convert_sync_batchnorm(model)  # torch's own would lose the activations of timm's norm layers
    return model


def _can_synchronise() -> bool:
    """Synchronised batch norms need several processes, and in torch GPUs."""
    return torch.distributed.is_initialized() and torch.cuda.is_available()


@dataclass
class Classifier:
    """A model with its preprocessing and class names."""

    name: str
    model: TimmModel
    data_config: dict[str, Any]  # timm's: input_size, mean, std, crop_pct, crop_mode, interpolation
    classes: list[str] | None  # None if unknown
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


@naming_flags()
def open_classifier(
    options: PreprocessingOptions,
    name: str | None,
    checkpoint: str,
    device: torch.device,
    *,
    exif_default: bool,
    untrained: bool = False,
    use_test_size: bool = True,
) -> Classifier:
    """Create a model and load its weights.

    Options override the checkpoint's settings, and these the model's defaults.

    Args:
        options: Weights, model arguments and preprocessing.
        name: Model name; None for the checkpoint's.
        checkpoint: Path; empty for the released weights.
        device: Device of the model.
        exif_default: Rotate images by their EXIF tag if neither options nor checkpoint decide.
        untrained: Keep the initial weights; the checkpoint only provides the settings.
        use_test_size: Prefer the test size of the model, if it has one.
    """
    if not (name or checkpoint):
        raise UserError("no model: give --checkpoint, or --model for released weights.")
    saved = read_checkpoint(checkpoint, options.trust_checkpoint) if checkpoint else {}
    metadata.check_model(saved, checkpoint)
    name = name or saved.get("arch")
    if not isinstance(name, str):
        raise UserError(f"{checkpoint}: does not name its model; give it with --model.")
    model = _created(options, name, checkpoint, saved, untrained)
    if checkpoint and not untrained:
        if not options.use_ema and any(saved.get(key) for key in EMA_KEYS):
            _logger.info("%s: loaded the raw weights; the averaged ones are available with --use-ema", checkpoint)
        load_weights(model, saved, checkpoint, ema=options.use_ema)
    exif = options.exif_transpose
    if exif is None:
        exif = saved.get("exif_transpose", exif_default)
    config = _preprocessing(options, saved, model, use_test_size)
    model = placed(model, device, options.channels_last).eval()
    return Classifier(name, model, config, saved.get("classes"), exif)


def _created(
    options: PreprocessingOptions, name: str, checkpoint: str, saved: dict[str, Any], untrained: bool
) -> TimmModel:
    own = saved.get("model_kwargs", {}) if name == saved.get("arch") else {}
    given = {
        "num_classes": options.num_classes,
        "in_chans": options.input_size[0] if options.input_size else options.in_chans,
        "global_pool": options.gp,
        **options.model_kwargs,
    }
    arguments = own | {key: value for key, value in given.items() if value is not None}
    trained = own.get("num_classes")
    if options.num_classes and trained and options.num_classes != trained:
        raise CheckpointError(
            f"{checkpoint}: has {trained} classes, not {options.num_classes}; leave out --num-classes."
        )
    try:
        return create_any(name, pretrained=not (checkpoint or untrained), arguments=arguments)
    except UserError as error:
        if not own or isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{checkpoint}: its model cannot be created: {error}") from error


def _preprocessing(
    options: PreprocessingOptions, saved: dict[str, Any], model: nn.Module, use_test_size: bool
) -> dict[str, Any]:
    names = ("input_size", "crop_pct", "crop_mode", "mean", "std", "interpolation")
    given = {name: getattr(options, name) for name in names if getattr(options, name)}
    config = saved.get("data_config", {}) | given
    if options.img_size:
        config["input_size"] = (input_size(model)[0], options.img_size, options.img_size)
    return data_config(model, config, use_test_size)
