"""SS2D by the CUDA kernels (csrc/cuda/ss2d.cu and ss2d_backward.cu)."""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_kernels.arguments import GPU_DTYPES
from vision_kernels.cross_scan import ROUTES
from vision_kernels.cuda import Library, shared_bytes
from vision_kernels.ss2d import arguments
from vision_kernels.ss2d.arguments import Ss2dArguments
from vision_kernels.views import as_parameter

_TILE = 16  # kTile in csrc/cuda/ss2d.cuh: channels of a block
_SEGMENTS = 8  # segments of a route for each warp
_FORWARD_WARPS, _BACKWARD_WARPS = 14, 12
_STATIC_SHARED_BYTES = 2 << 10  # an upper bound for a block


class Gpu(NamedTuple):
    """Limits of a GPU."""

    processors: int
    shared_bytes: int  # per block


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """Return the limits of a GPU; on a CPU, which emulates the kernels, those of an H200."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
    return Gpu(processors, shared_bytes(device) - _STATIC_SHARED_BYTES)


class Plan(NamedTuple):
    """Division of a route: in every round, each warp of a block takes _SEGMENTS segments of `steps` positions."""

    warps: int
    steps: int
    rounds: int
    shared_sums: bool  # outputs of the routes are summed in shared memory


@functools.lru_cache(maxsize=1024)
def plan_of(
    gpu: Gpu, blocks: int, length: int, max_steps: int, max_warps: int, bytes_of_warp: int, worth_of_rounds: float
) -> Plan:
    """Return the plan that keeps the most lanes of the GPU busy.

    Args:
        gpu: The limits to respect.
        blocks: Number of blocks in the grid.
        length: Number of positions of a route.
        max_steps: Most positions in a segment.
        max_warps: Most warps that a multiprocessor can run at once.
        bytes_of_warp: Shared memory of each warp, not counting that for sums.
        worth_of_rounds: Value of a plan with several rounds, relative to an equally busy one with a single round.
    """
    best, plan = 0.0, None
    for shared_sums in (True, False):
        for warps in range(1, max_warps + 1):
            rounds = -(-length // (_SEGMENTS * max_steps * warps))
            steps = -(-length // (_SEGMENTS * warps * rounds))
            used = warps * bytes_of_warp + shared_sums * length * _TILE * 4
            together = min(max_warps // warps, gpu.shared_bytes // used, -(-blocks // gpu.processors))
            efficiency = length / (_SEGMENTS * warps * rounds * steps)
            score = together * warps * efficiency * (steps / (steps + 1)) * (1 if rounds == 1 else worth_of_rounds)
            if score > best:
                best, plan = score, Plan(warps, steps, rounds, shared_sums)
        if plan is not None:
            return plan
    raise AssertionError("a block without sums fits into any shared memory")


def why_unable(given: Ss2dArguments) -> str | None:
    """Return why the kernels do not support these arguments, or None if they do."""
    _, dim, height, width = given.x.shape
    if reason := arguments.why_unable(GPU_DTYPES, given):
        return reason
    if height * width * max(4 * dim, abs(given.x.stride(3))) >= 2**31:  # offsets within an image have 32 bits
        return f"takes smaller images than {height} x {width} with {dim} channels"
    return None


def forward(library: Library, given: Ss2dArguments) -> Tensor:
    """Return y, channels last."""
    x, states = given.x, given.A.shape[1]
    batch, dim, height, width = x.shape
    if _needs_padding(given):
        return forward(library, _padded(given))[:, :dim]
    y = torch.empty_like(x, dtype=given.out_dtype, memory_format=torch.channels_last)
    inputs, tiles, length = _readable(given), -(-dim // _TILE), height * width
    steps = 8 if states == 1 else 4  # kForwardSteps in csrc/cuda/ss2d.cu
    gpu = gpu_of(x.device)
    plan = plan_of(gpu, batch * tiles, length, steps, _FORWARD_WARPS, 4 * _TILE * (4 + 2 * states), 1)
    maps = sums = None
    if plan.rounds > 1 and 2 * batch * tiles <= gpu.processors:
        plan = plan._replace(shared_sums=False)
        maps = x.new_empty(2 * batch * 4, plan.rounds, states, tiles * _TILE, dtype=torch.float32)
        library.call("ss2d_maps", *inputs, *plan[:3], None, maps)
    if not plan.shared_sums:
        sums = x.new_empty(batch, length, tiles * _TILE, dtype=torch.float32)
    library.call("ss2d_forward", *inputs, *plan[:3], sums, maps, _pixels(y))
    return y


def _pixels(image: Tensor) -> Tensor:
    """Return (batch, length, dim) with adjacent channels in aligned fours: a view of most channels-last images."""
    batch, dim, height, width = image.shape
    by_batch, by_channel, by_row, by_column = image.stride()
    pixels = image.permute(0, 2, 3, 1)
    readable = by_channel == 1 and by_row == width * by_column and (by_batch | by_column) % 4 == 0
    too_far_apart = height * width * by_column >= 2**31  # offsets within an image have 32 bits
    if not readable or too_far_apart or image.data_ptr() % 16:
        pixels = pixels.clone(memory_format=torch.contiguous_format)
    return pixels.as_strided((batch, height * width, dim), (pixels.stride(0), pixels.stride(2), 1))


def _padded(given: Ss2dArguments) -> Ss2dArguments:
    """Return the arguments with zeros after the channels and after the rank, as the kernels require."""
    x, projections, dt_weight, dt_bias, A, D = given[:6]
    rank, states, channels = dt_weight.shape[2], A.shape[1], -x.shape[1] % 4
    low, others = projections.split([rank, 2 * states], dim=3)
    return Ss2dArguments(
        F.pad(x, (0, 0, 0, 0, 0, channels)),
        torch.cat([F.pad(low, (0, rank % 2)), others], dim=3),
        F.pad(dt_weight, (0, rank % 2, 0, channels)),
        F.pad(dt_bias, (0, channels)),
        F.pad(A.unflatten(0, (4, -1)), (0, 0, 0, channels)).flatten(0, 1),
        F.pad(D.view(4, -1), (0, channels)).flatten(),
        *given[6:],
    )


def _without_padding(grads: tuple[Tensor, ...], given: Ss2dArguments) -> tuple[Tensor, ...]:
    """Return gradients without the rows and columns that `_padded` added."""
    dim, rank, states = given.x.shape[1], given.dt_weight.shape[2], given.A.shape[1]
    grad_x, grad_projections, grad_weight, grad_bias, grad_A, grad_D = grads
    return (
        grad_x[:, :dim],
        torch.cat([grad_projections[..., :rank], grad_projections[..., -2 * states :]], dim=3),
        grad_weight[:, :dim, :rank],
        grad_bias[:, :dim],
        grad_A.unflatten(0, (4, -1))[:, :dim].flatten(0, 1),
        grad_D.view(4, -1)[:, :dim].flatten(),
    )


def _needs_padding(given: Ss2dArguments) -> bool:
    return given.x.shape[1] % 4 != 0 or given.dt_weight.shape[2] % 2 != 0


def _readable(given: Ss2dArguments) -> list[Tensor | int | None]:
    x, projections = given.x, given.projections
    dtype = x.dtype if x.dtype == projections.dtype else torch.float32
    projections = projections.to(dtype).contiguous()
    if projections.data_ptr() % 8:  # two elements of float32 are loaded at once
        projections = projections.clone()
    steps = (route.step(x.shape[3]) for route in ROUTES[given.routes])
    return [_pixels(x.to(dtype)), projections, *map(as_parameter, given[2:6]), *steps]


class _Shares(NamedTuple):
    """Blocks of the backward pass: each of `parts` takes some tiles of channels, and each of `groups` some images."""

    parts: int
    groups: int


@functools.lru_cache(maxsize=1024)
def _shares_of(gpu: Gpu, batch: int, tiles: int, plan: Plan, bytes_of_part: int, bytes_of_group: int) -> _Shares:
    """Return the shares that need the least memory for partial sums among those that keep most of the GPU busy."""
    slots = gpu.processors * (_BACKWARD_WARPS // plan.warps)

    def busy(shares: _Shares) -> float:
        waves = -(-shares.parts * shares.groups // slots)
        tasks = waves * -(-tiles // shares.parts) * -(-batch // shares.groups)
        return batch * tiles / (tasks * slots)

    images = [count for count in (1, 2, 4, 8, 16) if count <= batch]
    choices = [_Shares(parts, -(-batch // each)) for parts in range(1, tiles + 1) for each in images]
    enough = 0.85 * max(map(busy, choices))
    return min(
        (each for each in choices if busy(each) >= enough),
        key=lambda each: each.parts * bytes_of_part + each.groups * bytes_of_group,
    )


def backward(library: Library, grad_y: Tensor, given: Ss2dArguments) -> tuple[Tensor, ...]:
    """Return the gradients of the six tensors."""
    if _needs_padding(given):
        grad_y = F.pad(grad_y, (0, 0, 0, 0, 0, -given.x.shape[1] % 4))
        return _without_padding(backward(library, grad_y, _padded(given)), given)
    x, projections, rank, states = given.x, given.projections, given.dt_weight.shape[2], given.A.shape[1]
    batch, dim, height, width = x.shape
    inputs, tiles, length, rows = _readable(given), -(-dim // _TILE), height * width, rank + states + 2
    gpu = gpu_of(x.device)
    plan = plan_of(gpu, batch * tiles, length, 4, _BACKWARD_WARPS, 4 * _TILE * (6 + rows), 0.8)
    split = plan.rounds > 1 and 2 * batch * tiles <= gpu.processors
    if split:
        plan, shares, sets = plan._replace(shared_sums=False), _Shares(tiles, batch), batch * plan.rounds
    else:
        shares = _shares_of(gpu, batch, tiles, plan, 4 * projections.numel(), 4 * 4 * rows * tiles * _TILE)
        sets = shares.groups
    grad_y = _pixels(grad_y)
    new = functools.partial(x.new_empty, dtype=torch.float32)
    maps = sums = None
    if plan.rounds > 1:
        maps = new(3 * batch * 4, plan.rounds, states, tiles * _TILE)
        library.call("ss2d_maps", *inputs, *plan[:3], grad_y, maps)
    if not plan.shared_sums:
        sums = new(batch, length, tiles * _TILE)
    grad_x = torch.empty_like(x, memory_format=torch.channels_last)
    of_projections = new(shares.parts, *projections.shape)
    of_parameters = new(sets, 4, rows, tiles * _TILE)
    gradients = (_pixels(grad_x), of_projections, of_parameters)
    library.call("ss2d_backward", *inputs, *plan[:3], *shares, int(split), grad_y, sums, maps, *gradients)

    grad_weight, grad_bias, grad_A, grad_D = of_parameters.sum(0)[..., :dim].split([rank, 1, states, 1], dim=1)
    return (
        grad_x,
        of_projections.sum(0) if shares.parts > 1 else of_projections[0],
        grad_weight.transpose(1, 2),
        grad_bias.squeeze(1),
        grad_A.transpose(1, 2).flatten(0, 1),
        grad_D[0, 0].repeat(4),
    )
