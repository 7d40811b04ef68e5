"""Launches of the Triton kernels for the selective scan.

Sizes follow from shapes alone and are not autotuned, so that results are the same in every run.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vision_kernels.selective_scan.arguments import Gradients, ScanArguments
from vision_kernels.selective_scan.triton_kernels import chain, scan_adjoint, scan_backward, scan_forward
from vision_kernels.views import as_parameter, contiguous_like

_WARP = 32
_STATES_PER_LANE = 16
# Time is split into chunks only if there are fewer programs than this, about two for each scheduler of a large GPU.
_ENOUGH_PROGRAMS = 1024
_SHORTEST_CHUNK = 128  # steps


class Plan(NamedTuple):
    """Division of the work among programs."""

    tile: int  # number of states, rounded up to a power of two
    block: int  # channels of a program
    steps: int  # steps whose inputs are loaded together
    blocks: int  # blocks of channels, each within one group
    chunks: int  # chunks of time
    chunk_steps: int

    @classmethod
    def of(cls, batch: int, dim: int, length: int, groups: int, states: int, steps: int) -> "Plan":
        tile, steps = power_of_two(states), min(steps, power_of_two(length))
        block = max(1, min(_WARP, _WARP * _STATES_PER_LANE // tile))
        blocks = groups * -(-(dim // groups) // block)
        chunks = max(1, min(-(-_ENOUGH_PROGRAMS // (batch * blocks)), length // _SHORTEST_CHUNK))
        chunk_steps = -(-length // (chunks * steps)) * steps
        return cls(tile, block, steps, blocks, -(-length // chunk_steps), chunk_steps)


def forward_steps(tile: int, element_size: int) -> int:
    """Return how many steps fit into the registers, including the inputs that are loaded ahead."""
    steps = {1: 16, 2: 8, 4: 8, 8: 8, 16: 4}.get(tile, 2)
    return steps // 2 if element_size > 2 and tile > 2 else steps


def backward_steps(tile: int, element_size: int) -> int:
    """Return the same for the backward pass, which keeps the states of all these steps and loads nothing ahead."""
    steps = {1: 8, 2: 8, 4: 4, 8: 4}.get(tile, 1)
    return steps // 2 if element_size > 2 and tile == 8 else steps


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least `number`."""
    return 1 << max(0, number - 1).bit_length()


class _Inputs:
    """The inputs with channels last, and parameters in float32."""

    def __init__(self, given: ScanArguments) -> None:
        self.u, self.delta, A, B, C, D, bias, self.softplus, *_ = given.in_layout(channels_last=True)
        # (batch, length, groups, states); copying these small tensors saves more than it costs
        self.B, self.C = (_aligned(each) if each.shape[3] * each.element_size() == 16 else each for each in (B, C))
        self.A, self.D, self.bias = A.float().contiguous(), as_parameter(D), as_parameter(bias)
        self.batch, self.length, self.dim, self.groups, self.states = given.sizes()

    def plan(self, steps: Callable[[int, int], int]) -> Plan:
        together = steps(power_of_two(self.states), self.B.element_size())
        return Plan.of(self.batch, self.dim, self.length, self.groups, self.states, together)

    def new(self, *shape: int) -> Tensor:
        return self.A.new_empty(shape, dtype=torch.float32)

    def sizes(self, plan: Plan) -> tuple[int, ...]:
        return self.length, self.dim, self.dim // self.groups, plan.blocks, plan.chunks, plan.chunk_steps, 1

    def options(self, plan: Plan) -> dict[str, int | bool]:
        """Return the constants of all kernels but `chain`."""
        tiling = {"TILE": plan.tile, "BLOCK": plan.block, "STEPS": plan.steps}
        vector = all(_loads_at_once(each) for each in (self.B, self.C))
        return tiling | {"STATES": self.states, "SOFTPLUS": self.softplus, "VECTOR": vector, "num_warps": 1}

    def strides(self) -> tuple[int, ...]:
        return *over_time(self.u), *over_time(self.delta), *with_groups(self.B), *with_groups(self.C)


def _loads_at_once(coupling: Tensor) -> bool:
    """Return whether the states of (batch, length, groups, states) are 16 aligned bytes everywhere."""
    size = coupling.element_size()
    aligned = all(each * size % 16 == 0 for each in coupling.stride()[:3]) and coupling.data_ptr() % 16 == 0
    return coupling.shape[3] * size == 16 and coupling.stride(3) == 1 and aligned


def _aligned(coupling: Tensor) -> Tensor:
    return coupling if _loads_at_once(coupling) else coupling.clone(memory_format=torch.contiguous_format)


def over_time(sequence: Tensor) -> tuple[int, int, int]:
    """Return the strides of (batch, length, dim) in the order of the kernels: batch, dim, length."""
    batch, length, dim = sequence.stride()
    return batch, dim, length


def with_groups(coupling: Tensor) -> tuple[int, int, int, int]:
    """Return the strides of (batch, length, groups, states) in the kernels' order: batch, groups, states, length."""
    batch, length, groups, states = coupling.stride()
    return batch, groups, states, length


def forward(given: ScanArguments) -> Tensor:
    """Return y with the shape of u."""
    inputs, y = _Inputs(given), contiguous_like(given.u, given.out_dtype)
    plan = inputs.plan(forward_steps)
    with torch.cuda.device_of(y):
        starts = _starts(inputs, plan)[0] if plan.chunks > 1 else None
        _launch_forward(inputs, plan, y if given.channels_last else y.movedim(-1, 1), None, starts)
    return y


