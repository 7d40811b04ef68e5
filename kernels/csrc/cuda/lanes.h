// Sums across the lanes of a warp.
#pragma once
#include <cuda_runtime.h>

constexpr unsigned kWholeWarp = 0xFFFFFFFFu;

__host__ __device__ constexpr int highest_bit(int mask) {
    int bit = 1;
    while (bit * 2 <= mask) bit *= 2;
    return bit;
}

// Sums each of Count values across the lanes whose indices differ in the bits of Mask. The sums are distributed: a
// lane has those from `first_sum` on at the beginning of `values`; if there are fewer than lanes, several have the
// same. Halves the values with every exchange, so that Count sums cost about Count exchanges instead of Count for each
// bit.
template <int Mask, int Count>
__device__ __forceinline__ void sum_across(float* values, int lane) {
    if constexpr (Mask != 0) {
        constexpr int bit = highest_bit(Mask), half = Count / 2;
        if constexpr (half > 0) {
            const bool upper = lane & bit;
#pragma unroll
            for (int i = 0; i < half; ++i) {
                const float kept = upper ? values[i + half] : values[i], sent = upper ? values[i] : values[i + half];
                values[i] = kept + __shfl_xor_sync(kWholeWarp, sent, bit);
            }
            sum_across<Mask - bit, half>(values, lane);
        } else {
            values[0] += __shfl_xor_sync(kWholeWarp, values[0], bit);
            sum_across<Mask - bit, 1>(values, lane);
        }
    }
}

template <int Mask, int Count>
__device__ __forceinline__ int first_sum(int lane) {
    if constexpr (Mask == 0 || Count == 1) {
        return 0;
    } else {
        constexpr int bit = highest_bit(Mask), half = Count / 2;
        return (lane & bit ? half : 0) + first_sum<Mask - bit, half>(lane);
    }
}
