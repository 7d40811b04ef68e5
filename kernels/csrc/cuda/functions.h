// Functions in float32 that are faster than the standard ones and accurate enough for the kernels.
#pragma once
#include <cuda_runtime.h>

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

// 2^x, with a relative error of 2^-22.
__device__ __forceinline__ float exp2_fast(float x) {
#if defined(__CUDA_ARCH__)
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}

// log(1 + e) for e from 0 to 1, with a relative error of 3e-7, also where it is tiny: steps sizes of 1e-4 are common.
__device__ __forceinline__ float log1p_of_fraction(float e) {
    float p = -0.00853920728f;
    p = p * e + 0.044089634f;
    p = p * e - 0.107681729f;
    p = p * e + 0.17745243f;
    p = p * e - 0.244954646f;
    p = p * e + 0.332754791f;
    p = p * e - 0.499974042f;
    p = p * e + 0.999999821f;
    return p * e;
}

__device__ __forceinline__ float softplus(float x) {
    return fmaxf(x, 0.0f) + log1p_of_fraction(exp2_fast(-kLog2E * fabsf(x)));
}

__device__ __forceinline__ float sigmoid(float x) {
    const float e = exp2_fast(-kLog2E * fabsf(x));
    return __fdividef(x < 0 ? e : 1.0f, 1 + e);
}

// The largest finite number instead of infinities, so that a product with zero is zero; NaN stays NaN.
constexpr float kLargest = 3.40282347e38f;
__device__ __forceinline__ float finite(float x) { return x < -kLargest ? -kLargest : x > kLargest ? kLargest : x; }

// At minus infinity the limit, -0. The fast division is 0 if the denominator exceeds 2^126.
__device__ __forceinline__ float silu(float x) {
    return __fdividef(x < -kLargest ? -kLargest : x, 1 + exp2_fast(-kLog2E * x));
}

__device__ __forceinline__ float silu_slope(float x) {
    const float gate = sigmoid(x);
    return gate * (1 + finite(x) * (1 - gate));
}
