"""Parameters and operations of a config's model."""

from collections.abc import Sequence

import torch
from mmengine.registry import MODELS, init_default_scope

from mambavision.complexity import complexity
from mambavision.openmmlab.config import explained, load_config


def count(config: str, shape: Sequence[int], cfg_options: Sequence[str]) -> None:
    """Print the parameters and multiply-accumulate operations of a config's model, from shapes alone.

    Args:
        config: Config file.
        shape: Height and width of the image, or one side of a square.
        cfg_options: Settings that override the config.
    """
    cfg = load_config(config, cfg_options)
    init_default_scope(cfg.default_scope)
    with torch.device("meta"), explained(config):
        model = MODELS.build(cfg.model)
    height, width = shape[0], shape[-1]
    found = complexity(model, (3, height, width))
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    counts = {
        "params": found.params,
        **{f"params {name}": number for name, number in parts.items() if number},
        "GMACs of convolutions and linear layers": round(found.gmacs, 3),
        "GMACs of attention": round(found.gmacs_attention, 3),
        "GMACs of scans and neighbourhood attention": round(found.gmacs_scan, 3),
        "GMACs": round(found.gmacs + found.gmacs_attention + found.gmacs_scan, 3),
    }
    print(f"{config}, {height} x {width}")
    for name, number in counts.items():
        print(f"{name:<45}{number:>16,}")
