"""Deterministic weights and inputs, by which models can be compared with numbers recorded elsewhere.

Two models whose state dicts have the same keys and shapes get the same numbers from `fill_`, in whatever order they
register their parameters. The recorded numbers are in tests/data.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

DATA = Path(__file__).resolve().parents[1] / "data"
LOGITS_TOLERANCE = 1e-4  # MambaVision's have a standard deviation of about 3


def recorded(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the manifest and the arrays recorded under a name, such as ``mambavision/T``."""
    arrays = DATA / f"{name}.npz"
    return json.loads((DATA / f"{name}.json").read_text()), dict(np.load(arrays)) if arrays.exists() else {}


def values(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the float32 array that belongs to a state-dict key of this shape."""
    noise = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()))).standard_normal(shape, dtype=np.float32)
    leaf = key.rsplit(".", 1)[-1]
    if leaf == "running_mean":
        return 0.1 * noise
    if leaf == "running_var":
        return 0.75 + 0.25 * np.abs(noise)
    if leaf in ("A_log", "A_logs"):
        return np.log(np.arange(1, shape[-1] + 1, dtype=np.float32)) + 0.1 * noise
    if leaf in ("D", "Ds"):
        return 1.0 + 0.1 * noise
    if leaf in ("dt_projs_bias", "dt_bias") or key.endswith("dt_proj.bias"):
        return -3.0 + 0.5 * noise
    if "gamma" in leaf or "layer_scale" in key:
        return 0.5 + 0.1 * noise
    if leaf == "bias":
        return 0.1 * noise
    if len(shape) <= 1:
        return 1.0 + 0.1 * noise
    fan_in = int(np.prod(shape[1:])) if len(shape) != 3 else int(shape[-1])
    return noise / np.float32(np.sqrt(max(fan_in, 1)))


def fill_(module: torch.nn.Module) -> torch.nn.Module:
    """Overwrite every floating-point entry of the state dict by its key, and set counters to zero."""
    with torch.no_grad():
        for key, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.from_numpy(values(key, tuple(tensor.shape))))
            else:
                tensor.zero_()
    return module


def condition_(module: torch.nn.Module) -> torch.nn.Module:
    """Scale what `fill_` wrote into a SegMAN so that activations stay small and every part tells in the result."""
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            if key.endswith(("cpe1.weight", "cpe2.weight")):
                parameter *= 0.1
            elif key.endswith("x_proj_weight"):
                parameter *= parameter.shape[1] ** -0.5
    return module


def image(batch: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Return a (batch, 3, height, width) float32 standard-normal input."""
    rng = np.random.Generator(np.random.PCG64(seed))
    return torch.from_numpy(rng.standard_normal((batch, 3, height, width), dtype=np.float32))


def loss_and_gradient_norms(model: torch.nn.Module, images: torch.Tensor) -> tuple[float, dict[str, float]]:
    """Return the mean of the squared logits and the norm of its gradient by each parameter."""
    loss = model(images).square().mean()
    loss.backward()
    # float32 norms of large tensors are off by 1e-4
    norms = {name: parameter.grad.double().norm().item() for name, parameter in model.named_parameters()}
    return loss.item(), norms
