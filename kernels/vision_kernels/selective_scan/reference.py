"""The definition of the selective scan, step by step. It is slow; all other backends are compared with it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_kernels.precision import compute_dtype
from vision_kernels.selective_scan.arguments import Gradients, ScanArguments, channels_first, channels_first_backward


@channels_first
def forward(given: ScanArguments) -> Tensor:
    """Return y with the shape of u."""
    u, delta, A, B, C, D, delta_bias, delta_softplus, *_ = given
    batch, length, dim, groups, states = given.sizes()
    dtype = compute_dtype(u)
    x, delta, A = u.to(dtype), delta.to(dtype), A.to(dtype)
    # (batch, groups, state, length) -> (batch, dim, state, length)
    B = B.to(dtype).repeat_interleave(dim // groups, dim=1)
    C = C.to(dtype).repeat_interleave(dim // groups, dim=1)
    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        delta = F.softplus(delta)

    state = x.new_zeros(batch, dim, states)
    outputs = []
    for t in range(length):
        step, drive = delta[:, :, t, None], (delta * x)[:, :, t, None]
        state = torch.exp(step * A) * state + drive * B[..., t]
        outputs.append((state * C[..., t]).sum(-1))
    y = torch.stack(outputs, dim=-1) if outputs else x  # of length 0
    if D is not None:
        y = y + D.to(dtype)[:, None] * x
    return y


@channels_first_backward
def backward(grad_y: Tensor, given: ScanArguments) -> Gradients:
    """Return the gradients of the tensors.

    The chain rule, time reversed: the gradient h of the states is h_t = g_t C_t + a_{t+1} h_{t+1}, where g is that of y
    and a = exp(delta A).
    """
    u, delta, A, B, C, D, delta_bias, delta_softplus, *_ = given
    batch, length, dim, groups, count = given.sizes()
    dtype = compute_dtype(u)
    x, g, A_ = u.to(dtype), grad_y.to(dtype), A.to(dtype)
    B_ = B.to(dtype).repeat_interleave(dim // groups, dim=1)
    C_ = C.to(dtype).repeat_interleave(dim // groups, dim=1)
    raw = delta.to(dtype) if delta_bias is None else delta.to(dtype) + delta_bias.to(dtype)[:, None]
    step = F.softplus(raw) if delta_softplus else raw
    decay = torch.exp(step.unsqueeze(2) * A_.unsqueeze(-1))  # (batch, dim, state, length)

    states = torch.zeros(batch, dim, count, length + 1, dtype=dtype, device=u.device)  # states[t + 1] is s_t
    for t in range(length):
        states[..., t + 1] = decay[..., t] * states[..., t] + (step * x)[:, :, None, t] * B_[..., t]
    h = torch.zeros_like(states)
    for t in reversed(range(length)):
        later = decay[..., t + 1] * h[..., t + 1] if t + 1 < length else 0.0
        h[..., t] = g[:, :, None, t] * C_[..., t] + later
    h = h[..., :length]

    exponent = h * decay * states[..., :length]  # gradient of delta A
    drive = (h * B_).sum(2)  # gradient of delta u
    grad_step = (exponent * A_.unsqueeze(-1)).sum(2) + drive * x
    grad_raw = grad_step * torch.sigmoid(raw) if delta_softplus else grad_step
    grad_u = drive * step

    def of_groups(per_channel: Tensor) -> Tensor:
        return per_channel.unflatten(1, (groups, dim // groups)).sum(2)

    return (
        grad_u if D is None else grad_u + g * D.to(dtype)[:, None],
        grad_raw,
        (exponent * step.unsqueeze(2)).sum((0, 3)),
        of_groups(h * (step * x).unsqueeze(2)),
        of_groups(g.unsqueeze(2) * states[..., 1:]),
        None if D is None else (g * x).sum((0, 2)),
        None if delta_bias is None else grad_raw.sum((0, 2)),
    )
