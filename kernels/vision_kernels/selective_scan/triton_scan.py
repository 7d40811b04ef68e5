"""Selective scan by Triton: how the kernels are launched.

Sizes follow from shapes alone and are not tuned by measuring, so that a result is the same in every run.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vision_kernels.selective_scan.triton_kernels import chain, scan_adjoint, scan_backward, scan_forward

_WARP = 32
_STATES_PER_LANE = 16
# Time is cut into chunks only where this many programs would not come together otherwise, about two for each scheduler
# of a large GPU, and chunks do not get shorter than so many steps.
_ENOUGH_PROGRAMS = 1024
_SHORTEST_CHUNK = 128


class Plan(NamedTuple):
    """How the work is divided among programs."""

    tile: int  # states, up to a power of two
    block: int  # channels of a program
    steps: int  # whose inputs are loaded together
    blocks: int  # of channels, none of which crosses groups
    chunks: int  # of time
    chunk_steps: int

    @classmethod
    def of(cls, batch: int, dim: int, length: int, groups: int, states: int, steps: int) -> "Plan":
        tile, steps = power_of_two(states), min(steps, power_of_two(length))
        block = max(1, min(_WARP, _WARP * _STATES_PER_LANE // tile))
        blocks = groups * -(-(dim // groups) // block)
        chunks = max(1, min(-(-_ENOUGH_PROGRAMS // max(1, batch * blocks)), length // _SHORTEST_CHUNK))
        chunk_steps = -(-length // (chunks * steps)) * steps
        return cls(tile, block, steps, blocks, -(-length // chunk_steps) if length else 1, chunk_steps)


def forward_steps(tile: int, element_size: int) -> int:
    """Return as many steps as fit into the registers with what is loaded ahead, for sizes of B in bytes."""
    steps = {1: 16, 2: 8, 4: 8, 8: 8, 16: 4}.get(tile, 2)
    return steps // 2 if element_size > 2 and tile > 2 else steps


def backward_steps(tile: int, element_size: int) -> int:
    """The same for the backward pass, which holds the states of all these steps instead of what is loaded ahead."""
    steps = {1: 8, 2: 8, 4: 4, 8: 4}.get(tile, 1)
    return steps // 2 if element_size > 2 and tile == 8 else steps


def power_of_two(number: int) -> int:
    """Return the least power of two that is not less."""
    return 1 << max(0, number - 1).bit_length()


class _Inputs:
    """The inputs with channels last, whatever their layout was, and parameters in float32."""

    def __init__(self, u, delta, A, B, C, D, delta_bias, delta_softplus, channels_last):
        if not channels_last:
            u, delta, B, C = (each.movedim(-1, 1) for each in (u, delta, B, C))
        self.u, self.delta = u, delta  # (batch, length, dim)
        # (batch, length, groups, states); a copy of what is small saves more than it costs
        self.B, self.C = (_aligned(each) if each.shape[3] * each.element_size() == 16 else each for each in (B, C))
        self.A = A.float().contiguous()
        self.D, self.bias = (None if each is None else each.float().contiguous() for each in (D, delta_bias))
        self.softplus = delta_softplus
        self.batch, self.length, self.dim = u.shape
        self.groups, self.states = B.shape[2:]

    def plan(self, steps: Callable[[int, int], int]) -> Plan:
        together = steps(power_of_two(self.states), self.B.element_size())
        return Plan.of(self.batch, self.dim, self.length, self.groups, self.states, together)

    def new(self, *shape: int) -> Tensor:
        return self.A.new_empty(shape, dtype=torch.float32)

    def sizes(self, plan: Plan) -> tuple[int, ...]:
        return self.length, self.dim, self.dim // self.groups, plan.blocks, plan.chunks, plan.chunk_steps, 1

    def options(self, plan: Plan) -> dict[str, int | bool]:
        """The constants of all kernels but `chain`."""
        tiling = {"TILE": plan.tile, "BLOCK": plan.block, "STEPS": plan.steps}
        vector = all(_loads_at_once(each) for each in (self.B, self.C))
        return tiling | {"STATES": self.states, "SOFTPLUS": self.softplus, "VECTOR": vector, "num_warps": 1}

    def strides(self) -> tuple[int, ...]:
        return *over_time(self.u), *over_time(self.delta), *with_groups(self.B), *with_groups(self.C)


def _loads_at_once(coupling: Tensor) -> bool:
    """Return whether the states of (batch, length, groups, states) fill 16 bytes everywhere, and these are aligned."""
    size = coupling.element_size()
    aligned = all(each * size % 16 == 0 for each in coupling.stride()[:3]) and coupling.data_ptr() % 16 == 0
    return coupling.shape[3] * size == 16 and coupling.stride(3) == 1 and aligned


def _aligned(coupling: Tensor) -> Tensor:
    return coupling if _loads_at_once(coupling) else coupling.clone(memory_format=torch.contiguous_format)


def over_time(sequence: Tensor) -> tuple[int, int, int]:
    """Strides of (batch, length, dim) in the order of the kernels: batch, dim, length."""
    batch, length, dim = sequence.stride()
    return batch, dim, length


def with_groups(coupling: Tensor) -> tuple[int, int, int, int]:
    """Strides of (batch, length, groups, states) in the order of the kernels: batch, groups, states, length."""
    batch, length, groups, states = coupling.stride()
    return batch, groups, states, length


def selective_scan_triton(
    u, delta, A, B, C, D, delta_bias, delta_softplus: bool, channels_last: bool, out_dtype: torch.dtype
) -> Tensor:
    """Return y with the shape of u. Shapes as in the operator."""
    inputs = _Inputs(u, delta, A, B, C, D, delta_bias, delta_softplus, channels_last)
    y = torch.empty_like(u, dtype=out_dtype, memory_format=torch.contiguous_format)
    if y.numel() == 0:
        return y
    plan = inputs.plan(forward_steps)
    with torch.cuda.device_of(u):
        starts = _starts(inputs, plan)[0] if plan.chunks > 1 else None
        _launch_forward(inputs, plan, y if channels_last else y.movedim(-1, 1), None, starts)
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
    """Turn what chunks hand on into what they start from: totals (rows, chunks, dim), states (rows, chunks, tile, dim).

    `A` is (rows of A x dim, states); rows take those of A in turn.
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


def selective_scan_triton_backward(
    grad_y, u, delta, A, B, C, D, delta_bias, delta_softplus: bool, channels_last: bool
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the seven tensor inputs (None where an optional input is absent)."""
    inputs = _Inputs(u, delta, A, B, C, D, delta_bias, delta_softplus, channels_last)
    plan = inputs.plan(backward_steps)
    grad_u, grad_delta = (torch.empty_like(each, memory_format=torch.contiguous_format) for each in (u, delta))
    parts = inputs.batch, plan.chunks
    grad_A = inputs.new(*parts, plan.tile, inputs.dim)
    grad_B, grad_C = (inputs.new(inputs.batch, plan.blocks, inputs.length, plan.tile) for _ in range(2))
    grad_D, grad_bias = (None if each is None else inputs.new(*parts, inputs.dim) for each in (D, delta_bias))
    if u.numel():
        maps = (each if channels_last else each.movedim(-1, 1) for each in (grad_y, grad_u, grad_delta))
        with torch.cuda.device_of(u):
            _launch_backward(inputs, plan, *maps, grad_A, grad_B, grad_C, grad_D, grad_bias)
    else:
        grad_A, grad_D, grad_bias = (each if each is None else each.zero_() for each in (grad_A, grad_D, grad_bias))

    def of_groups(part: Tensor, dtype: torch.dtype) -> Tensor:
        part = part[..., : inputs.states].unflatten(1, (inputs.groups, -1)).sum(2).to(dtype)
        return part.transpose(1, 2) if channels_last else part.transpose(2, 3)

    return (
        grad_u,
        grad_delta,
        grad_A[:, :, : inputs.states].sum((0, 1)).t().to(A.dtype),
        of_groups(grad_B, B.dtype),
        of_groups(grad_C, C.dtype),
        None if D is None else grad_D.sum((0, 1)).to(D.dtype),
        None if delta_bias is None else grad_bias.sum((0, 1)).to(delta_bias.dtype),
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
    """Return what the chunk after each one adds to the gradient of its last state, as `_starts`."""
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
