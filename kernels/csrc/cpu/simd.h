// Vectors of floats, in the compiler's own vector types (GCC and Clang, any processor).
//
// The kernel files are compiled once for each instruction set, with VK_ISA naming it. They include no C++ library
// header, and everything lives in an unnamed namespace: an inline function with a name of its own would exist once
// for each instruction set, and the linker would keep any one of them, for processors that cannot run it too.
#pragma once
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../view.h"
#include "thread_pool.h"

#define VK_JOIN_(a, b) a##_##b
#define VK_JOIN(a, b) VK_JOIN_(a, b)
// Entry point `name` of this instruction set.
#define VK_ENTRY(name) extern "C" __attribute__((visibility("default"))) int64_t VK_JOIN(name, VK_ISA)

#define VK_INLINE inline __attribute__((always_inline))
#define VK_LAMBDA __attribute__((always_inline))

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t UIntVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t ShortVec __attribute__((vector_size(kLanes * 2)));
typedef Vec UnalignedVec __attribute__((aligned(4), may_alias));
typedef ShortVec UnalignedShortVec __attribute__((aligned(2), may_alias));

struct BFloat16 {
    uint16_t bits;
};

template <class T>
VK_INLINE T minimum(T a, T b) { return b < a ? b : a; }
template <class T>
VK_INLINE T maximum(T a, T b) { return a < b ? b : a; }

VK_INLINE Vec broadcast(float x) { return x - Vec{}; }

VK_INLINE Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
VK_INLINE Vec load(const BFloat16* p) {
    const UIntVec bits = __builtin_convertvector(*reinterpret_cast<const UnalignedShortVec*>(p), UIntVec);
    return (Vec)(bits << 16);
}
VK_INLINE float to_float(float x) { return x; }
VK_INLINE float to_float(BFloat16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float result;
    __builtin_memcpy(&result, &bits, 4);
    return result;
}

VK_INLINE void store(float* p, Vec x) { *reinterpret_cast<UnalignedVec*>(p) = x; }
// Rounds to nearest, ties to even; NaN stays NaN.
VK_INLINE void store(BFloat16* p, Vec x) {
    const UIntVec bits = (UIntVec)x;
    const UIntVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const UIntVec chosen = ((UIntVec)(x == x) & rounded) | ((UIntVec)(x != x) & 0x7fc0);
    *reinterpret_cast<UnalignedShortVec*>(p) = __builtin_convertvector(chosen, ShortVec);
}
VK_INLINE void assign(float* p, float x) { *p = x; }
VK_INLINE void assign(BFloat16* p, float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    p->bits = x == x ? uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) : uint16_t(0x7fc0);
}

// The first `count` lanes; the others are zero on loading and untouched on storing.
template <class T>
VK_INLINE Vec load_some(const T* p, int count) {
    if (count >= kLanes) return load(p);
    float lanes[kLanes] = {};
    for (int i = 0; i < count; ++i) lanes[i] = to_float(p[i]);
    return load(lanes);
}
template <class T>
VK_INLINE void store_some(T* p, Vec x, int count) {
    if (count >= kLanes) return store(p, x);
    float lanes[kLanes];
    store(lanes, x);
    for (int i = 0; i < count; ++i) assign(p + i, lanes[i]);
}

VK_INLINE float sum(Vec x) {
    float lanes[kLanes], total = 0;
    store(lanes, x);
    for (int i = 0; i < kLanes; ++i) total += lanes[i];
    return total;
}

// The second operand if either is NaN.
VK_INLINE Vec larger(Vec a, Vec b) {
#if defined(__AVX512F__)
    return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
    return _mm256_max_ps(a, b);
#elif defined(__x86_64__)
    return _mm_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}
VK_INLINE Vec smaller(Vec a, Vec b) {
#if defined(__AVX512F__)
    return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
    return _mm256_min_ps(a, b);
#elif defined(__x86_64__)
    return _mm_min_ps(a, b);
#else
    return a < b ? a : b;
#endif
}

// The largest finite number instead of infinities, so that a product with zero is zero; NaN stays NaN.
constexpr float kLargest = 3.40282347e38f;
VK_INLINE Vec finite(Vec x) { return smaller(broadcast(kLargest), larger(broadcast(-kLargest), x)); }

constexpr float kLog2E = 1.44269504088896341f;

// The functions below process a few vectors at once. Each is one long chain of dependent instructions, and a processor
// does not look far enough ahead to overlap consecutive chains; interleaved chains do overlap.
constexpr int kPack = 4;
struct Pack {
    Vec v[kPack];
};
#define VK_EACH _Pragma("GCC unroll 4") for (int i = 0; i < kPack; ++i)

// 2^x, relative error 2.5e-7; 0 below 2^-125.5, infinity from 2^128 on; NaN stays NaN.
VK_INLINE Pack exp2(Pack x) {
    // 1.5 x 2^23: of the sum, the low bits of the mantissa are the nearest integer n, and here the exponent of 2^(n -
    // 1).
    constexpr float kShift = 12582912.0f + 126.0f;
    Pack shifted, p;
    VK_EACH x.v[i] = smaller(broadcast(128.0f), larger(broadcast(-126.0f), x.v[i]));
    VK_EACH shifted.v[i] = x.v[i] + kShift;
    VK_EACH x.v[i] -= shifted.v[i] - kShift;  // in [-0.5, 0.5]
    // Twice the minimax polynomial of (2^f - 1) / f (Remez), so that 2^0 is exactly 1.
    VK_EACH p.v[i] = x.v[i] * (2 * 1.333353869e-3f) + 2 * 9.666245425e-3f;
    VK_EACH p.v[i] = p.v[i] * x.v[i] + 2 * 5.550500214e-2f;
    VK_EACH p.v[i] = p.v[i] * x.v[i] + 2 * 2.402235134e-1f;
    VK_EACH p.v[i] = p.v[i] * x.v[i] + 2 * 6.931471435e-1f;
    VK_EACH p.v[i] = p.v[i] * x.v[i] + 2.0f;
    // A product: adding to the exponent would make numbers of NaNs. 2^-127 is 0, and twice 2^127 overflows.
    VK_EACH p.v[i] *= (Vec)((IntVec)shifted.v[i] << 23);
    return p;
}

