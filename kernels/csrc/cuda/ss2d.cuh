// Common parts of the forward and the backward pass of SS2D. Definition: ../../vision_kernels/ss2d/unfused.py.
//
// A warp takes 16 channels and 8 segments of a route, each of up to kSteps successive positions. Its lane 4 g + q holds
// the channels 4 q ... 4 q + 3 of segment g, as products of matrices return them (mma.cuh): step sizes come from tensor
// cores. A segment maps the state before it to the state after it, h -> factor h + offset. Lanes compose these maps by
// shuffles and warps through shared memory: a block passes through a route in rounds of 8 segments a warp.
#pragma once
#include "functions.h"
#include "mma.cuh"

namespace {

constexpr int kRoutes = 4;
constexpr int kTile = 16;  // channels of a warp

// Numbers of bfloat16 whose sum represents a weight, and a gradient.
constexpr int kWeightParts = 3;
template <class T>
constexpr int kGradientParts = sizeof(T) == 4 ? 3 : 2;

// kStates: the number of states if it is known to the compiler, else 0.
template <class T, int kStates>
struct Problem {
    using Element = T;
    static constexpr int kKnownStates = kStates;
    // Dimensions are divisible by four, ranks by two, and vectors of so many elements aligned.
    const T* x;            // (batch, length, dim), the channels adjacent
    const T* projections;  // (batch, length, route, rank + 2 states), contiguous: step sizes of low rank, B, C
    const float* dt_weight;  // (route, dim, rank)
    const float* dt_bias;    // (route, dim)
    const float* A;          // (route dim, states)
    const float* D;          // (route dim)
    int64_t x_by_batch;
    int x_by_position;
    int batch, length, dim, rank, given_states;
    int step[kRoutes];     // raster distance to the next position
    int in_line[kRoutes];  // positions of a row or column
    int steps, rounds;  // positions of a segment; passes of a block of `warps` to the end of a route

    Problem(const View* x, const View* projections, const View* dt_weight, const View* dt_bias, const View* A, const View* D,
            const int64_t (&route_steps)[kRoutes], int64_t steps, int64_t rounds)
        : x(static_cast<const T*>(x->data)), projections(static_cast<const T*>(projections->data)),
          dt_weight(static_cast<const float*>(dt_weight->data)), dt_bias(static_cast<const float*>(dt_bias->data)),
          A(static_cast<const float*>(A->data)), D(static_cast<const float*>(D->data)), x_by_batch(x->stride[0]),
          x_by_position(int(x->stride[1])), batch(int(x->size[0])), length(int(x->size[1])), dim(int(x->size[2])),
          rank(int(dt_weight->size[2])), given_states(int(A->size[1])), steps(int(steps)), rounds(int(rounds)) {
        for (int j = 0; j < kRoutes; ++j) {
            step[j] = int(route_steps[j]);
            if (abs(step[j]) == length) step[j] /= length;  // lines of one position form a single line
            in_line[j] = length / abs(step[j]);
        }
    }

