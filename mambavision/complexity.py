"""Parameters and multiply-accumulates of a model: ``python -m mambavision.complexity mamba_vision_T --size 224``.

The published "FLOPs" of these models are multiply-accumulates of convolutions and linear layers; the products of
attention and the scans are counted beside them.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from itertools import chain

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from mambavision.errors import run_cli
from mambavision.factory import create_model

# What convolutions and linear layers call.
_LAYERS = ("aten.convolution", "aten.mm", "aten.addmm", "vision_kernels.conv1d_silu")
_SCANS = "vision_kernels."


@dataclass(frozen=True)
class Complexity:
    """Counts for one image."""

    params: int
    gmacs: float  # convolutions and linear layers
    gmacs_attention: float  # products of attention
    gmacs_scan: float  # operators of vision_kernels, half their operations


def complexity(model: nn.Module, input_size: tuple[int, int, int]) -> Complexity:
    """Count for one image of (channels, height, width). Runs on shapes alone: no memory, no time."""
    tensors = chain(model.named_parameters(), model.named_buffers())
    weights = {name: tensor.to("meta") for name, tensor in tensors}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            functional_call(model, weights, torch.empty(1, *input_size, device="meta"))
    finally:
        model.train(was_training)
    operations = {str(operator): count for operator, count in counter.get_flop_counts()["Global"].items()}
    layers = sum(operations.get(name, 0) for name in _LAYERS)
    scans = sum(count for name, count in operations.items() if name.startswith(_SCANS) and name not in _LAYERS)
    return Complexity(
        params=sum(parameter.numel() for parameter in model.parameters()),
        gmacs=layers / 2e9,
        gmacs_attention=(sum(operations.values()) - layers - scans) / 2e9,
        gmacs_scan=scans / 2e9,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mambavision.complexity", description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--size", type=int, help="height and width of the image; default: the model's")
    parser.add_argument("--json", action="store_true", help="one line of JSON for each model")
    args = parser.parse_args()
    if not args.json:
        print(f"{'model':<28}{'size':>6}{'params (M)':>12}{'GMACs':>9}{'+ attention':>13}{'+ scan':>9}")
    for name in args.models:
        with torch.device("meta"):
            model = create_model(name)
        channels, *native = model.pretrained_cfg["input_size"]
        size = args.size or native[0]
        counts = complexity(model, (channels, size, size))
        if args.json:
            print(json.dumps({"model": name, "size": size, **asdict(counts)}))
        else:
            print(
                f"{name:<28}{size:>6}{counts.params / 1e6:>12.2f}{counts.gmacs:>9.2f}{counts.gmacs_attention:>13.3f}"
                f"{counts.gmacs_scan:>9.3f}"
            )


if __name__ == "__main__":
    run_cli(main)
