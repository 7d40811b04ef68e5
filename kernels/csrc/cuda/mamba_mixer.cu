// MambaVision's mixer between its outer projections. Definition: ../../vision_kernels/mamba_mixer.
//
// A block has a window: one sequence with all its channels, so that only the input is read and only the
// result is written. It keeps the convolved x, the step sizes in low rank, and B and C in shared memory. The products
// are computed by tensor cores. In the scan every warp has eight channels of its own, one per column of a product: it
// computes sixteen step sizes and takes these steps, with four lanes per channel that keep its states in registers.
#include "mma.cuh"
#include "selective_scan.h"

namespace {

constexpr int kMostWarps = 28;  // more have too few registers
constexpr int kTaps = 3;
constexpr int kConvolved = 8;                          // consecutive steps whose inputs a thread requests together
constexpr int kSteps = 16, kColumns = 8, kInner = 16;  // of a product: rows, columns, and what is summed over
constexpr int kLanes = 4;                              // of a channel

struct Mixer {
    const void* xz;                                 // (batch, length, 2 inner), contiguous
    void* out;                                      // the same, y and z
    const float *conv, *x_proj, *dt_proj;           // (2 inner, taps), (rank + 2 states, inner), (inner, rank)
    const float *dt_bias, *delta_bias, *rates, *D;  // (inner), (inner), (inner, states), (inner)
    int length, inner, rank, states;
};

__host__ __device__ constexpr int rounded_up(int count, int unit) { return (count + unit - 1) / unit * unit; }

// Elements from a row to the next of what products read: whole products, and different banks for what lanes read at
// once.
__host__ __device__ constexpr int row_of_products(int columns) {
    return rounded_up(columns - kInner, 2 * kInner) + kInner;
}

template <class T>
constexpr int kType = sizeof(T) == 4 ? kFloat32 : std::is_same_v<T, __half> ? kFloat16 : kBFloat16;

// Shared memory. S: states of a lane.
template <class T, int S>
struct Shared {
    static constexpr int kStates = kLanes * S, kCouplings = 2 * kStates;
    float2* steps;  // (warps, kSteps, kColumns): sizes, and those times x
    // (steps, B | C) and (steps, rank), for whole products: rows after the last step are never written, and read
    // without effect.
    float* couplings;
    T* low;
    T* x;  // (length, inner)
    int x_row, low_row;

