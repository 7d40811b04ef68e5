// Exchanges between the lanes of several vectors.
#pragma once
#include "simd.h"

namespace {

template <int... Lane>
struct Lanes {};
#if defined(__AVX512F__)
using AllLanes = Lanes<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>;
#elif defined(__AVX2__)
using AllLanes = Lanes<0, 1, 2, 3, 4, 5, 6, 7>;
#else
using AllLanes = Lanes<0, 1, 2, 3>;
#endif

// The lanes of a and b with the given indices into their concatenation.
#if defined(__clang__)
#define VK_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define VK_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, IntVec{__VA_ARGS__})
#endif

template <int... Lane>
VK_INLINE Vec reversed(Vec x, Lanes<Lane...>) {
    return VK_SHUFFLE(x, x, (kLanes - 1 - Lane)...);
}
VK_INLINE Vec reversed(Vec x) { return reversed(x, AllLanes{}); }

// Regards a and b as rows of a matrix of Distance x Distance squares, and returns the two rows that result from
// exchanging the squares off the diagonal.
template <int Distance, int... Lane>
VK_INLINE Vec upper_row(Vec a, Vec b, Lanes<Lane...>) {
    return VK_SHUFFLE(a, b, (Lane & Distance ? kLanes + Lane - Distance : Lane)...);
}
template <int Distance, int... Lane>
VK_INLINE Vec lower_row(Vec a, Vec b, Lanes<Lane...>) {
    return VK_SHUFFLE(a, b, (Lane & Distance ? kLanes + Lane : Lane + Distance)...);
}

// A square matrix of kLanes rows, in place.
template <int Distance = kLanes / 2>
VK_INLINE void transpose(Vec* rows) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
        if (i & Distance) continue;
        const Vec a = rows[i], b = rows[i + Distance];
        rows[i] = upper_row<Distance>(a, b, AllLanes{});
        rows[i + Distance] = lower_row<Distance>(a, b, AllLanes{});
    }
    if constexpr (Distance > 1) transpose<Distance / 2>(rows);
}

// Lane i of the result is the sum of rows[i], which is overwritten.
template <int Distance = kLanes / 2>
VK_INLINE Vec sums(Vec* rows) {
#pragma GCC unroll 16
    for (int i = 0; i < Distance; ++i)
        rows[i] = upper_row<Distance>(rows[i], rows[i + Distance], AllLanes{}) +
                  lower_row<Distance>(rows[i], rows[i + Distance], AllLanes{});
    if constexpr (Distance > 1) return sums<Distance / 2>(rows);
    return rows[0];
}

}  // namespace
