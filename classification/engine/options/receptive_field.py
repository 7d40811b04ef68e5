"""Options of receptive_field.py."""

import argparse
from dataclasses import dataclass
from typing import Literal

from engine.options.fields import ProgramOptions, group, option, positive
from engine.options.shared import PreprocessingOptions, inputs_option


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text!r}")
    return value


@dataclass
class ReceptiveFieldOptions(ProgramOptions):
    """Options of receptive_field.py."""

    description = "Draw effective receptive fields of models, before and after training."

    inputs: list[str] = inputs_option()
    out: str = option("receptive_field", metavar="DIR", help="output folder")
    model: list[str] = option([], "-m", metavar="NAME", help="models to compare; default: the checkpoints'")
    checkpoint: list[str] = option([], metavar="FILE", help="weights, one file per model ('' for the released ones)")
    weights: list[Literal["initial", "trained"]] = option(["initial", "trained"], help="rows to draw")
    seed: int = option(0, help="random seed of the initial weights")
    count: int = option(50, type=positive, help="images to average over, evenly spaced over the inputs")
    stage: int = option(-1, help="stage whose central output is examined; negative: counted from the last")
    shares: list[float] = option(
        [0.2, 0.5, 0.8], type=_fraction, help="fractions of the total whose squares are measured"
    )
    preprocessing: PreprocessingOptions = group(PreprocessingOptions, "weights and preprocessing")
