"""Functions and constants of the Triton kernels of several operators."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LARGEST = tl.constexpr(3.4028234663852886e38)  # of float32


@triton.jit
def softplus(x):
    """Return log(1 + exp(x)) of float32, with a relative error of 3e-7 for any x.

    It uses a polynomial for log(1 + e) / e with e = exp(-|x|) from 0 to 1: a logarithm would be slower, and inaccurate
    for small e.
    """
    e = tl.exp2(-tl.abs(x) * LOG2_E)
    p = 0.00512610214 * e - 0.0290740647
    p = p * e + 0.0775160867
    p = p * e - 0.136022476
    p = p * e + 0.190768807
    p = p * e - 0.24835399
    p = p * e + 0.333181217
    p = p * e - 0.49999445
    p = p * e + 0.999999966
    # `maximum` may drop NaN; the polynomial does not.
    return tl.maximum(x, 0.0) + p * e


@triton.jit
def sigmoid(x):
    """Return 1 / (1 + exp(-x)) of float32."""
    return 1.0 / (1.0 + tl.exp2(-x * LOG2_E))


@triton.jit
def finite(x):
    """Replace infinities by the largest finite number, so that a product with zero is zero; NaN stays NaN."""
    return tl.where(x < -LARGEST, -LARGEST, tl.where(x > LARGEST, LARGEST, x))


@triton.jit
def silu(x):
    """Return x sigmoid(x) of float32, with its limit -0 at minus infinity."""
    return tl.where(x < -LARGEST, -LARGEST, x) * sigmoid(x)


@triton.jit
def silu_slope(x):
    """Return the derivative of silu, with its limits at the infinities."""
    gate = sigmoid(x)
    return gate * (1.0 + finite(x) * (1.0 - gate))


@triton.jit
def load_steps(at, t, stop, stride, mask, STEPS: tl.constexpr):
    """Load `STEPS` steps from t on as a tuple, in their own dtype; zeros from `stop` on and where `mask` is not set."""
    steps = ()
    for k in tl.static_range(STEPS):
        offset = (t + k + tl.full((), 0, tl.int64)) * stride
        steps = steps + (tl.load(at + offset, mask=mask & (t + k < stop), other=0.0),)
    return steps