// exp(-|x|); NaN stays NaN.
VK_INLINE Pack exp_of_minus_magnitude(Pack x) {
    VK_EACH x.v[i] = (x.v[i] < 0.0f ? x.v[i] : -x.v[i]) * kLog2E;
    return exp2(x);
}

// max(x, 0) + log1p(e) with e = exp(-|x|); log1p(e) = 2 atanh(s), s = e / (2 + e) <= 1/3. Relative error 3e-7.
VK_INLINE Pack softplus(Pack x) {
    Pack s = exp_of_minus_magnitude(x), q, p;
    VK_EACH s.v[i] /= s.v[i] + 2.0f;
    VK_EACH q.v[i] = s.v[i] * s.v[i];
    VK_EACH p.v[i] = q.v[i] * (2.0f / 15) + 2.0f / 13;
    VK_EACH p.v[i] = p.v[i] * q.v[i] + 2.0f / 11;
    VK_EACH p.v[i] = p.v[i] * q.v[i] + 2.0f / 9;
    VK_EACH p.v[i] = p.v[i] * q.v[i] + 2.0f / 7;
    VK_EACH p.v[i] = p.v[i] * q.v[i] + 2.0f / 5;
    VK_EACH p.v[i] = p.v[i] * q.v[i] + 2.0f / 3;
    VK_EACH p.v[i] = p.v[i] * q.v[i] + 2.0f;
    VK_EACH p.v[i] = larger(Vec{}, x.v[i]) + p.v[i] * s.v[i];
    return p;
}

// 1 / (1 + exp(-x)), the derivative of softplus.
VK_INLINE Pack sigmoid(Pack x) {
    Pack e = exp_of_minus_magnitude(x);
    VK_EACH e.v[i] = (x.v[i] < 0.0f ? e.v[i] : broadcast(1.0f)) / (e.v[i] + 1.0f);
    return e;
}

// x sigmoid(x); at minus infinity the limit, -0. `gate` is the sigmoid.
VK_INLINE Pack silu(Pack x, Pack gate) {
    VK_EACH x.v[i] = larger(broadcast(-kLargest), x.v[i]) * gate.v[i];
    return x;
}
VK_INLINE Pack silu_slope(Pack x, Pack gate) {
    VK_EACH x.v[i] = finite(x.v[i]);
    VK_EACH x.v[i] = gate.v[i] * (1.0f + x.v[i] * (1.0f - gate.v[i]));
    return x;
}

VK_INLINE Pack load_pack(const Vec* p) {
    Pack x;
    VK_EACH x.v[i] = p[i];
    return x;
}
VK_INLINE void store_pack(Vec* p, Pack x) { VK_EACH p[i] = x.v[i]; }

// Memory of this thread, kept for the next call and freed with the thread. Aligned to a cache line. If allocation
// fails, it is false and must not be used.
class Scratch {
  public:
    explicit Scratch(int64_t vectors)
        : next(static_cast<Vec*>(vision_kernels_scratch(uint64_t(vectors), sizeof(Vec)))) {}
    explicit operator bool() const { return next != nullptr; }
    Vec* take(int64_t vectors) {
        Vec* taken = next;
        next += vectors;
        return taken;
    }

  private:
    Vec* next;
};

// The product of two sizes, or more than any memory if it overflows: views may be far larger than their memory.
VK_INLINE int64_t times(int64_t a, int64_t b) {
    int64_t product;
    return __builtin_mul_overflow(a, b, &product) ? int64_t(1) << 60 : product;
}

// Status of an entry point. No exception is thrown into torch's pool or into Python.
enum Status : int64_t { kDone = 0, kOutOfMemory = 1 };

// body(i) for i in [0, count), on all threads of torch's pool. It returns false if memory runs out; iterations that
// have not begun are then skipped.
template <class Body>
Status parallel_for(int64_t count, const Body& body) {
    struct Context {
        const Body& body;
        bool failed;
    } context{body, false};
    auto run = [](int64_t begin, int64_t end, void* pointer) {
        Context& context = *static_cast<Context*>(pointer);
        for (int64_t i = begin; i < end; ++i)
            if (__atomic_load_n(&context.failed, __ATOMIC_RELAXED) || !context.body(i))
                return __atomic_store_n(&context.failed, true, __ATOMIC_RELAXED);
    };
    if (count > 0 && vision_kernels_parallel_for(0, count, 1, run, &context)) return kOutOfMemory;
    return context.failed ? kOutOfMemory : kDone;
}

template <class T>
VK_INLINE T* at(const View& view, int64_t i, int64_t j = 0, int64_t k = 0) {
    return static_cast<T*>(view.data) + i * view.stride[0] + j * view.stride[1] + k * view.stride[2];
}

}  // namespace
