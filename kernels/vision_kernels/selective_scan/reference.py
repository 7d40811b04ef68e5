"""The definition of the selective scan, one step after the other. Slow; everything else is measured against it."""

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    """Return y with the shape and dtype of u. Shapes as in `vision_kernels.selective_scan`, B and C with groups."""
    batch, dim, length = u.shape
    groups, state_size = B.shape[1:3]
    dtype = compute_dtype(u)
    x, delta, A = u.to(dtype), delta.to(dtype), A.to(dtype)
    # (batch, groups, state, length) -> (batch, dim, state, length)
    B = B.to(dtype).repeat_interleave(dim // groups, dim=1)
    C = C.to(dtype).repeat_interleave(dim // groups, dim=1)
    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        delta = F.softplus(delta)

    state = x.new_zeros(batch, dim, state_size)
    outputs = []
    for t in range(length):
        step, drive = delta[:, :, t, None], (delta * x)[:, :, t, None]
        state = torch.exp(step * A) * state + drive * B[..., t]
        outputs.append((state * C[..., t]).sum(-1))
    y = torch.stack(outputs, dim=-1) if outputs else torch.zeros_like(x)
    if D is not None:
        y = y + D.to(dtype)[:, None] * x
    return y.to(u.dtype)


def selective_scan_reference_backward(grad_y: Tensor, *inputs: Tensor | bool | None) -> tuple[Tensor | None, ...]:
    """Return the gradients of the seven tensor inputs, by autograd through the definition."""
    *tensors, delta_softplus = inputs
    with torch.enable_grad():
        leaves = [tensor if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]
        y = selective_scan_reference(*leaves, delta_softplus)
        present = [leaf for leaf in leaves if leaf is not None]
        grads = iter(torch.autograd.grad(y, present, grad_y, allow_unused=True, materialize_grads=True))
    return tuple(None if leaf is None else next(grads) for leaf in leaves)


def compute_dtype(u: Tensor) -> torch.dtype:
    """The scan computes in float32, whatever the inputs are, except that float64 inputs stay float64."""
    return torch.float64 if u.dtype == torch.float64 else torch.float32
