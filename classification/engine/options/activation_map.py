"""Options of activation_map.py."""

import argparse
from dataclasses import dataclass

from engine.options.fields import ProgramOptions, group, non_negative, option
from engine.options.shared import PreprocessingOptions, checkpoint_option, inputs_option, model_option

Point = tuple[float, float]


def _point(text: str) -> Point:
    try:
        x, y = map(float, text.split(","))
    except ValueError:
        x = y = -1.0
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise argparse.ArgumentTypeError(f"must be X,Y, each from 0 to 1, got {text!r}")
    return x, y


@dataclass
class ActivationMapOptions(ProgramOptions):
    """Options of activation_map.py."""

    description = (
        "Draw how positions of an image depend on each other in the scan or attention of a block. The original program "
        "normalised images with --mean 0.5 --std 0.25 instead of the statistics of training."
    )

    inputs: list[str] = inputs_option()
    out: str = option("activation_maps", metavar="DIR", help="output folder")
    model: str | None = model_option()
    checkpoint: str = checkpoint_option()
    stage: int = option(2, type=non_negative, help="stage of the block, from 0; vision transformers have none")
    block: int = option(1, type=non_negative, help="block within its stage, from 0")
    points: list[Point] = option(
        [(0.5, 0.5)],
        type=_point,
        metavar="X,Y",
        help="points of the image, from 0 (left, top) to 1; quoted pairs; default: the middle",
    )
    maps: list[str] | None = option(
        None,
        metavar="MAP",
        help="maps such as all_norm_CB: a0, a1, …, all or nall; _norm, _absnorm or none; _CB, _CwBw, _ww, _CBdt or "
        "_CwBdtw; default: all routes, each with CB, CwBw and ww",
    )
    rollout: bool = option(False, help="combine the maps with those of the preceding blocks of the stage")
    preprocessing: PreprocessingOptions = group(PreprocessingOptions, "weights and preprocessing")
