"""The mixer in one CUDA kernel (csrc/cuda/mamba_mixer.cu), for float32, float16 and bfloat16."""

import torch
from torch import Tensor

from vision_kernels.cuda import Library, shared_bytes

_BYTES = {torch.float32: 4, torch.float16: 2, torch.bfloat16: 2}
_TAPS = 3
_MOST_STATES = 16
# As in csrc/cuda/mamba_mixer.cu: channels and steps that a warp takes at once, and warps of a block.
_COLUMNS, _STEPS, _MOST_WARPS = 8, 16, 28
_MOST_CHANNELS = 4 * 32 * _MOST_WARPS  # four to each thread


def _rounded_up(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def _warps(inner: int) -> int:
    """Return as many as share the channels evenly."""
    groups = -(-inner // _COLUMNS)
    return -(-groups // -(-groups // _MOST_WARPS))


def _shared_bytes(dtype: torch.dtype, length: int, inner: int, rank: int, states: int) -> int:
    """Return the shared memory of a block; the kernel counts the same, or refuses."""
    own_states = next(count for count in (1, 2, 4) if states <= 4 * count)  # of a lane, four to a channel
    steps = _rounded_up(length, _STEPS)
    wide = _warps(inner) * _STEPS * _COLUMNS * 2 + steps * 8 * own_states
    row_of_low, row_of_x = (_rounded_up(columns - 16, 32) + 16 for columns in (rank, inner))
    return wide * 4 + (steps * row_of_low + length * row_of_x) * _BYTES[dtype]


def why_unable(
    device: torch.device, dtype: torch.dtype, length: int, inner: int, rank: int, states: int, taps: int
) -> str | None:
    """Return why the kernel cannot compute sequences of these sizes, or None if it can."""
    if dtype not in _BYTES:
        return f"computes float32, float16 and bfloat16, not {dtype}"
    if taps != _TAPS or inner % 4 or inner > _MOST_CHANNELS:
        return f"takes {_TAPS} taps and multiples of 4 channels up to {_MOST_CHANNELS}, not {taps} and {inner}"
    if not 1 <= states <= _MOST_STATES:
        return f"has registers for 1 to {_MOST_STATES} states, and A has {states}"
    limit = shared_bytes(device)
    if (needed := _shared_bytes(dtype, length, inner, rank, states)) > limit:
        what = f"{length} steps of {inner} channels"
        return f"needs {needed >> 10} KiB of shared memory for {what}, and has {limit >> 10}"
    return None


def mamba_mixer_cuda(
    library: Library, xz, conv_weight, x_proj_weight, dt_proj_weight, dt_bias, A, D, delta_bias
) -> Tensor:
    """Return (batch, length, 2 inner) with the dtype of `xz`."""
    out = torch.empty_like(xz, memory_format=torch.contiguous_format)
    if xz.numel() == 0:
        return out
    (_, length, _), (inner, rank), states = xz.shape, dt_proj_weight.shape, A.shape[1]
    parameters = (conv_weight, x_proj_weight, dt_proj_weight, dt_bias, A, D, delta_bias)
    plan = _warps(inner), _shared_bytes(xz.dtype, length, inner, rank, states)
    inputs = map(_aligned, (xz, *(each.float() for each in parameters)))
    library.call("mamba_mixer_forward", *inputs, out, *plan)
    return out


def _aligned(tensor: Tensor) -> Tensor:
    """Return it contiguous, with elements that can be loaded by fours."""
    tensor = tensor.detach().contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor
