"""Selective scans of a map along four routes, and their parameters (Liu et al. 2024, https://arxiv.org/abs/2401.10166).

`SS2D` is VMamba's token mixer, `VSSM` the bare scan inside SegMAN's mixer.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from mambavision.models.layers import Activation, activation, check_choice, init_dt_bias_
from vision_kernels import selective_scan, ss2d

Routes = Literal["cross", "unidirectional", "bidirectional", "cascade"]
OutNorm = Literal["layer", "depthwise", "layer_depthwise", "softmax", "sigmoid", "none"]
ScanInit = Literal["mamba", "normal", "uniform"]

NORM_EPS = 1e-5


class FourRoutes(nn.Module):
    """The parameters of selective scans along four routes.

    Args:
        inner: Scanned channels.
        d_state: States per channel.
        dt_rank: Rank of the step size projection.
        x_proj_shape: Shape in which `x_proj_weight`, (4, dt_rank + 2 d_state, inner), is stored.
        init: "mamba": state matrix 1, 2, ..., log-uniform step sizes; "normal" and "uniform": random numbers from these
            distributions (VMamba's v1 and v2).
    """

    def __init__(
        self, inner: int, d_state: int, dt_rank: int, x_proj_shape: tuple[int, int, int], init: ScanInit = "mamba"
    ) -> None:
        super().__init__()
        self.d_state = d_state
        self.dt_rank = dt_rank
        self.x_proj_weight = nn.Parameter(torch.empty(x_proj_shape))
        self.A_logs = nn.Parameter(torch.empty(4 * inner, d_state))
        self.Ds = nn.Parameter(torch.ones(4 * inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(4, inner, dt_rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(4, inner))
        self.reset_scan_parameters(init)

    @torch.no_grad()
    def reset_scan_parameters(self, init: ScanInit) -> None:
        """Initialise the parameters of the scan."""
        check_choice("init", init, ScanInit)
        inner = self.dt_projs_bias.shape[1]
        nn.init.uniform_(self.x_proj_weight, -(inner**-0.5), inner**-0.5)  # like a linear layer for each route
        nn.init.ones_(self.Ds)
        if init == "mamba":
            self.A_logs.copy_(torch.arange(1.0, self.d_state + 1).log().expand_as(self.A_logs))
            nn.init.uniform_(self.dt_projs_weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
            init_dt_bias_(self.dt_projs_bias)
        elif init == "normal":
            self.A_logs.normal_()
            self.dt_projs_weight.normal_(std=0.1)
            self.dt_projs_bias.normal_(std=0.1)
        else:
            self.A_logs.zero_()
            self.dt_projs_weight.uniform_(0, 0.1)
            self.dt_projs_bias.uniform_(0, 0.1)

    def scan(self, x: Tensor, routes: str = "cross") -> Tensor:
        """(batch, inner, height, width) -> same shape, in float32 unless the whole model has another precision."""
        x_proj_weight = self.x_proj_weight.view(4, -1, x.shape[1])
        out_dtype = torch.promote_types(x.dtype, self.Ds.dtype)
        projections = x_proj_weight, self.dt_projs_weight, self.dt_projs_bias
        return ss2d(x, *projections, *self.state_matrices(), routes=routes, out_dtype=out_dtype)

    def state_matrices(self) -> tuple[Tensor, Tensor]:
        """Return A (4 inner, d_state) and D (4 inner), in float32 or better, as in the originals."""
        dtype = torch.promote_types(self.A_logs.dtype, torch.float32)
        return -torch.exp(self.A_logs.to(dtype)), self.Ds.to(dtype)


class VSSM(FourRoutes):
    """The bare scan, as SegMAN uses it.

    Args:
        dim: Channels of the map; all are scanned, with one state each.
    """

    def __init__(self, dim: int) -> None:
        dt_rank = math.ceil(dim / 16)
        super().__init__(dim, 1, dt_rank, (4 * (dt_rank + 2), dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, height, width, dim) -> same shape, in float32 unless the whole model has another precision."""
        return self.scan(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class SS2D(FourRoutes):
    """Selective scans of a map along four routes, between two linear layers.

    Args:
        dim: Channels of the map.
        d_state: States per channel.
        ratio: Scanned channels relative to `dim`.
        dt_rank: Rank of the step size's projection; "auto" for dim / 16, rounded up.
        act_layer: Activation before the scan.
        conv_size: Kernel size of the depthwise convolution before the activation; below 2 for none.
        conv_bias: Use a bias in that convolution.
        gate: Multiply the result by a second projection of the input, as in Mamba.
        gate_act: Apply the activation to that projection.
        routes: "cross": rows and columns, forwards and backwards; "unidirectional": four times by rows;
            "bidirectional": twice by rows forwards, twice backwards; "cascade": rows one by one, forwards and
            backwards, then columns the same way. As in the original, the cascade
            adds the backward scan to the forward one without reversing it again.
        out_norm: Normalisation after the scan: "layer" norm, a "depthwise" 3x3 convolution or both, "softmax" over the
            positions of each channel, "sigmoid", or "none".
        out_act: Apply GELU after that.
        drop: Dropout rate of the output.
        init: Initialisation of the scan's parameters, see `FourRoutes`.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 1,
        ratio: float = 2.0,
        dt_rank: int | Literal["auto"] = "auto",
        act_layer: Activation = "silu",
        conv_size: int = 3,
        conv_bias: bool = True,
        gate: bool = False,
        gate_act: bool = True,
        routes: Routes = "cross",
        out_norm: OutNorm = "layer",
        out_act: bool = False,
        drop: float = 0.0,
        init: ScanInit = "mamba",
    ) -> None:
        check_choice("routes", routes, Routes)
        inner = int(ratio * dim)
        rank = math.ceil(dim / 16) if dt_rank == "auto" else dt_rank
        super().__init__(inner, d_state, rank, (4, rank + 2 * d_state, inner), init)
        self.routes = routes
        self.out_norm = _out_norm(out_norm, inner)
        self.in_proj = nn.Linear(dim, 2 * inner if gate else inner, bias=False)
        self.conv2d = (
            nn.Conv2d(inner, inner, conv_size, padding=(conv_size - 1) // 2, groups=inner, bias=conv_bias)
            if conv_size > 1
            else nn.Identity()
        )
        self.act = activation(act_layer)()
        self.gate = gate
        self.gate_act = activation(act_layer)() if gate_act else nn.Identity()
        self.out_act = nn.GELU() if out_act else nn.Identity()
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, height, width, dim) -> same shape."""
        x = self.in_proj(x)
        if self.gate:
            x, z = x.chunk(2, dim=-1)
        x = self.act(self.conv2d(x.permute(0, 3, 1, 2)))
        y = self._cascade(x) if self.routes == "cascade" else self.scan(x, self.routes)
        y = self.out_act(self.out_norm(y).to(x.dtype)).permute(0, 2, 3, 1)
        if self.gate:
            y = y * self.gate_act(z)
        return self.drop(self.out_proj(y))

    def _cascade(self, x: Tensor) -> Tensor:
        """Scan the rows, then the columns of the result. (batch, inner, height, width) -> same shape."""
        by_rows = self._scan_lines(x.permute(0, 2, 3, 1), slice(0, 2))
        return self._scan_lines(by_rows.transpose(1, 2).to(x.dtype), slice(2, 4)).permute(0, 3, 2, 1)

    def _scan_lines(self, x: Tensor, routes: slice) -> Tensor:
        """Scan each line of a normalised map forwards and backwards, by the parameters of two routes.

        (batch, lines, length, inner) -> same shape.
        """
        batch, lines, length, inner = x.shape
        A, D = self.state_matrices()
        x = F.layer_norm(x, (inner,), eps=NORM_EPS).flatten(0, 1)
        u = torch.stack([x, x.flip(1)], dim=2)  # (batch x lines, length, 2 routes, inner)
        projected = torch.einsum("blki,kci->blkc", u, self.x_proj_weight[routes].to(x.dtype))
        dt, B, C = projected.split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        delta = torch.einsum("blkr,kir->blki", dt, self.dt_projs_weight[routes].to(x.dtype))
        y = selective_scan(
            u.flatten(2),
            delta.flatten(2),
            A.unflatten(0, (4, inner))[routes].flatten(0, 1),
            B,
            C,
            D.unflatten(0, (4, inner))[routes].flatten(),
            delta_bias=self.dt_projs_bias[routes].to(A.dtype).flatten(),
            delta_softplus=True,
            channels_last=True,
            out_dtype=torch.promote_types(x.dtype, self.Ds.dtype),
        )
        return y.unflatten(2, (2, inner)).sum(2).view(batch, lines, length, inner)


class SpatialSoftmax(nn.Module):
    """Softmax over the positions of each channel, (batch, channels, height, width) -> same shape."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).softmax(dim=-1).view_as(x)


def _out_norm(kind: OutNorm, dim: int) -> nn.Module:
    check_choice("out_norm", kind, OutNorm)
    layer_norm = partial(LayerNorm2d, dim, eps=NORM_EPS)
    depthwise = partial(nn.Conv2d, dim, dim, 3, padding=1, groups=dim, bias=False)
    # Identities keep the indices of the other layers as in checkpoints.
    layers: dict[OutNorm, Callable[[], nn.Module]] = {
        "layer": layer_norm,
        "depthwise": lambda: nn.Sequential(nn.Identity(), depthwise()),
        "layer_depthwise": lambda: nn.Sequential(layer_norm(), nn.Identity(), depthwise()),
        "softmax": SpatialSoftmax,
        "sigmoid": nn.Sigmoid,
        "none": nn.Identity,
    }
    return layers[kind]()