    __device__ Shared(unsigned char* memory, const Mixer& m) {
        steps = reinterpret_cast<float2*>(memory);
        couplings = reinterpret_cast<float*>(steps + blockDim.x / warpSize * kSteps * kColumns);
        const int all = rounded_up(m.length, kSteps);
        low = reinterpret_cast<T*>(couplings + all * kCouplings);
        low_row = row_of_products(m.rank);
        x = low + all * low_row;
        x_row = row_of_products(m.inner);
    }
    static int64_t bytes(const Mixer& m, int warps) {
        const int64_t all = rounded_up(m.length, kSteps), wide = warps * kSteps * kColumns * 2 + all * kCouplings;
        const int64_t narrow = all * row_of_products(m.rank) + int64_t(m.length) * row_of_products(m.inner);
        return wide * 4 + narrow * int64_t(sizeof(T));
    }
};

// The convolution of x, to shared memory with zeros after its channels, or of z, to the result. A thread has four
// channels and consecutive steps.
template <bool IsZ, class T, int S>
__device__ __forceinline__ void convolve(const Mixer& m, const Shared<T, S>& shared) {
    const int64_t first = int64_t(blockIdx.x) * m.length * 2 * m.inner + (IsZ ? m.inner : 0);
    char* const source = reinterpret_cast<char*>(const_cast<T*>(static_cast<const T*>(m.xz) + first));
    char* const target = reinterpret_cast<char*>(IsZ ? static_cast<T*>(m.out) + first : shared.x);
    const Signal in{source, kType<T>, true, 0, 1, 2 * m.inner, 1};
    const Signal out{target, kType<T>, true, 0, 1, IsZ ? 2 * m.inner : shared.x_row, 1};
    const int vectors = m.inner / kVector, spans = blockDim.x / vectors, span = (m.length + spans - 1) / spans;
    const int channel = threadIdx.x % vectors * kVector, begin = int(threadIdx.x) / vectors * span;
    const int end = int(threadIdx.x) < spans * vectors ? min(begin + span, m.length) : 0;
    float weight[kTaps][kVector];
#pragma unroll
    for (int i = 0; i < kVector * kTaps; ++i)
        weight[i % kTaps][i / kTaps] = __ldg(m.conv + (channel + (IsZ ? m.inner : 0)) * kTaps + i);
    for (int from = begin; from < end; from += kConvolved) {
        Raw raw[kConvolved + kTaps - 1];
#pragma unroll
        for (int i = 0; i < kConvolved + kTaps - 1; ++i) {
            const int t = from + i - 1;
            raw[i] = load(in, in.at(0, channel, t), t >= 0 && t < min(end + 1, m.length) ? kVector : 0);
        }
        float window[kTaps][kVector];  // step t + k - 1 at index (t + k) % kTaps
        to_floats(raw[0], kType<T>, window[0]);
        to_floats(raw[1], kType<T>, window[1]);
#pragma unroll
        for (int i = 0; i < kConvolved; ++i) {
            if (from + i >= end) break;
            to_floats(raw[i + kTaps - 1], kType<T>, window[(i + kTaps - 1) % kTaps]);
            float result[kVector];
#pragma unroll
            for (int e = 0; e < kVector; ++e) {
                float sum = 0;
#pragma unroll
                for (int k = 0; k < kTaps; ++k) sum += weight[k][e] * window[(i + k) % kTaps][e];
                result[e] = silu(sum);
            }
            store(out, out.at(0, channel, from + i), kVector, result);
        }
    }
    if constexpr (!IsZ) {
        const int behind = shared.x_row - m.inner;
        for (int index = threadIdx.x; index < m.length * behind; index += blockDim.x)
            assign(&shared.x[index / behind * shared.x_row + m.inner + index % behind], 0.0f);
    }
}

// Two adjacent elements, the address a multiple of their size.
template <class T>
__device__ __forceinline__ float2 load_two(const T* source) {
    if constexpr (sizeof(T) == 4) {
        return *reinterpret_cast<const float2*>(source);
    } else {
        const unsigned bits = *reinterpret_cast<const unsigned*>(source);
        return {float_of(bits & 0xFFFFu, kType<T>), float_of(bits >> 16, kType<T>)};
    }
}

// A lane's share of sixteen columns of two rows, those with its numbers g and g + 8. Both sides of a product take the
// columns in an order in which the four of a lane are neighbours, from 4 q on.
template <class T>
__device__ __forceinline__ void load_rows(const T* upper, const T* lower, Split<kPartsOf<T>> (&a)[4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const T* const source = half ? lower : upper;
        if constexpr (kPartsOf<T> == 1) {
            const uint2 pairs = *reinterpret_cast<const uint2*>(source);
            a[half].part[0] = pairs.x;
            a[half + 2].part[0] = pairs.y;
        } else {
            const float2 left = load_two(source), right = load_two(source + 2);
            a[half] = {left.x, left.y};
            a[half + 2] = {right.x, right.y};
        }
    }
}

// Weights of a row of `columns`, zeros after its end, in as many parts as an element of T. Null: zeros. `by_fours`: the
// columns are a multiple of four.
template <class T>
__device__ __forceinline__ void load_weights(const float* row, int column, int columns, bool by_fours,
                                             Split<kPartsOf<T>> (&b)[2]) {
    column += threadIdx.x % 4 * 4;
    float4 all{};
    if (by_fours) {
        if (row && column < columns) all = __ldg(reinterpret_cast<const float4*>(row + column));
    } else if (row) {
        if (column < columns) all.x = __ldg(row + column);
        if (column + 1 < columns) all.y = __ldg(row + column + 1);
        if (column + 2 < columns) all.z = __ldg(row + column + 2);
        if (column + 3 < columns) all.w = __ldg(row + column + 3);
    }
    b[0] = {all.x, all.y};
    b[1] = {all.z, all.w};
}

// The row of `x_proj` for a column of what is kept: B, C, from a multiple of sixteen on the step sizes; null: none.
template <class T, int S>
__device__ __forceinline__ const float* projection_of(const Mixer& m, int column, int first_low) {
    constexpr int states = Shared<T, S>::kStates;
    int row;
    if (column < 2 * states)
        row = column % states < m.states ? m.rank + column / states * m.states + column % states : -1;
    else
        row = column >= first_low && column - first_low < m.rank ? column - first_low : -1;
    return row < 0 ? nullptr : m.x_proj + row * m.inner;
}

// B, C and the step sizes in low rank from x: each warp makes products of 32 steps and sixteen columns.
template <class T, int S>
__device__ __forceinline__ void project(const Mixer& m, const Shared<T, S>& shared) {
    constexpr int couplings = Shared<T, S>::kCouplings, first_low = rounded_up(couplings, 2 * kColumns);
    const int lane = threadIdx.x % warpSize, g = lane / 4, q = lane % 4;
    const int across = (first_low + rounded_up(m.rank, kInner)) / (2 * kColumns);
    const int products = rounded_up(m.length, 2 * kSteps) / (2 * kSteps) * across;
    for (int index = threadIdx.x / warpSize; index < products; index += blockDim.x / warpSize) {
        const int first = index / across * 2 * kSteps, column = index % across * 2 * kColumns;
        const float* const left = projection_of<T, S>(m, column + g, first_low);
        const float* const right = projection_of<T, S>(m, column + kColumns + g, first_low);
        const T* rows[4];  // after the last one, the last again
#pragma unroll
        for (int i = 0; i < 4; ++i) rows[i] = shared.x + min(first + i * 8 + g, m.length - 1) * shared.x_row + 4 * q;
        float c[2][2][4] = {};
#pragma unroll(sizeof(T) == 4 ? 1 : 2)  // registers are scarce
        for (int k = 0; k < m.inner; k += kInner) {
            Split<kPartsOf<T>> a[4], b[2][2];
            load_weights<T>(left, k, m.inner, true, b[0]);
            load_weights<T>(right, k, m.inner, true, b[1]);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                load_rows(rows[2 * i] + k, rows[2 * i + 1] + k, a);
                multiply<kPartsOf<T>>(c[i][0][0], c[i][0][1], c[i][0][2], c[i][0][3], a, b[0]);
                multiply<kPartsOf<T>>(c[i][1][0], c[i][1][1], c[i][1][2], c[i][1][3], a, b[1]);
            }
        }
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            const int t = first + i / 8 * kSteps + g + i / 2 % 2 * 8, at = column + i / 4 % 2 * kColumns + 2 * q + i % 2;
            if (t >= m.length) continue;
            const float value = c[i / 8][i / 4 % 2][i % 4];
            if (at < couplings)
                shared.couplings[t * couplings + at] = value;
            else if (at >= first_low)
                assign(&shared.low[t * shared.low_row + at - first_low], value);
        }
    }
}