    __host__ __device__ int states() const { return kStates ? kStates : given_states; }
    __host__ __device__ int columns() const { return rank + 2 * states(); }
    __host__ __device__ int tiles() const { return (dim + kTile - 1) / kTile; }
};

// Calls body(problem) with the tensors and integers that all entries begin with, as a type for which kernels exist.
template <class Body>
const char* for_problem(const View* x, const View* projections, const View* dt_weight, const View* dt_bias, const View* A,
                        const View* D, const int64_t (&route_steps)[kRoutes], int64_t steps, int64_t rounds,
                        const Body& body) {
    return for_type(x->dtype, [&](auto type) {
        const auto with_states = [&](auto known) {
            using P = Problem<decltype(type), decltype(known)::value>;
            return body(P(x, projections, dt_weight, dt_bias, A, D, route_steps, steps, rounds));
        };
        const int64_t states = A->size[1];
        if (states == 1) return with_states(std::integral_constant<int, 1>());
        if (states == 8) return with_states(std::integral_constant<int, 8>());
        if (states == 16) return with_states(std::integral_constant<int, 16>());
        return with_states(std::integral_constant<int, 0>());
    });
}

struct Lane {
    int warp, g, q;
    __device__ Lane() : warp(threadIdx.x / 32), g(threadIdx.x % 32 / 4), q(threadIdx.x % 4) {}
};

// The derivative of softplus where softplus is x: 1 - exp(-x), with a small relative error for small x too.
__device__ __forceinline__ float softplus_slope(float x) {
    const float series =
        x * (1 - x * (1.0f / 2 - x * (1.0f / 6 - x * (1.0f / 24 - x * (1.0f / 120 - x * (1.0f / 720))))));
    return x < 0.25f ? series : 1 - exp2_fast(-x * kLog2E);
}

template <class T>
struct alignas(4 * sizeof(T)) Four {
    T of[4];
};

// Adjacent elements, or zeros instead of them.
template <class T>
__device__ __forceinline__ void load_four(const T* source, bool exist, float (&target)[4]) {
    if constexpr (kPartsOf<T> == 1) {
        uint2 pairs{0, 0};
        if (exist) pairs = *reinterpret_cast<const uint2*>(source);
        target[0] = low_of(pairs.x), target[1] = high_of(pairs.x);
        target[2] = low_of(pairs.y), target[3] = high_of(pairs.y);
    } else {
        Four<T> four{};
        if (exist) four = *reinterpret_cast<const Four<T>*>(source);
#pragma unroll
        for (int c = 0; c < 4; ++c) target[c] = to_float(four.of[c]);
    }
}
template <class T>
__device__ __forceinline__ void store_four(T* target, const float (&source)[4]) {
    Four<T> four;
#pragma unroll
    for (int c = 0; c < 4; ++c) assign(four.of + c, source[c]);
    *reinterpret_cast<Four<T>*>(target) = four;
}

// Adjacent elements; the first one has an even index.
template <class T>
__device__ __forceinline__ void load_two(const T* source, float& first, float& second) {
    if constexpr (kPartsOf<T> == 1) {
        const unsigned pair = *reinterpret_cast<const unsigned*>(source);
        first = low_of(pair), second = high_of(pair);
    } else {
        struct alignas(2 * sizeof(T)) Two {
            T first, second;
        } const two = *reinterpret_cast<const Two*>(source);
        first = to_float(two.first), second = to_float(two.second);
    }
}

// The positions of one segment. Positions continue after the end of the route, so that loads need no conditions.
template <int kSteps>
struct Segment {
    int count;
    int position[kSteps];  // in raster order

    // Each row or column from beginning to end, then the next one; or the reverse.
    // A step across the end of a line goes beyond the image, and from there to the next line: the same way for all
    // lines.
    __device__ __forceinline__ Segment(int first, int steps, int step, unsigned in_line, int length) {
        count = max(0, min(steps, length - first));
        const unsigned t = min(first, length - 1), line = t / in_line;
        const int forwards = int(line + (t - line * in_line) * abs(step));
        const int to_next_line = max(length - 1, 1), next_line = step < 0 ? to_next_line : -to_next_line;
        position[0] = step < 0 ? length - 1 - forwards : forwards;
#pragma unroll
        for (int i = 1; i < kSteps; ++i) {
            const int next = position[i - 1] + step;
            position[i] = unsigned(next) < unsigned(length) ? next : next + next_line;
        }
    }
};

// The address `position` times `stride` elements further on. Strides in bytes fit into 32 bits, so it takes one
// instruction to get from a position to an address.
template <class T>
__device__ __forceinline__ T* at_position(T* image, int position, int stride) {
    using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
    const unsigned bytes = unsigned(stride) * unsigned(sizeof(T));
    return reinterpret_cast<T*>(reinterpret_cast<Byte*>(image) + uint64_t(unsigned(position)) * bytes);
}

// Four channels at the positions of a segment; zeros after its end, or if the channels do not exist.
template <class T, int kSteps>
__device__ __forceinline__ void load_segment(const T* image, int stride, const Segment<kSteps>& segment, bool exist,
                                             float (&target)[kSteps][4]) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
        load_four(at_position(image, segment.position[i], stride), exist && i < segment.count, target[i]);
}
template <class T, int kSteps>
__device__ __forceinline__ void store_segment(T* image, int stride, const Segment<kSteps>& segment,
                                              const float (&source)[kSteps][4]) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
        if (i < segment.count) store_four(at_position(image, segment.position[i], stride), source[i]);
}

