"""The mixer in one CUDA kernel (csrc/cuda/mamba_mixer.cu), for float32, float16 and bfloat16."""

import torch
from torch import Tensor

from vision_kernels.arguments import GPU_DTYPES, why_not_dtypes
from vision_kernels.cuda import Library, shared_bytes
from vision_kernels.mamba_mixer.arguments import MixerArguments
from vision_kernels.views import contiguous_like

_TAPS = 3
_MOST_STATES = 16
# As in csrc/cuda/mamba_mixer.cu: channels and steps that a warp processes at once, and warps of a block.
_COLUMNS, _STEPS, _MOST_WARPS = 8, 16, 28
_MOST_CHANNELS = 4 * 32 * _MOST_WARPS  # four per thread


def _rounded_up(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def _warps(inner: int) -> int:
    """Return the number of warps that divides the channels evenly."""
    groups = -(-inner // _COLUMNS)
    return -(-groups // -(-groups // _MOST_WARPS))


def _shared_bytes(dtype: torch.dtype, length: int, inner: int, rank: int, states: int) -> int:
    """Return the shared memory of a block; the kernel computes the same, and refuses another size."""
    own_states = next(count for count in (1, 2, 4) if states <= 4 * count)  # of each of the four lanes of a channel
    steps = _rounded_up(length, _STEPS)
    wide = _warps(inner) * _STEPS * _COLUMNS * 2 + steps * 8 * own_states
    row_of_low, row_of_x = (_rounded_up(columns - 16, 32) + 16 for columns in (rank, inner))
    return wide * 4 + (steps * row_of_low + length * row_of_x) * dtype.itemsize


def why_unable(
    device: torch.device, dtype: torch.dtype, length: int, inner: int, rank: int, states: int, taps: int
) -> str | None:
    """Return why the kernel cannot compute sequences of these sizes, or None if it can."""
    if reason := why_not_dtypes("computes", GPU_DTYPES, dtype):
        return reason
    if taps != _TAPS or inner % 4 or inner > _MOST_CHANNELS:
        return f"takes {_TAPS} taps and multiples of 4 channels up to {_MOST_CHANNELS}, not {taps} and {inner}"
    if not 1 <= states <= _MOST_STATES:
        return f"has registers for 1 to {_MOST_STATES} states, and A has {states}"
    limit = shared_bytes(device)
    if (needed := _shared_bytes(dtype, length, inner, rank, states)) > limit:
        what = f"{length} steps of {inner} channels"
        return f"needs {needed >> 10} KiB of shared memory for {what}, and has {limit >> 10}"
    return None


def forward(library: Library, given: MixerArguments) -> Tensor:
    """Return (batch, length, 2 inner)."""
    out = contiguous_like(given.xz)
    (_, length, _), (inner, rank), states = given.xz.shape, given.dt_proj_weight.shape, given.A.shape[1]
    plan = _warps(inner), _shared_bytes(out.dtype, length, inner, rank, states)
    xz, *parameters = given
    inputs = map(_aligned, (xz, *(each.float() for each in parameters)))
    library.call("mamba_mixer_forward", *inputs, out, *plan)
    return out


def _aligned(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor aligned for loads of four elements."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor
