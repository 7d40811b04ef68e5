"""Selective scan in plain PyTorch, for machines without a compiled kernel.

The recurrence is sequential, so the cost of a naive loop is the number of small operations per step. Here everything
but the recurrence itself is computed for many steps at once in time-major layout, and one step is a single in-place
multiply-add on contiguous memory. Steps are processed in blocks whose working set stays in the processor's cache, which
also bounds the memory: nothing of size batch x dim x state x length is ever stored.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_kernels.precision import compute_dtype
from vision_kernels.selective_scan.arguments import Gradients, ScanArguments, channels_first, channels_first_backward

# Elements of one (time, batch, dim, state) buffer. The best measured on CPUs; on a GPU few launches matter more.
_BLOCK_ELEMENTS = {"cpu": 1 << 18}
_BLOCK_ELEMENTS_ELSEWHERE = 1 << 25


@dataclass
class _TimeMajor:
    """The inputs in compute precision with time first; channels split as (groups, channels a group)."""

    u: Tensor  # (length, batch, groups, channels)
    step: Tensor  # (length, batch, groups, channels): delta after bias and softplus
    A: Tensor  # (groups, channels, state)
    B: Tensor  # (length, batch, groups, state)
    C: Tensor  # (length, batch, groups, state)

    @classmethod
    def of(cls, given: ScanArguments) -> "_TimeMajor":
        u, delta, A, B, C, _, delta_bias, delta_softplus, *_ = given
        batch, length, dim, groups, _ = given.sizes()
        dtype = compute_dtype(u)
        step = delta.permute(2, 0, 1).to(dtype).contiguous()
        if delta_bias is not None:
            step = step + delta_bias.to(dtype)
        if delta_softplus:
            step = F.softplus(step)
        split = (length, batch, groups, dim // groups)
        return cls(
            u=u.permute(2, 0, 1).to(dtype).contiguous().reshape(split),
            step=step.reshape(split),
            A=A.to(dtype).reshape(groups, dim // groups, -1),
            B=B.permute(3, 0, 1, 2).to(dtype).contiguous(),
            C=C.permute(3, 0, 1, 2).to(dtype).contiguous(),
        )

    def blocks(self) -> list[slice]:
        """Split time into blocks of a bounded number of (time, batch, dim, state) elements."""
        length = self.u.shape[0]
        budget = _BLOCK_ELEMENTS.get(self.u.device.type, _BLOCK_ELEMENTS_ELSEWHERE)
        steps = max(1, budget // self.initial_state().numel())
        return [slice(start, min(start + steps, length)) for start in range(0, length, steps)]

    def initial_state(self) -> Tensor:
        return self.u.new_zeros(*self.u.shape[1:], self.A.shape[-1])

    def states(self, block: slice, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return decay exp(step A) and all states of a block that starts from `state`, both (time, ..., state)."""
        decay = torch.exp_(self.step[block].unsqueeze(-1) * self.A)
        states = (self.step[block] * self.u[block]).unsqueeze(-1) * self.B[block].unsqueeze(-2)
        for decay_t, state_t in zip(decay.unbind(0), states.unbind(0), strict=True):
            state_t.addcmul_(decay_t, state)
            state = state_t
        return decay, states


@channels_first
def forward(given: ScanArguments) -> Tensor:
    """Return y with the shape of u."""
    inputs = _TimeMajor.of(given)
    y = torch.empty_like(inputs.u)
    state = inputs.initial_state()
    for block in inputs.blocks():
        _, states = inputs.states(block, state)
        torch.matmul(states, inputs.C[block].unsqueeze(-1), out=y[block].unsqueeze(-1))
        state = states[-1]
    y = y.flatten(2)  # (length, batch, dim)
    if given.D is not None:
        y.addcmul_(inputs.u.flatten(2), given.D.to(y.dtype))
    return y.permute(1, 2, 0)


@channels_first_backward
def backward(grad_y: Tensor, given: ScanArguments) -> Gradients:
    """Return the gradients of the tensors.

    With s the states, g the gradient of y and h that of the states, time reversed: h_t = g_t C_t + a_{t+1} h_{t+1}.
    States are recomputed block by block from the block boundaries instead of being kept from the forward pass.
    """
    inputs = _TimeMajor.of(given)
    grad_y = grad_y.permute(2, 0, 1).to(inputs.u.dtype).contiguous()
    grad_y = grad_y.reshape(inputs.u.shape)
    grad_drive = torch.empty_like(inputs.u)  # of step * u
    grad_step = torch.empty_like(inputs.u)
    grad_A, grad_B, grad_C = torch.zeros_like(inputs.A), torch.empty_like(inputs.B), torch.empty_like(inputs.C)

    for block, decay, states, start_state, grad_states in _reversed_blocks(inputs, grad_y):
        step = inputs.step[block]
        drive = step * inputs.u[block]
        torch.matmul(grad_y[block].unsqueeze(-2), states, out=grad_C[block].unsqueeze(-2))
        torch.matmul(drive.unsqueeze(-2), grad_states, out=grad_B[block].unsqueeze(-2))
        torch.matmul(grad_states, inputs.B[block].unsqueeze(-1), out=grad_drive[block].unsqueeze(-1))
        # d/d(step A) = h_t a_t s_{t-1}, in the memory of the decay
        decay[1:].mul_(states[:-1])
        decay[0].mul_(start_state)
        grad_exponent = decay.mul_(grad_states)
        grad_A += torch.einsum("tbgcn,tbgc->gcn", grad_exponent, step)
        grad_step[block] = torch.einsum("tbgcn,gcn->tbgc", grad_exponent, inputs.A)

    grad_step.addcmul_(grad_drive, inputs.u)
    grad_u = grad_drive.mul_(inputs.step).flatten(2)
    flat_u, flat_grad_y = inputs.u.flatten(2), grad_y.flatten(2)
    grad_D = None if given.D is None else (flat_grad_y * flat_u).sum((0, 1))
    if given.D is not None:
        grad_u.addcmul_(flat_grad_y, given.D.to(grad_u.dtype))
    grad_delta = grad_step.flatten(2)
    if given.delta_softplus:
        # softplus'(x) = 1 - exp(-softplus(x)); above 20, where torch's softplus(x) is x, that is 1 to 2e-9.
        grad_delta = grad_delta.mul_(-torch.expm1(-inputs.step.flatten(2)))
    grad_bias = None if given.delta_bias is None else grad_delta.sum((0, 1))
    grad_u, grad_delta, grad_B, grad_C = (each.movedim(0, -1) for each in (grad_u, grad_delta, grad_B, grad_C))
    return grad_u, grad_delta, grad_A.flatten(0, 1), grad_B, grad_C, grad_D, grad_bias


def _reversed_blocks(inputs: _TimeMajor, grad_y: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor]]:
    """Yield (block, decay, states, state before the block, gradient of the states), last block first."""
    blocks = inputs.blocks()
    starts = [inputs.initial_state()]
    for block in blocks[:-1]:
        starts.append(inputs.states(block, starts[-1])[1][-1].clone())

    carry = torch.zeros_like(starts[0])  # a_{t+1} h_{t+1} from the block after this one
    for block, start in zip(reversed(blocks), reversed(starts), strict=True):
        decay, states = inputs.states(block, start)
        grad_states = grad_y[block].unsqueeze(-1) * inputs.C[block].unsqueeze(-2)
        later: tuple[Tensor, Tensor] | None = None
        for decay_t, grad_t in zip(reversed(decay.unbind(0)), reversed(grad_states.unbind(0)), strict=True):
            if later is None:
                grad_t.add_(carry)
            else:
                grad_t.addcmul_(*later)
            later = decay_t, grad_t
        carry = decay[0] * grad_states[0]
        yield block, decay, states, start, grad_states
