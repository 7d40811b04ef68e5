"""Parameters and multiply-accumulates of a model: ``python -m mambavision.complexity mamba_vision_T --size 224``.

MambaVision's published "FLOPs" are the multiply-accumulates of convolutions and linear layers; the products of
attention and the scans are counted separately. VMamba's, in a column of their own, are the multiply-accumulates of all
products, plus 9 for each state of a scan, 5 for each output of a layer norm, and 1 for each value in a global average.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from itertools import chain

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from mambavision.factory import create_model, expand_model_name
from mambavision.running.program import run_cli
from mambavision.running.ranges import check_ranges

# Operators of convolutions and linear layers.
_LAYERS = ("aten.convolution", "aten.mm", "aten.addmm", "vision_kernels.conv1d_silu")
_SCANS = ("vision_kernels.selective_scan", "vision_kernels.ss2d")


def _scan_by_vmamba(u_shape, delta_shape, A_shape, *args, **kwargs) -> int:
    batch, dim, length = u_shape
    return 2 * batch * dim * length * (9 * A_shape[1] + 1)


def _ss2d_by_vmamba(x_shape, projections_shape, dt_weight_shape, dt_bias_shape, A_shape, *args, **kwargs) -> int:
    """Four scans, and the products that compute their step sizes."""
    batch, dim, height, width = x_shape
    return 2 * batch * 4 * dim * height * width * (9 * A_shape[1] + 1 + dt_weight_shape[2])


# Operators that VMamba's authors count differently; torch counts two operations for a multiply-accumulate.
_BY_VMAMBA = {
    torch.ops.vision_kernels.selective_scan: _scan_by_vmamba,
    torch.ops.vision_kernels.ss2d: _ss2d_by_vmamba,
    torch.ops.aten.native_layer_norm: lambda x_shape, *args, **kwargs: 2 * 5 * x_shape.numel(),
    torch.ops.aten.mean: lambda x_shape, *args, **kwargs: 2 * x_shape.numel(),  # of global pooling
}


@dataclass(frozen=True)
class Complexity:
    """Counts for one image."""

    params: int
    gmacs: float  # convolutions and linear layers
    gmacs_attention: float  # products of attention
    gmacs_scan: float  # scans: half their operations
    gflops_vmamba: float  # everything, as VMamba's authors count it


def complexity(model: nn.Module, input_size: tuple[int, int, int]) -> Complexity:
    """Count the parameters and operations of a model for one image, from shapes alone.

    Args:
        model: Any model; it may be on the meta device.
        input_size: Channels, height and width of the image.
    """
    tensors = chain(model.named_parameters(), model.named_buffers())
    weights = {name: tensor.to("meta") for name, tensor in tensors}
    was_training = model.training
    model.eval()
    try:
        by_vmamba = FlopCounterMode(display=False, custom_mapping=_BY_VMAMBA)
        with torch.no_grad(), by_vmamba, FlopCounterMode(display=False) as counter:
            functional_call(model, weights, torch.empty(1, *input_size, device="meta"))
    finally:
        model.train(was_training)
    operations = {str(operator): count for operator, count in counter.get_flop_counts()["Global"].items()}
    layers = sum(operations.get(name, 0) for name in _LAYERS)
    scans = sum(operations.get(name, 0) for name in _SCANS)
    return Complexity(
        params=sum(parameter.numel() for parameter in model.parameters()),
        gmacs=layers / 2e9,
        gmacs_attention=(sum(operations.values()) - layers - scans) / 2e9,
        gmacs_scan=scans / 2e9,
        gflops_vmamba=by_vmamba.get_total_flops() / 2e9,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mambavision.complexity", description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="MODEL", help="name, quoted pattern such as 'vmamba_*', or all")
    parser.add_argument("--size", type=int, help="height and width of the image; default: the model's")
    parser.add_argument("--json", action="store_true", help="one line of JSON for each model")
    args = parser.parse_args()
    check_ranges(vars(args))
    names = list(dict.fromkeys(name for given in args.models for name in expand_model_name(given)))
    if not args.json:
        columns = (
            ("size", 6),
            ("params (M)", 12),
            ("GMACs", 9),
            ("+ attention", 13),
            ("+ scan", 9),
            ("as VMamba counts", 18),
        )
        print(f"{'model':<28}" + "".join(f"{heading:>{width}}" for heading, width in columns))
    for name in names:
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
                f"{counts.gmacs_scan:>9.3f}{counts.gflops_vmamba:>18.2f}"
            )


if __name__ == "__main__":
    run_cli(main)