template <class T>
__device__ __forceinline__ void store_two(T* target, float first, float second) {
    if constexpr (sizeof(T) == 4)
        *reinterpret_cast<float2*>(target) = float2{first, second};
    else
        *reinterpret_cast<unsigned*>(target) = pair_bits(first, second, kType<T>);
}

// The scan of eight channels from `first_channel` on. Where a lane has two channels at once they are 2 q and 2 q + 1,
// in rows g and g + 8 of sixteen steps, as a product leaves them; in the recurrence it has the states of one.
template <class T, int S>
class Scan {
  public:
    __device__ __forceinline__ Scan(const Mixer& m, const Shared<T, S>& shared, int first_channel)
        : m(m), shared(shared), lane(threadIdx.x % warpSize), g(lane / 4), q(lane % 4), pair(first_channel + 2 * q),
          weights(first_channel + g < m.inner ? m.dt_proj + (first_channel + g) * m.rank : nullptr),
          inside(pair < m.inner), channel(Lanes::channel(lane)),
          steps(shared.steps + threadIdx.x / warpSize * kSteps * kColumns) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            bias[i] = inside ? __ldg(m.dt_bias + pair + i) + __ldg(m.delta_bias + pair + i) : 0;
            D[i] = inside ? __ldg(m.D + pair + i) : 0;
        }
#pragma unroll
        for (int i = 0; i < kHeld; ++i) load_weights<T>(weights, i * kInner, m.rank, m.rank % 4 == 0, held[i]);