// Images (batch, length, dim) with adjacent channels, whose type matters only where they are read or written.
struct Image {
    void* data;
    int64_t by_batch;
    int dtype, by_position;

    explicit Image(const View* view)
        : data(view->data), by_batch(view->stride[0]), dtype(int(view->dtype)), by_position(int(view->stride[1])) {}

    // Calls body(image) with the address of a channel, of the type of the elements.
    template <class Body>
    __device__ __forceinline__ void typed(int batch, int channel, const Body& body) const {
        const int64_t offset = batch * by_batch + channel;
        if (dtype == kFloat32) return body(static_cast<float*>(data) + offset);
        if (dtype == kBFloat16) return body(static_cast<__nv_bfloat16*>(data) + offset);
        body(static_cast<__half*>(data) + offset);
    }
    template <int kSteps>
    __device__ __forceinline__ void load(int batch, const Segment<kSteps>& segment, int channel, bool exist,
                                         float (&target)[kSteps][4]) const {
        typed(batch, channel, [&](const auto* image) { load_segment(image, by_position, segment, exist, target); });
    }
    template <int kSteps>
    __device__ __forceinline__ void store(int batch, const Segment<kSteps>& segment, int channel,
                                          const float (&source)[kSteps][4]) const {
        typed(batch, channel, [&](auto* image) { store_segment(image, by_position, segment, source); });
    }
};

// A warp's part of a round, as one lane sees it.
template <class P, int kSteps>
struct Work {
    using T = typename P::Element;
    const P& problem;
    Lane lane;
    int batch, route, tile, channel;  // the first of four channels
    bool exists;                     // they do; their number is divisible by four
    Segment<kSteps> segment;

    __device__ __forceinline__ Work(const P& problem, int batch, int route, int tile, int round)
        : problem(problem), batch(batch), route(route), tile(tile), channel(tile * kTile + 4 * lane.q),
          exists(channel < problem.dim),
          segment((round * int(blockDim.x / 4) + lane.warp * 8 + lane.g) * problem.steps, problem.steps,
                  problem.step[route], problem.in_line[route], problem.length) {}

    // Channels that do not exist use the numbers of others; their results are not written.
    __device__ __forceinline__ int some_channel() const { return min(channel, problem.dim - 4); }
    __device__ __forceinline__ int64_t parameters() const { return int64_t(route) * problem.dim + some_channel(); }