def _launch_forward(inputs: _Inputs, plan: Plan, y: Tensor | None, totals: Tensor | None, states: Tensor | None):
    arguments = (inputs.u, inputs.delta, inputs.A, inputs.B, inputs.C, inputs.D, inputs.bias, y, totals, states)
    y_strides = (0, 0, 0) if y is None else over_time(y)
    scan_forward[(inputs.batch * plan.blocks * plan.chunks,)](
        *arguments,
        *inputs.sizes(plan),
        *inputs.strides(),
        *y_strides,
        **inputs.options(plan),
        OUTPUT=y is not None,
        CHAINED=y is not None and states is not None,
    )


def _starts(inputs: _Inputs, plan: Plan) -> tuple[Tensor, Tensor]:
    """Return the state that each chunk starts from, (batch, chunks, tile, dim), and the sums of steps."""
    totals = inputs.new(inputs.batch, plan.chunks, inputs.dim)
    states = inputs.new(inputs.batch, plan.chunks, plan.tile, inputs.dim)
    _launch_forward(inputs, plan, None, totals, states)
    launch_chain(totals, states, inputs.A, plan.block, backwards=False)
    return states, totals


def launch_chain(totals: Tensor, states: Tensor, A: Tensor, block: int, backwards: bool) -> None:
    """Replace the state that each chunk contributes by the one that it starts from.

    Args:
        totals: (rows, chunks, dim), the sums of steps.
        states: (rows, chunks, tile, dim), overwritten.
        A: (rows of A x dim, states); the rows cycle through those of A.
        block: Channels of a program.
        backwards: Start from the last chunk.
    """
    rows, chunks, tile, dim = states.shape
    blocks = -(-dim // block)
    chain[(rows * blocks,)](
        totals,
        states,
        A,
        dim,
        blocks,
        chunks,
        A.shape[0] // dim,
        1,
        STATES=A.shape[1],
        TILE=tile,
        BLOCK=block,
        STEPS=4 if tile <= 8 else 2,
        BACKWARDS=backwards,
        num_warps=1,
    )


def backward(grad_y: Tensor, given: ScanArguments) -> Gradients:
    """Return the gradients of the tensors."""
    inputs, last = _Inputs(given), given.channels_last
    plan, states = inputs.plan(backward_steps), inputs.states
    grad_u, grad_delta = contiguous_like(given.u), contiguous_like(given.delta)
    parts = inputs.batch, plan.chunks
    grad_A = inputs.new(*parts, plan.tile, inputs.dim)
    grad_B, grad_C = (inputs.new(inputs.batch, plan.blocks, inputs.length, plan.tile) for _ in range(2))
    grad_D, grad_bias = (None if each is None else inputs.new(*parts, inputs.dim) for each in (inputs.D, inputs.bias))
    maps = (each if last else each.movedim(-1, 1) for each in (grad_y, grad_u, grad_delta))
    with torch.cuda.device_of(given.u):
        _launch_backward(inputs, plan, *maps, grad_A, grad_B, grad_C, grad_D, grad_bias)

    def of_groups(part: Tensor) -> Tensor:
        return part[..., :states].unflatten(1, (inputs.groups, -1)).sum(2).transpose(*(1, 2) if last else (2, 3))

    return (
        grad_u,
        grad_delta,
        grad_A[:, :, :states].sum((0, 1)).t(),
        of_groups(grad_B),
        of_groups(grad_C),
        None if grad_D is None else grad_D.sum((0, 1)),
        None if grad_bias is None else grad_bias.sum((0, 1)),
    )


def _launch_backward(inputs: _Inputs, plan: Plan, grad_y, grad_u, grad_delta, *parts: Tensor | None) -> None:
    starts, adjoints = None, None
    if plan.chunks > 1:
        starts, totals = _starts(inputs, plan)
        adjoints = _adjoints(inputs, plan, grad_y, totals)
    all_steps = plan.chunks * plan.chunk_steps // plan.steps
    boundaries = inputs.new(inputs.batch, all_steps, plan.tile, inputs.dim)
    scan_backward[(inputs.batch * plan.blocks * plan.chunks,)](
        grad_y,
        inputs.u,
        inputs.delta,
        inputs.A,
        inputs.B,
        inputs.C,
        inputs.D,
        inputs.bias,
        starts,
        adjoints,
        boundaries,
        grad_u,
        grad_delta,
        *parts,
        *inputs.sizes(plan),
        all_steps,
        *over_time(grad_y),
        *inputs.strides(),
        *over_time(grad_u),
        *over_time(grad_delta),
        **inputs.options(plan),
        CHAINED=plan.chunks > 1,
    )


def _adjoints(inputs: _Inputs, plan: Plan, grad_y: Tensor, totals: Tensor) -> Tensor:
    """Return what the following chunk adds to the gradient of each chunk's last state, in the shape of `_starts`."""
    adjoints = inputs.new(inputs.batch, plan.chunks, plan.tile, inputs.dim)
    scan_adjoint[(inputs.batch * plan.blocks * plan.chunks,)](
        grad_y,
        inputs.delta,
        inputs.A,
        inputs.C,
        inputs.bias,
        adjoints,
        *inputs.sizes(plan),
        *over_time(grad_y),
        *over_time(inputs.delta),
        *with_groups(inputs.C),
        **inputs.options(plan),
    )
    launch_chain(totals, adjoints, inputs.A, plan.block, backwards=True)
    return adjoints
