"""Options of throughput.py."""

from dataclasses import dataclass
from typing import Any

from engine.options.fields import ProgramOptions, group, non_negative, option, positive
from engine.options.shared import SpeedOptions


@dataclass
class ThroughputOptions(ProgramOptions):
    """Options of throughput.py."""

    description = (
        "Time models side by side: images per second, latency, memory, parameters and multiply-accumulate operations."
    )
    not_needed = {"--data-path": (None, "the images are random numbers")}

    model: list[str] = option(["mamba_vision_T"], metavar="NAME", help="models of this package or of timm")
    model_kwargs: dict[str, Any] = option({}, metavar="NAME=VALUE", help="arguments of all models")
    resolution: list[int] | None = option(
        None,
        "--img-size",
        "--size",
        type=positive,
        help="one or more image sizes (height and width in pixels); default: each model's own",
    )
    batch_size: int = option(
        128, "-b", "--bs", type=positive, help="images per batch, halved while a GPU's memory runs out"
    )
    rounds: int = option(20, type=positive, help="timed rounds; in each, every model has one turn")
    iterations: int = option(0, type=non_negative, help="forward passes per turn; 0: about half a second's worth")
    warmup: int = option(3, type=non_negative, help="forward passes of every model before timing")
    train: bool = option(False, help="time forward, loss and backward instead of inference")
    channels_last: bool = option(False, "--channel-last", help="use the channels-last memory layout")
    threads: int | None = option(None, type=positive, help="CPU threads; default: PyTorch's")
    device: str = option("", help="cuda, cpu, …; default: a GPU if there is one")
    json: str | None = option(None, metavar="FILE", help="also write the figures to this file")
    speed: SpeedOptions = group(SpeedOptions, "speed")
