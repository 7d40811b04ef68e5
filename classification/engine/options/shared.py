"""Options that several programs have: an opened classifier, and how it is run."""

from dataclasses import dataclass
from typing import Any, Literal

from engine.options.fields import option, positive

CropMode = Literal["squash", "border", "center"]
Resizing = Literal["", "nearest", "bilinear", "bicubic", "lanczos", "hamming", "box"]  # timm's, as in `engine.metadata`


def backend_option() -> Any:
    return option(
        None,
        nargs="?",
        const="inductor",
        metavar="BACKEND",
        help="compile the model; cudagraphs only records its CUDA kernels and launches them together",
    )


def backend_mode_option() -> Any:
    return option(
        None,
        choices=["reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"],
        help="mode of inductor, which it turns on; the first two record CUDA graphs",
    )


@dataclass
class PreprocessingOptions:
    """Weights, model arguments and preprocessing of an opened classifier."""

    use_ema: bool = option(False, help="use the averaged weights of the checkpoint")
    trust_checkpoint: bool = option(False, help="unpickle the checkpoint without restriction: it can run any code")
    model_kwargs: dict[str, Any] = option({}, metavar="NAME=VALUE", help="further arguments of the model")
    num_classes: int | None = option(
        None, type=positive, help="number of classes; default: the checkpoint's, or the model's"
    )
    in_chans: int | None = option(None, type=positive, help="channels of the images; default: the model's")
    gp: str | None = option(None, help="global pooling; default: the model's")
    img_size: int | None = option(None, "--size", type=positive, help="height and width (pixels); default: the model's")
    input_size: list[int] | None = option(
        None,
        type=positive,
        nargs=3,
        metavar=("C", "H", "W"),
        help="channels, height and width (pixels); default: the model's",
    )
    crop_pct: float | None = option(None, help="fraction of the image that is cropped; default: the model's")
    crop_mode: CropMode | None = option(None, help="how images are cropped; default: the model's")
    mean: list[float] | None = option(None, help="pixel mean per channel, from 0 to 1; default: the model's")
    std: list[float] | None = option(None, help="pixel standard deviation per channel; default: the model's")
    interpolation: Resizing = option("", metavar="NAME", help="interpolation; default: the model's")
    exif_transpose: bool | None = option(None, help="rotate images as their EXIF tag says; default: as in training")
    device: str = option("", help="cuda, cpu, …; default: a GPU if there is one")
    channels_last: bool = option(False, help="use the channels-last memory layout")


@dataclass
class SpeedOptions:
    """Precision and compilation."""

    amp: bool = option(False, help="mixed precision")
    amp_dtype: Literal["float16", "bfloat16"] | None = option(
        None, help="type of mixed precision; default: float16 on a GPU, bfloat16 on a CPU"
    )
    torchcompile: str | None = backend_option()
    torchcompile_mode: str | None = backend_mode_option()


def inputs_option() -> Any:
    return option(
        [],
        positional=True,
        nargs="+",
        metavar="INPUT",
        help="image, folder of images, or quoted pattern such as 'photos/*.jpg'",
    )


def model_option() -> Any:
    return option(None, "-m", help="name of one model; default: the checkpoint's")


def checkpoint_option() -> Any:
    return option("", metavar="FILE", help="weights; default: the released ones")
