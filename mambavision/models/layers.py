"""Layers shared by the architectures."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import timm.models
import torch
import torch.nn.functional as F
from timm.layers import calculate_drop_path_rates
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

Activation = Literal["silu", "gelu", "relu", "sigmoid"]


def activation(name: Activation) -> type[nn.Module]:
    """Return the module of an activation."""
    check_choice("activation", name, Activation)
    return {"silu": nn.SiLU, "gelu": nn.GELU, "relu": nn.ReLU, "sigmoid": nn.Sigmoid}[name]


def drop_path_rates(last: float, depths: Sequence[int]) -> list[list[float]]:
    """Return the stochastic depth rates of the blocks of each stage, rising linearly from 0 to that of the last."""
    rates: Any = calculate_drop_path_rates(last, list(depths), stagewise=True)  # without stagewise, one flat list
    return rates


def check_choice(name: str, value: object, literal: object) -> None:
    """Raise a ValueError if the value of an argument is not among those of its Literal type."""
    if value not in get_args(literal):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(literal)))}, got {value!r}")


def checkpoint(module: nn.Module, *args: Any) -> Tensor:
    """Call a module and recompute its activations in the backward pass instead of storing them.

    Batch norms update their statistics in the first pass only.
    """
    return timm.models.checkpoint(
        module, *args, context_fn=lambda: (contextlib.nullcontext(), _without_statistics(module))
    )


@contextlib.contextmanager
def _without_statistics(module: nn.Module) -> Iterator[None]:
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm) and norm.track_running_stats]
    counters = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
    before = [norm.momentum for norm in norms], [counter.clone() for counter in counters]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        momenta, counts = before
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for counter, count in zip(counters, counts, strict=True):
            counter.copy_(count)


# Modules for channels-last maps, (batch, height, width, channels) -> (batch, height, width, other channels).


class DepthwiseConv(nn.Conv2d):
    """Depthwise convolution that preserves height and width."""

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class PointwiseConv(nn.Linear):
    """Linear layer over the last dimension, whose weight is stored as that of a 1x1 convolution."""

    def __init__(self, in_features: int, out_features: int, **kwargs: Any) -> None:
        super().__init__(in_features, out_features, **kwargs)
        self.weight = nn.Parameter(self.weight[..., None, None])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)


class InnerLinear(nn.Linear):
    """Linear layer inside a fused operation, which uses its weights directly unless something observes the layer.

    Attributes:
        is_observed: True once a hook has been registered, even if it was removed since.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.is_observed = False

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        self.is_observed = True
        return super().register_forward_pre_hook(*args, **kwargs)

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        self.is_observed = True
        return super().register_forward_hook(*args, **kwargs)

    def register_full_backward_pre_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        self.is_observed = True
        return super().register_full_backward_pre_hook(*args, **kwargs)

    def register_full_backward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        self.is_observed = True
        return super().register_full_backward_hook(*args, **kwargs)


def is_plain(layer: nn.Module) -> bool:
    """Return True if a layer is an `InnerLinear` without hooks, not replaced by an adapter or a quantised layer."""
    return type(layer) is InnerLinear and not layer.is_observed


@torch.no_grad()
def init_dt_bias_(bias: Tensor, dt_min: float = 1e-3, dt_max: float = 0.1, dt_floor: float = 1e-4) -> None:
    """Initialise the bias of a scan's step size as Mamba does: softplus(bias) log-uniform in [dt_min, dt_max]."""
    dt = torch.empty_like(bias).uniform_(math.log(dt_min), math.log(dt_max)).exp().clamp(min=dt_floor)
    bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus


def window_partition(x: Tensor, window: int) -> Tensor:
    """Partition a map into square windows of tokens, row by row.

    Args:
        x: (batch, channels, height, width), height and width divisible by `window`.

    Returns:
        (batch x windows, window x window, channels)
    """
    batch, channels, height, width = x.shape
    rows, columns = height // window, width // window
    x = x.reshape(batch, channels, rows, window, columns, window)
    x = x.permute(0, 2, 4, 3, 5, 1)  # (batch, rows, columns, window, window, channels)
    return x.reshape(batch * rows * columns, window * window, channels)


def window_reverse(tokens: Tensor, window: int, height: int, width: int) -> Tensor:
    """Undo `window_partition`: (batch x windows, window x window, channels) -> (batch, channels, height, width)."""
    rows, columns = height // window, width // window
    batch, channels = tokens.shape[0] // (rows * columns), tokens.shape[-1]
    x = tokens.reshape(batch, rows, columns, window, window, channels)
    x = x.permute(0, 5, 1, 3, 2, 4)  # (batch, channels, rows, window, columns, window)
    return x.reshape(batch, channels, height, width)