    // A column of the projections.
    __device__ __forceinline__ const T* projections(int position, int column) const {
        const T* image = problem.projections + (int64_t(batch) * problem.length * kRoutes + route) * problem.columns();
        return at_position(image + column, position, kRoutes * problem.columns());
    }
    __device__ __forceinline__ void load_x(int i, float (&x)[4]) const {
        const T* image = problem.x + batch * problem.x_by_batch + some_channel();
        load_four(at_position(image, segment.position[i], problem.x_by_position), true, x);
    }
    // The sum of D over all routes.
    __device__ __forceinline__ void load_skip(float (&skip)[4]) const {
#pragma unroll
        for (int c = 0; c < 4; ++c) skip[c] = 0;
#pragma unroll
        for (int j = 0; j < kRoutes; ++j)
#pragma unroll
            for (int c = 0; c < 4; ++c) skip[c] += problem.D[int64_t(j) * problem.dim + some_channel() + c];
    }
    // B and C of a state at each position.
    __device__ __forceinline__ void load_couplings(int n, float (&B)[kSteps], float (&C)[kSteps]) const {
        const int column = problem.rank + n;
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
            const T* source = projections(segment.position[i], column);
            if constexpr (P::kKnownStates == 1) {
                load_two(source, B[i], C[i]);
            } else {
                B[i] = to_float(source[0]);
                C[i] = to_float(source[problem.states()]);
            }
        }
    }
    // A log2(e) of one state, so that exp(step A) is a power of two.
    __device__ __forceinline__ void load_rates(int n, float (&rate)[4]) const {
        const float* A = problem.A + parameters() * problem.states() + n;
#pragma unroll
        for (int c = 0; c < 4; ++c) rate[c] = finite(A[c * problem.states()] * kLog2E);
    }

    // The rows are positions 2 i (of all segments), then 2 i + 1; the columns 16 ranks. Ranks that do not
    // exist are replaced by others with zero weights.
    __device__ __forceinline__ void load_low(int i, int rank, Split<kPartsOf<T>> (&low)[4]) const {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const int position = segment.position[min(2 * i + k % 2, kSteps - 1)];
            low[k] = load_pair(projections(position, min(rank + 2 * lane.q + k / 2 * 8, problem.rank - 2)), 2, true);
        }
    }

    // `count` weights of a channel from `rank` on, either all of which exist or none; zeros in place of the latter.
    template <int kCount>
    __device__ __forceinline__ void load_weights(int channel_in_tile, int rank, float (&weights)[kCount]) const {
        const int channel = tile * kTile + channel_in_tile;
        const float* source = problem.dt_weight + (route * problem.dim + channel) * problem.rank + rank;
        const bool exist = channel < problem.dim && rank < problem.rank;
#pragma unroll
        for (int i = 0; i < kCount; ++i) weights[i] = exist ? source[i] : 0.0f;
    }

    // softplus(dt_weight low + dt_bias); zero after the end, which leaves states unchanged.
    __device__ __forceinline__ void step_sizes(float (&step)[kSteps][4]) const {
        float none[4] = {};  // the last row of products if kSteps is odd
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const float bias = problem.dt_bias[parameters() + c];
#pragma unroll
            for (int i = 0; i < kSteps; ++i) step[i][c] = bias;
        }
#pragma unroll 1
        for (int rank = 0; rank < problem.rank; rank += 16) {
            Split<kWeightParts> weights[2][2];  // columns g of two products are channels 4 (g / 2) + g % 2, and these + 2
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const int column = lane.g / 2 * 4 + lane.g % 2 + k / 2 * 2, row = rank + 2 * lane.q + k % 2 * 8;
                float pair[2];
                load_weights(column, row, pair);
                weights[k / 2][k % 2] = Split<kWeightParts>(pair[0], pair[1]);
            }
#pragma unroll
            for (int i = 0; i < (kSteps + 1) / 2; ++i) {
                Split<kPartsOf<T>> low[4];
                load_low(i, rank, low);
                float(&odd)[4] = 2 * i + 1 < kSteps ? step[min(2 * i + 1, kSteps - 1)] : none;
#pragma unroll
                for (int k = 0; k < 2; ++k)
                    multiply<kWeightParts>(step[2 * i][2 * k], step[2 * i][2 * k + 1], odd[2 * k], odd[2 * k + 1], low,
                                           weights[k]);
            }
        }
#pragma unroll
        for (int i = 0; i < kSteps; ++i)
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                const float size = softplus(step[i][c]);
                step[i][c] = i < segment.count ? size : 0.0f;
            }
    }
};