#pragma unroll
        for (int s = 0; s < S; ++s) {
            const int state = Lanes::part(lane) * S + s;
            const bool exists = first_channel + channel < m.inner && state < m.states;
            own.rates[s] = exists ? finite(kLog2E * __ldg(m.rates + (first_channel + channel) * m.states + state)) : 0;
            own.state[s] = 0;
        }
    }

    __device__ __forceinline__ void run() {
        for (int t = 0; t < m.length; t += kSteps) {
            float skip[4];
            prepare(t, skip);
            __syncwarp();
            advance(t);
            __syncwarp();
            finish(t, skip);
        }
    }

  private:
    using Lanes = scan::Layout<kLanes, S, kSteps>;
    static constexpr int kHeld = kPartsOf<T> == 1 ? 2 : 1;
    const Mixer& m;
    const Shared<T, S>& shared;
    const int lane, g, q, pair;
    const float* const weights;
    const bool inside;
    const int channel;
    float2* const steps;
    float bias[2], D[2];
    Split<kPartsOf<T>> held[kHeld][2];  // the first of the weights
    scan::Recurring<S, false> own;

    // Step sizes from t on, and the inputs of the states.
    __device__ __forceinline__ void prepare(int t, float (&skip)[4]) {
        float size[4] = {bias[0], bias[1], bias[0], bias[1]};
        const T* const upper = shared.low + (t + g) * shared.low_row + 4 * q;
        const T* const lower = upper + 8 * shared.low_row;
        Split<kPartsOf<T>> a[4];
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
            if (i * kInner >= m.rank) break;
            load_rows(upper + i * kInner, lower + i * kInner, a);
            multiply<kPartsOf<T>>(size[0], size[1], size[2], size[3], a, held[i]);
        }
        for (int k = kHeld * kInner; k < m.rank; k += kInner) {
            Split<kPartsOf<T>> others[2];
            load_rows(upper + k, lower + k, a);
            load_weights<T>(weights, k, m.rank, m.rank % 4 == 0, others);
            multiply<kPartsOf<T>>(size[0], size[1], size[2], size[3], a, others);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int step = min(t + g + half * 8, m.length - 1);
            const float2 x = inside ? load_two(shared.x + step * shared.x_row + pair) : float2{0, 0};
            const float left = softplus(size[2 * half]), right = softplus(size[2 * half + 1]);
            skip[2 * half] = D[0] * x.x, skip[2 * half + 1] = D[1] * x.y;
            *reinterpret_cast<float4*>(&steps[(g + half * 8) * kColumns + 2 * q]) =
                float4{left, left * x.x, right, right * x.y};
        }
    }

    // The recurrence, whose results replace the step sizes.
    __device__ __forceinline__ void advance(int t) {
        constexpr int states = Shared<T, S>::kStates;
        const float* const couplings = shared.couplings + t * Shared<T, S>::kCouplings + Lanes::part(lane) * S;
#pragma unroll
        for (int from = 0; from < kSteps; from += kLanes) {
            if (t + from >= m.length) break;
            float sums[kLanes];
#pragma unroll
            for (int k = 0; k < kLanes; ++k) {
                const float* const of_step = couplings + (from + k) * Shared<T, S>::kCouplings;
                sums[k] = own.advance(steps[(from + k) * kColumns + channel], of_step, of_step + states);
            }
            sum_across<Lanes::kStateMask, kLanes>(sums, lane);
            steps[(from + first_sum<Lanes::kStateMask, kLanes>(lane)) * kColumns + channel].x = sums[0];
        }
    }

    __device__ __forceinline__ void finish(int t, const float (&skip)[4]) {
        T* const y = static_cast<T*>(m.out) + int64_t(blockIdx.x) * m.length * 2 * m.inner + pair;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int step = g + half * 8;
            if (!inside || t + step >= m.length) continue;
            const float4 sums = *reinterpret_cast<const float4*>(&steps[step * kColumns + 2 * q]);
            store_two(y + (t + step) * 2 * m.inner, sums.x + skip[2 * half], sums.z + skip[2 * half + 1]);
        }
    }
};

template <class T, int S>
__global__ void __launch_bounds__(kMostWarps * 32, 1) mix(const Mixer m) {
    VK_DYNAMIC_SHARED(unsigned char, memory);
    const Shared<T, S> shared(memory, m);
    convolve<false>(m, shared);
    __syncthreads();
    project(m, shared);
    convolve<true>(m, shared);
    __syncthreads();
    for (int channel = threadIdx.x / warpSize * kColumns; channel < m.inner; channel += blockDim.x / warpSize * kColumns)
        Scan<T, S>(m, shared, channel).run();
}

template <class T, int S>
const char* run(const Mixer& m, int64_t batch, int64_t warps, int64_t shared_bytes, void* stream) {
    if (Shared<T, S>::bytes(m, int(warps)) != shared_bytes) return "wrong size of shared memory";
    return launch(mix<T, S>, unsigned(batch), unsigned(warps * 32), size_t(shared_bytes), stream, m);
}

}  // namespace

// All tensors are contiguous and aligned to 16 bytes, all weights in float32; inner is a multiple of four of at most
// 3584, and there are three taps. shared_bytes: as computed by vision_kernels/mamba_mixer/cuda.py.
VK_ENTRY(mamba_mixer_forward)(void* stream, const View* xz, const View* conv, const View* x_proj, const View* dt_proj,
                              const View* dt_bias, const View* A, const View* D, const View* delta_bias, const View* out,
                              int64_t warps, int64_t shared_bytes) {
    const auto floats = [](const View* view) { return static_cast<const float*>(view->data); };
    const Mixer m{xz->data, out->data, floats(conv), floats(x_proj), floats(dt_proj), floats(dt_bias), floats(delta_bias),
                  floats(A), floats(D), int(xz->size[1]), int(A->size[0]), int(dt_proj->size[1]), int(A->size[1])};
    return for_type(xz->dtype, [&](auto element) -> const char* {
        using T = decltype(element);
        if (m.states <= 4) return run<T, 1>(m, xz->size[0], warps, shared_bytes, stream);
        if (m.states <= 8) return run<T, 2>(m, xz->size[0], warps, shared_bytes, stream);
        return run<T, 4>(m, xz->size[0], warps, shared_bytes, stream);
    });
}
