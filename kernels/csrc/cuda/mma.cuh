// Products of small matrices by a warp, on tensor cores if the GPU has them.
//
// The only instruction is mma.m16n8k16 on bfloat16 with sums in float32. Lane 4 g + q holds of the product
// C (16 x 8) += A (16 x 16) B (16 x 8), with pairs of bfloat16 in one register:
//   C: rows g and g + 8, columns 2 q and 2 q + 1; A: these rows, columns 2 q, 2 q + 1 and 2 q + 8, 2 q + 9;
//   B: the rows 2 q, 2 q + 1 and 2 q + 8, 2 q + 9 of column g.
// Numbers of higher precision are split into a sum of bfloat16 numbers, and the products of the relevant parts are
// added.
#pragma once
#include "launch.h"

namespace {

__device__ __forceinline__ unsigned pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    unsigned bits;
    memcpy(&bits, &pair, sizeof bits);
    return bits;
}
__device__ __forceinline__ float low_of(unsigned pair) { return __int_as_float(int(pair << 16)); }
__device__ __forceinline__ float high_of(unsigned pair) { return __int_as_float(int(pair & 0xFFFF0000u)); }

// Two numbers as sums of kParts pairs of bfloat16, each 8 bits more precise than the one before.
template <int kParts>
struct Split {
    unsigned part[kParts];

    __device__ __forceinline__ Split() {}
    __device__ __forceinline__ Split(float low, float high) {
#pragma unroll
        for (int i = 0; i < kParts; ++i) {
            part[i] = pack(low, high);
            low -= low_of(part[i]);
            high -= high_of(part[i]);
        }
    }
};

#ifndef VK_WARP_REGISTERS
// Some registers of all lanes of the warp.
template <int kCount>
class WarpRegisters {
  public:
    __device__ __forceinline__ explicit WarpRegisters(const unsigned (&own)[kCount]) : own(own) {}
    __device__ __forceinline__ unsigned of(int lane, int index) const { return __shfl_sync(~0u, own[index], lane); }

  private:
    const unsigned (&own)[kCount];
};
#endif

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ < 800
// C += A B without the instruction. Not inlined: kernels have dozens of them, and compilers would take minutes.
__device__ __noinline__ float4 multiply_by_shuffles(float4 c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                                                    unsigned b1) {
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const unsigned own[6] = {a0, a1, a2, a3, b0, b1};
    const WarpRegisters<6> all(own);
#pragma unroll
    for (int k = 0; k < 8; ++k) {
        const unsigned upper = all.of(4 * g + k % 4, k / 4 * 2), lower = all.of(4 * g + k % 4, k / 4 * 2 + 1);
        const unsigned left = all.of(8 * q + k % 4, 4 + k / 4), right = all.of(8 * q + 4 + k % 4, 4 + k / 4);
        c.x += low_of(upper) * low_of(left) + high_of(upper) * high_of(left);
        c.y += low_of(upper) * low_of(right) + high_of(upper) * high_of(right);
        c.z += low_of(lower) * low_of(left) + high_of(lower) * high_of(left);
        c.w += low_of(lower) * low_of(right) + high_of(lower) * high_of(right);
    }
    return c;
}
#endif

// C += A B, with the registers in the order of the instruction.
__device__ __forceinline__ void multiply(float& c0, float& c1, float& c2, float& c3, unsigned a0, unsigned a1, unsigned a2,
                                         unsigned a3, unsigned b0, unsigned b1) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
    const float4 c = multiply_by_shuffles(make_float4(c0, c1, c2, c3), a0, a1, a2, a3, b0, b1);
    c0 = c.x, c1 = c.y, c2 = c.z, c3 = c.w;
#endif
}

// Lane 4 g + q holds two elements of row g of an 8 x 8 matrix, in columns 2 q and 2 q + 1; the same of its transpose.
__device__ __forceinline__ unsigned transposed(unsigned pair) {
#if defined(__CUDA_ARCH__)
    unsigned result;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
    return result;
#else
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const unsigned own[1] = {pair};
    const WarpRegisters<1> all(own);
    const unsigned first = all.of(8 * q + g / 2, 0), second = all.of(8 * q + 4 + g / 2, 0);
    return (first >> 16 * (g % 2) & 0xFFFF) | (second >> 16 * (g % 2) & 0xFFFF) << 16;
#endif
}

// C += A B of operands in parts. Negligible products, whose indices of parts add up to kPrecision or more, are skipped.
template <int kPrecision, int kPartsOfA, int kPartsOfB>
__device__ __forceinline__ void multiply(float& c0, float& c1, float& c2, float& c3, const Split<kPartsOfA> (&a)[4],
                                         const Split<kPartsOfB> (&b)[2]) {
#pragma unroll
    for (int i = kPartsOfA - 1; i >= 0; --i)
#pragma unroll
        for (int j = kPartsOfB - 1; j >= 0; --j)
            if (i + j < kPrecision)
                multiply(c0, c1, c2, c3, a[0].part[i], a[1].part[i], a[2].part[i], a[3].part[i], b[0].part[j],
                         b[1].part[j]);
}

template <int kParts>
__device__ __forceinline__ Split<kParts> transposed(const Split<kParts>& pair) {
    Split<kParts> result;
#pragma unroll
    for (int i = 0; i < kParts; ++i) result.part[i] = transposed(pair.part[i]);
    return result;
}

// Two adjacent elements as a sum of numbers of bfloat16.
template <class T>
constexpr int kPartsOf = sizeof(T) == 4 ? 3 : 2;
template <>
constexpr int kPartsOf<__nv_bfloat16> = 1;

// `count` of them; zeros instead of the others. They are loaded at once if they are aligned.
template <class T>
__device__ __forceinline__ Split<kPartsOf<T>> load_pair(const T* source, int count, bool aligned) {
    if constexpr (kPartsOf<T> == 1) {
        Split<1> pair;
        pair.part[0] = 0;
        if (aligned) {
            if (count > 0) pair.part[0] = *reinterpret_cast<const unsigned*>(source);
            return pair;
        }
    }
    return {count > 0 ? to_float(source[0]) : 0.0f, count > 1 ? to_float(source[1]) : 0.0f};
}

}  // namespace
