"""SS2D by the CUDA kernels (csrc/cuda/ss2d.cu and ss2d_backward.cu)."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from vision_kernels.cross_scan import ROUTES
from vision_kernels.cuda import Library, shared_bytes

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TILE = 16  # kTile in csrc/cuda/ss2d.cuh: channels of a block
_SEGMENTS = 8  # of a route, to each warp
_FORWARD_WARPS, _BACKWARD_WARPS = 14, 12
_STATIC_SHARED_BYTES = 2 << 10  # that a block needs besides, at most


class Gpu(NamedTuple):
    """What a plan depends on."""

    processors: int
    shared_bytes: int  # that a block may use


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """Return the limits of a GPU; emulated on a CPU, those of an H200."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
    return Gpu(processors, shared_bytes(device) - _STATIC_SHARED_BYTES)


class Plan(NamedTuple):
    """How a route is cut up: in every round, each warp of a block takes _SEGMENTS segments of `steps` positions."""

    warps: int
    steps: int
    rounds: int
    shared_sums: bool  # outputs of the routes are added up in shared memory


@functools.lru_cache(maxsize=1024)
def plan_of(
    gpu: Gpu, blocks: int, length: int, max_steps: int, max_warps: int, bytes_of_warp: int, worth_of_rounds: float
) -> Plan:
    """Return the plan that keeps most lanes of the GPU busy.

    Args:
        gpu: That it is for.
        blocks: Of the whole grid.
        length: Of a route.
        max_steps: Of a segment.
        max_warps: That a multiprocessor can run together.
        bytes_of_warp: Shared memory that each warp needs, besides that for sums.
        worth_of_rounds: Of a plan with several rounds, compared with one as busy that has a single round.
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


def why_unable(x: Tensor, out_dtype: torch.dtype) -> str | None:
    """Return why the kernels cannot compute this, or None if they can."""
    unable = [dtype for dtype in (x.dtype, out_dtype) if dtype not in _DTYPES]
    if unable:
        return f"computes float32, float16 and bfloat16, not {unable[0]}"
    _, dim, height, width = x.shape
    if height * width * max(4 * dim, abs(x.stride(3))) >= 2**31:  # offsets inside of an image have 32 bits
        return f"takes smaller images than {height} x {width} with {dim} channels"
    return None


def ss2d_cuda(library: Library, x, projections, dt_weight, dt_bias, A, D, routes, out_dtype) -> Tensor:
    """Return y, channels last. Shapes as in `vision_kernels.ss2d.unfused`."""
    if x.numel() and _needs_padding(x, dt_weight):
        padded = _padded(x, projections, dt_weight, dt_bias, A, D)
        return ss2d_cuda(library, *padded, routes, out_dtype)[:, : x.shape[1]]
    batch, dim, height, width = x.shape
    y = torch.empty_like(x, dtype=out_dtype, memory_format=torch.channels_last)
    if x.numel() == 0:
        return y
    arguments = _arguments(x, projections, dt_weight, dt_bias, A, D, routes)
    tiles, states, length = -(-dim // _TILE), A.shape[1], height * width
    steps = 8 if states == 1 else 4  # kForwardSteps in csrc/cuda/ss2d.cu
    gpu = gpu_of(x.device)
    plan = plan_of(gpu, batch * tiles, length, steps, _FORWARD_WARPS, 4 * _TILE * (4 + 2 * states), 1)
    maps = sums = None
    if plan.rounds > 1 and 2 * batch * tiles <= gpu.processors:
        plan = plan._replace(shared_sums=False)
        maps = x.new_empty(2 * batch * 4, plan.rounds, states, tiles * _TILE, dtype=torch.float32)
        library.call("ss2d_maps", *arguments, *plan[:3], None, maps)
    if not plan.shared_sums:
        sums = x.new_empty(batch, length, tiles * _TILE, dtype=torch.float32)
    library.call("ss2d_forward", *arguments, *plan[:3], sums, maps, _pixels(y))
    return y


def _pixels(image: Tensor) -> Tensor:
    """Return (batch, length, dim) with adjacent channels in aligned fours: a view of most channels-last images."""
    batch, dim, height, width = image.shape
    by_batch, by_channel, by_row, by_column = image.stride()
    pixels = image.permute(0, 2, 3, 1)
    readable = by_channel == 1 and by_row == width * by_column and (by_batch | by_column) % 4 == 0
    too_far_apart = height * width * by_column >= 2**31  # for offsets of 32 bits inside of an image
    if not readable or too_far_apart or image.data_ptr() % 16:
        pixels = pixels.clone(memory_format=torch.contiguous_format)
    return pixels.as_strided((batch, height * width, dim), (pixels.stride(0), pixels.stride(2), 1))


def _padded(x, projections, dt_weight, dt_bias, A, D) -> tuple[Tensor, ...]:
    """Return the same with zeros behind the channels and behind the rank, as many as the kernels need."""
    rank, states, channels = dt_weight.shape[2], A.shape[1], -x.shape[1] % 4
    low, others = projections.split([rank, 2 * states], dim=3)
    pad = torch.nn.functional.pad
    return (
        pad(x, (0, 0, 0, 0, 0, channels)),
        torch.cat([pad(low, (0, rank % 2)), others], dim=3),
        pad(dt_weight, (0, rank % 2, 0, channels)),
        pad(dt_bias, (0, channels)),
        pad(A.unflatten(0, (4, -1)), (0, 0, 0, channels)).flatten(0, 1),
        pad(D.view(4, -1), (0, channels)).flatten(),
    )


def _cut(grads: tuple[Tensor, ...], x, projections, dt_weight, dt_bias, A, D) -> tuple[Tensor, ...]:
    """Return gradients without the rows and columns that `_padded` added."""
    dim, rank, states = x.shape[1], dt_weight.shape[2], A.shape[1]
    grad_x, grad_projections, grad_weight, grad_bias, grad_A, grad_D = grads
    return (
        grad_x[:, :dim],
        torch.cat([grad_projections[..., :rank], grad_projections[..., -2 * states :]], dim=3),
        grad_weight[:, :dim, :rank],
        grad_bias[:, :dim],
        grad_A.unflatten(0, (4, -1))[:, :dim].flatten(0, 1),
        grad_D.view(4, -1)[:, :dim].flatten(),
    )


def _needs_padding(x: Tensor, dt_weight: Tensor) -> bool:
    return x.shape[1] % 4 != 0 or dt_weight.shape[2] % 2 != 0


def _arguments(x, projections, dt_weight, dt_bias, A, D, routes) -> list[Tensor | int]:
    dtype = x.dtype if x.dtype == projections.dtype else torch.float32
    projections = projections.detach().to(dtype).contiguous()
    if projections.data_ptr() % 8:  # two elements of float32 are loaded at once
        projections = projections.clone()
    maps = _pixels(x.detach().to(dtype)), projections
    parameters = [each.detach().float().contiguous() for each in (dt_weight, dt_bias, A, D)]
    return [*maps, *parameters, *(route.step(x.shape[3]) for route in ROUTES[routes])]


class _Shares(NamedTuple):
    """Blocks of the backward pass: each of `parts` takes some tiles of channels, each of `groups` some images."""

    parts: int
    groups: int


@functools.lru_cache(maxsize=1024)
def _shares_of(gpu: Gpu, batch: int, tiles: int, plan: Plan, bytes_of_part: int, bytes_of_group: int) -> _Shares:
    """Return the shares that need least memory for partial sums among those that keep most of the GPU busy."""
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


def ss2d_cuda_backward(
    library: Library, grad_y, x, projections, dt_weight, dt_bias, A, D, routes
) -> tuple[Tensor, ...]:
    """Return the gradients of the six tensors from x to D."""
    inputs = (x, projections, dt_weight, dt_bias, A, D)
    if x.numel() == 0:
        return tuple(torch.zeros_like(each) for each in inputs)
    if _needs_padding(x, dt_weight):
        grad_y = torch.nn.functional.pad(grad_y, (0, 0, 0, 0, 0, -x.shape[1] % 4))
        return _cut(ss2d_cuda_backward(library, grad_y, *_padded(*inputs), routes), *inputs)
    (batch, dim, height, width), (_, _, rank), states = x.shape, dt_weight.shape, A.shape[1]
    arguments = _arguments(*inputs, routes)
    tiles, length, rows = -(-dim // _TILE), height * width, rank + states + 2
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
        library.call("ss2d_maps", *arguments, *plan[:3], grad_y, maps)
    if not plan.shared_sums:
        sums = new(batch, length, tiles * _TILE)
    grad_x = torch.empty_like(x, memory_format=torch.channels_last)
    of_projections = new(shares.parts, *projections.shape)
    of_parameters = new(sets, 4, rows, tiles * _TILE)
    gradients = (_pixels(grad_x), of_projections, of_parameters)
    library.call("ss2d_backward", *arguments, *plan[:3], *shares, int(split), grad_y, sums, maps, *gradients)

    grad_weight, grad_bias, grad_A, grad_D = of_parameters.sum(0)[..., :dim].split([rank, 1, states, 1], dim=1)
    grad_projections = of_projections.sum(0) if shares.parts > 1 else of_projections[0]
    return (
        grad_x,
        grad_projections.to(projections.dtype),
        grad_weight.transpose(1, 2).to(dt_weight.dtype),
        grad_bias.squeeze(1).to(dt_bias.dtype),
        grad_A.transpose(1, 2).flatten(0, 1).to(A.dtype),
        grad_D[0, 0].repeat(4).to(D.dtype),
    )
