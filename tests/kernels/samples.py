"""Valid arguments of every registered operator, in any sizes; a new operator is tested once it is added here."""

import torch

_generator = torch.Generator()
SIZES = {
    "selective_scan": {"batch": 2, "dim": 4, "length": 5, "state": 3, "groups": 2},
    "conv1d_silu": {"batch": 2, "length": 5, "dim": 4, "taps": 3},
    "ss2d": {"batch": 2, "dim": 4, "height": 2, "width": 3, "rank": 2, "state": 3},
    "mamba_mixer": {"batch": 2, "length": 5, "inner": 4, "taps": 3, "rank": 2, "state": 3},
    "neighborhood_attention": {"batch": 2, "heads": 2, "height": 6, "width": 7, "head_dim": 3},
    "cross_scan": {"batch": 2, "dim": 3, "height": 2, "width": 3},
    "cross_merge": {"batch": 2, "dim": 3, "height": 2, "width": 3},
}


def registered() -> list[str]:
    """Return the names of all operators in the namespace."""
    names = (each.partition("::") for each in torch._C._dispatch_get_all_op_names())
    return sorted({name.partition(".")[0] for namespace, _, name in names if namespace == "vision_kernels"})


def sample(name: str, dtype: torch.dtype = torch.float32, **sizes: int) -> list:
    """Return arguments of `torch.ops.vision_kernels.<name>`; those of a backward operator begin with a gradient."""
    if name.endswith("_backward"):
        operator = name.removesuffix("_backward")
        arguments = sample(operator, dtype, **sizes)
        result = getattr(torch.ops.vision_kernels, operator)(*arguments)
        return [_random(dtype, *result.shape), *arguments][: len(schema(name).arguments)]
    _generator.manual_seed(0)
    return list(globals()[f"_{name}"](dtype, **(SIZES[name] | sizes)))


def schema(name: str) -> torch.FunctionSchema:
    return getattr(torch.ops.vision_kernels, name).default._schema


def _random(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=_generator).to(dtype)


def _selective_scan(dtype, batch, dim, length, state, groups):
    u, delta = (_random(dtype, batch, dim, length) for _ in range(2))
    B, C = (_random(dtype, batch, groups, state, length) for _ in range(2))
    D, bias = (_random(dtype, dim) for _ in range(2))
    return u, delta, -_random(dtype, dim, state).abs(), B, C, D, bias, True, False, dtype


def _conv1d_silu(dtype, batch, length, dim, taps):
    return _random(dtype, batch, length, dim), _random(dtype, dim, taps)


def _ss2d(dtype, batch, dim, height, width, rank, state):
    x, projections = _random(dtype, batch, dim, height, width), (batch, height * width, 4, rank + 2 * state)
    weight, bias = _random(dtype, 4, dim, rank), _random(dtype, 4, dim)
    A, D = -_random(dtype, 4 * dim, state).abs(), _random(dtype, 4 * dim)
    return x, _random(dtype, *projections), weight, bias, A, D, "cross", dtype


def _mamba_mixer(dtype, batch, length, inner, taps, rank, state):
    xz, conv, x_proj = (batch, length, 2 * inner), (2 * inner, taps), (rank + 2 * state, inner)
    first = (_random(dtype, *shape) for shape in (xz, conv, x_proj, (inner, rank), (inner,)))
    return *first, -_random(dtype, inner, state).abs(), _random(dtype, inner), _random(dtype, inner)


def _neighborhood_attention(dtype, batch, heads, height, width, head_dim):
    maps = (_random(dtype, batch, heads, height, width, head_dim) for _ in range(3))
    return *maps, _random(dtype, heads, 5, 5), 3, 2


def _cross_scan(dtype, batch, dim, height, width):
    return _random(dtype, batch, dim, height, width), "cross"


def _cross_merge(dtype, batch, dim, height, width):
    return _random(dtype, batch, 4, dim, height * width), height, width, "cross"