// The effect of consecutive positions on the state before them: h -> factor h + offset. In the other direction
// gradients of states take the same form, with the same factor.
struct Map {
    float factor, offset;

    // The composition of this map after another.
    __device__ __forceinline__ void follow(float earlier_factor, float earlier_offset) {
        offset += factor * earlier_offset;
        factor *= earlier_factor;
    }
};

// Of the segments of a warp up to this one, from the first if kForwards, else from the last.
template <bool kForwards>
__device__ __forceinline__ Map compose(Map map, int g) {
#pragma unroll
    for (int distance = 1; distance < 8; distance *= 2) {
        const float factor = kForwards ? __shfl_up_sync(~0u, map.factor, 4 * distance)
                                       : __shfl_down_sync(~0u, map.factor, 4 * distance);
        const float offset = kForwards ? __shfl_up_sync(~0u, map.offset, 4 * distance)
                                       : __shfl_down_sync(~0u, map.offset, 4 * distance);
        if (kForwards ? g >= distance : g + distance < 8) map.follow(factor, offset);
    }
    return map;
}
// Of the segments before this one, or after it if not kForwards.
template <bool kForwards>
__device__ __forceinline__ Map exclude(Map map, int g) {
    const float factor = kForwards ? __shfl_up_sync(~0u, map.factor, 4) : __shfl_down_sync(~0u, map.factor, 4);
    const float offset = kForwards ? __shfl_up_sync(~0u, map.offset, 4) : __shfl_down_sync(~0u, map.offset, 4);
    return g == (kForwards ? 0 : 7) ? Map{1, 0} : Map{factor, offset};
}

// state = map(state) for four channels whose factors and offsets are in memory.
__device__ __forceinline__ void apply(const float* factors, const float* offsets, float (&state)[4]) {
    float factor[4], offset[4];
    load_four(factors, true, factor);
    load_four(offsets, true, offset);
#pragma unroll
    for (int c = 0; c < 4; ++c) state[c] = factor[c] * state[c] + offset[c];
}

// Maps of the rounds, (kind, batch, route, round, states, tiles * kTile): factors, offsets, and those of gradients. The
// latter two are replaced by the states before each round and the gradients after it.
struct Rounds {
    float* data;
    int64_t kind;  // floats from one kind to the next
    int states, rounds, pitch;

    template <class P>
    Rounds(const View* view, const P& problem)
        : data(view ? static_cast<float*>(view->data) : nullptr), states(problem.states()), rounds(problem.rounds),
          pitch(problem.tiles() * kTile) {
        kind = int64_t(problem.batch) * kRoutes * rounds * states * pitch;
    }
    __device__ __forceinline__ float* at(int kinds, int batch, int route, int round, int n, int channel) const {
        return data + kinds * kind + (((int64_t(batch) * kRoutes + route) * rounds + round) * states + n) * pitch + channel;
    }
};

// The input of one state: step x B.
template <int kSteps>
__device__ __forceinline__ void inputs(const float (&drive)[kSteps][4], const float (&B)[kSteps],
                                       float (&input)[kSteps][4]) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
#pragma unroll
        for (int c = 0; c < 4; ++c) input[i][c] = drive[i][c] * B[i];
}

// Of one state with these inputs: the decays exp(step A), and the map of this lane's segment for each channel.
template <class P, int kSteps>
__device__ __forceinline__ void local_maps(const Work<P, kSteps>& work, int n, const float (&step)[kSteps][4],
                                           const float (&input)[kSteps][4], float (&decay)[kSteps][4], Map (&map)[4]) {
    float rate[4];
    work.load_rates(n, rate);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
        float h = 0, total = 0;
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
            decay[i][c] = exp2_fast(step[i][c] * rate[c]);
            h = decay[i][c] * h + input[i][c];
            total += step[i][c];
        }
        map[c] = {exp2_fast(total * rate[c]), h};
    }
}

}  // namespace
