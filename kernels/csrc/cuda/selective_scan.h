// Common parts of the passes of the selective scan.
//
// A block has 32 channels of one group of one batch entry, and walks through a chunk of the steps in tiles. K lanes
// share a channel, each with S of its states in registers, so a block has K warps. Inputs of a tile are converted to
// float32 in shared memory by all threads together: with softplus, once per channel instead of once per state.
#pragma once
#include "elements.h"
#include "functions.h"
#include "lanes.h"

namespace scan {

constexpr int kChannels = 32;  // of a block

template <int K, int S, int Steps>
struct Layout {
    static constexpr int kThreads = kChannels * K, kStates = K * S, kSteps = Steps;
    // Lanes of a channel differ in bits 0 and 2. Neighbours in either bit then read the same address, of a channel or
    // of a state, and shared memory serves wide reads of such pairs at once.
    static constexpr int kStateMask = K == 4 ? 5 : K - 1, kChannelMask = 31 - kStateMask;
    static constexpr int kVectors = (Steps * kChannels / kVector + kThreads - 1) / kThreads;  // of a thread and signal
    static constexpr int kCouplings = (Steps * kStates + kThreads - 1) / kThreads;

    static __device__ int part(int lane) { return K == 4 ? (lane & 1) | (lane >> 1 & 2) : lane & (K - 1); }
    static __device__ int channel(int thread) {
        const int lane = thread % warpSize, within = K == 4 ? (lane >> 1 & 1) | (lane >> 2 & 6) : lane / K;
        return thread / warpSize * (kChannels / K) + within;
    }
};

// B or C: (batch, groups, states, steps) with any strides.
struct Couplings {
    char* data;
    int dtype;
    int64_t by_batch, by_group, by_state, by_step;
    __device__ char* at(int64_t batch, int64_t group, int64_t state, int64_t step) const {
        return data + (batch * by_batch + group * by_group + state * by_state + step * by_step) * bytes_of(dtype);
    }
};

struct Problem {
    int64_t batch, dim, groups, group_channels, group_blocks;
    int length, states;
    bool softplus, along_steps, divisible;
    int chunk, chunks;  // steps of a chunk, a multiple of every tile's; number of chunks, at least one
    Signal u, delta;
    Couplings B, C;
    Row D, bias;
    const char* A;  // (dim, states)
    int A_dtype;
    int64_t A_by_channel, A_by_state;

    unsigned blocks() const { return unsigned(batch * groups * group_blocks); }
};

// The work of a block.
struct Place {
    int64_t batch, group, block, channel;  // the first channel
    int channels, chunk, begin, end;       // steps from begin to end

    __device__ explicit Place(const Problem& p) {
        const unsigned blocks = unsigned(p.group_blocks), groups = unsigned(p.groups);  // 64-bit division is slow
        block = blockIdx.x % blocks;
        group = blockIdx.x / blocks % groups;
        batch = blockIdx.x / blocks / groups;
        channel = group * p.group_channels + block * kChannels;
        channels = int(min(int64_t(kChannels), p.group_channels - block * kChannels));
        chunk = int(blockIdx.y);
        begin = chunk * p.chunk;
        end = min(begin + p.chunk, p.length);
    }
};

// Place in a tile of the four elements that a thread moves at once.
struct Spot {
    int step, channel;  // the first of them; beyond the tile if there are more threads than elements
};

template <class L>
__device__ __forceinline__ Spot spot_of(const Problem& p, int index) {
    const int vector = int(threadIdx.x) + index * L::kThreads;
    constexpr int per_channel = L::kSteps / kVector, per_step = kChannels / kVector;
    if (p.along_steps) return {vector % per_channel * kVector, vector / per_channel};
    return {vector / per_step, vector % per_step * kVector};
}

// How many of the four exist. `left`: steps from the tile's beginning to the end of the chunk.
template <class L>
__device__ __forceinline__ int count_of(const Problem& p, const Place& place, int left, const Spot& spot) {
    const bool inside = spot.channel < place.channels && spot.step < min(left, L::kSteps);
    return inside ? min(kVector, p.along_steps ? left - spot.step : place.channels - spot.channel) : 0;
}

// The thread's elements of one tile after another.
template <class L>
struct Walk {
    char* address[L::kVectors];

    __device__ __forceinline__ Walk(const Signal& signal, const Problem& p, const Place& place, int tile) {
#pragma unroll
        for (int i = 0; i < L::kVectors; ++i) {
            const Spot spot = spot_of<L>(p, i);
            address[i] = signal.at(place.batch, place.channel + spot.channel, tile + spot.step);
        }
    }
    // Moves on by `steps`.
    __device__ __forceinline__ char* next(const Signal& signal, int i, int steps) {
        char* const current = address[i];
        address[i] += steps * signal.by_step * bytes_of(signal.dtype);
        return current;
    }
};

// A tile of a signal on its way to shared memory, in the registers of a block's threads.
template <class L>
struct SignalTile {
    Walk<L> walk;
    Raw raw[L::kVectors];

    __device__ __forceinline__ SignalTile(const Signal& signal, const Problem& p, const Place& place, int tile)
        : walk(signal, p, place, tile), raw{} {}
    __device__ __forceinline__ void fetch(const Signal& signal, const Problem& p, const Place& place, int left, int steps) {
#pragma unroll
        for (int i = 0; i < L::kVectors; ++i)
            raw[i] = load(signal, walk.next(signal, i, steps), count_of<L>(p, place, left, spot_of<L>(p, i)));
    }
};

template <class L>
struct CouplingTile {
    const char* address[L::kCouplings];
    unsigned bits[L::kCouplings] = {};

    static __device__ __forceinline__ void locate(bool along_steps, int index, int& step, int& state) {
        const int element = int(threadIdx.x) + index * L::kThreads;
        step = along_steps ? element % L::kSteps : element / L::kStates;
        state = along_steps ? element / L::kSteps : element % L::kStates;
    }

    __device__ __forceinline__ CouplingTile(const Couplings& from, const Problem& p, const Place& place, int tile) {
#pragma unroll
        for (int i = 0; i < L::kCouplings; ++i) {
            int step, state;
            locate(p.along_steps, i, step, state);
            address[i] = from.at(place.batch, place.group, state, tile + step);
        }
    }

    __device__ __forceinline__ void fetch(const Couplings& from, const Problem& p, int left, int steps) {
#pragma unroll
        for (int i = 0; i < L::kCouplings; ++i) {
            int step, state;
            locate(p.along_steps, i, step, state);
            bits[i] = step < min(left, L::kSteps) && state < p.states ? load_bits(address[i], from.dtype) : 0;
            address[i] += steps * from.by_step * bytes_of(from.dtype);
        }
    }

    __device__ __forceinline__ void stage(int dtype, bool along_steps, float* target) const {
#pragma unroll
        for (int i = 0; i < L::kCouplings; ++i) {
            int step, state;
            locate(along_steps, i, step, state);
            if (step < L::kSteps && state < L::kStates) target[step * L::kStates + state] = float_of(bits[i], dtype);
        }
    }
};

// A vector over channels into shared memory; zero if it is absent.
__device__ __forceinline__ void stage_channels(const Row& row, const Place& place, float (&target)[kChannels]) {
    const int i = threadIdx.x;
    if (i < kChannels) target[i] = row.data && i < place.channels ? row[place.channel + i] : 0;
}

// The four of these that belong to the elements of a spot.
__device__ __forceinline__ void load_channels(const float (&source)[kChannels], const Spot& spot, bool along_steps,
                                              float (&values)[kVector]) {
    if (along_steps)
        values[0] = values[1] = values[2] = values[3] = source[spot.channel];
    else {
        const float4 all = *reinterpret_cast<const float4*>(source + spot.channel);
        values[0] = all.x, values[1] = all.y, values[2] = all.z, values[3] = all.w;
    }
}

// S adjacent floats of shared memory, aligned.
template <int S>
__device__ __forceinline__ void load_states(const float* source, float (&values)[S]) {
    if constexpr (S == 4) {
        const float4 all = *reinterpret_cast<const float4*>(source);
        values[0] = all.x, values[1] = all.y, values[2] = all.z, values[3] = all.w;
    } else if constexpr (S == 2) {
        const float2 both = *reinterpret_cast<const float2*>(source);
        values[0] = both.x, values[1] = both.y;
    } else {
        values[0] = *source;
    }
}

// A lane's share of a channel.
template <int S, bool Reverse>
struct Recurring {
    float rates[S], state[S];

    // One step, of its size and that times the input; returns the lane's part of y.
    __device__ __forceinline__ float advance(float2 step, const float* B, const float* C) {
        float b[S], c[S], y = 0;
        load_states(B, b);
        if constexpr (!Reverse) load_states(C, c);
#pragma unroll
        for (int s = 0; s < S; ++s) {
            const float decay = exp2_fast(step.x * rates[s]);
            if constexpr (Reverse) {
                state[s] = decay * (state[s] + step.y * b[s]);
            } else {
                state[s] = decay * state[s] + step.y * b[s];
                y += state[s] * c[s];
            }
        }
        return y;
    }
};

// The rates of a lane's states times log2(e), so that exp(step A) is a power of two. Those beyond the last are zero.
template <int S>
__device__ __forceinline__ void load_rates(const Problem& p, int64_t channel, int first, bool inside, float (&rates)[S]) {
#pragma unroll
    for (int s = 0; s < S; ++s) {
        const int64_t offset = channel * p.A_by_channel + (first + s) * p.A_by_state;
        const bool exists = inside && first + s < p.states;
        rates[s] = exists ? finite(kLog2E * float_of(load_bits(p.A + offset * bytes_of(p.A_dtype), p.A_dtype), p.A_dtype)) : 0;
    }
}

// Element of (chunks, batch, dim, states) or (chunks, batch, dim).
__device__ __forceinline__ int64_t at_chunk(const Problem& p, const Place& place, int channel) {
    return (int64_t(place.chunk) * p.batch + place.batch) * p.dim + place.channel + channel;
}

inline Couplings couplings_of(const View& view, bool channels_last) {
    const int group = channels_last ? 2 : 1, state = channels_last ? 3 : 2, step = channels_last ? 1 : 3;
    return {static_cast<char*>(view.data), int(view.dtype),    view.stride[0],
            view.stride[group],            view.stride[state], view.stride[step]};
}

inline Problem problem_of(const View& u, const View& delta, const View& A, const View& B, const View& C, const View* D,
                          const View* bias, bool softplus, bool channels_last, int64_t chunk) {
    Problem p{};
    p.batch = u.size[0];
    p.dim = A.size[0];
    p.states = int(A.size[1]);
    p.length = int(u.size[channels_last ? 1 : 2]);
    p.groups = B.size[channels_last ? 2 : 1];
    p.group_channels = p.dim / p.groups;
    p.group_blocks = (p.group_channels + kChannels - 1) / kChannels;
    p.softplus = softplus;
    p.along_steps = u.stride[channels_last ? 1 : 2] == 1 && u.stride[channels_last ? 2 : 1] != 1;
    p.divisible = p.group_channels % kVector == 0;
    p.chunks = p.length > chunk ? int((p.length + chunk - 1) / chunk) : 1;
    p.chunk = p.chunks > 1 ? int(chunk) : p.length;
    p.u = signal_of(u, channels_last, p.along_steps, p.divisible);
    p.delta = signal_of(delta, channels_last, p.along_steps, p.divisible);
    p.B = couplings_of(B, channels_last);
    p.C = couplings_of(C, channels_last);
    p.D = row_of(D, 0);
    p.bias = row_of(bias, 0);
    p.A = static_cast<const char*>(A.data);
    p.A_dtype = int(A.dtype);
    p.A_by_channel = A.stride[0];
    p.A_by_state = A.stride[1];
    return p;
}

// The common case in mixed precision: all of one 16-bit type, channels adjacent in memory. Kernels compiled for it have
// fewer instructions around the recurrence; kAnyType stands for the general kernel.
constexpr int kAnyType = -1;

inline int packed_type(const Problem& p) {
    const int type = p.u.dtype;
    const bool same = p.delta.dtype == type && p.B.dtype == type && p.C.dtype == type;
    return same && type != kFloat32 && !p.along_steps && p.u.vectors && p.delta.vectors ? type : kAnyType;
}

// Tells the compiler the result of `packed_type`.
template <int Type>
__device__ __forceinline__ void assume_packed(Problem& p) {
    if constexpr (Type != kAnyType) {
        p.along_steps = false;
        p.u.vectors = p.delta.vectors = true;
        p.u.dtype = p.delta.dtype = p.B.dtype = p.C.dtype = Type;
    }
}

template <int Value>
using Number = std::integral_constant<int, Value>;

// Calls body(type) with a type found by `packed_type`.
template <class Body>
const char* for_packed(int type, const Body& body) {
    if (type == kBFloat16) return body(Number<kBFloat16>());
    if (type == kFloat16) return body(Number<kFloat16>());
    return body(Number<kAnyType>());
}

// Calls body(K, S, type) with the best values for a number of states.
template <class Body>
const char* for_states(int states, int type, const Body& body) {
    const auto with_type = [&](auto lanes, auto own) {
        return for_packed(type, [&](auto known) { return body(lanes, own, known); });
    };
    if (states == 1) return with_type(Number<1>(), Number<1>());
    if (states <= 4) return body(Number<4>(), Number<1>(), Number<kAnyType>());
    if (states <= 8) return with_type(Number<4>(), Number<2>());
    if (states <= 16) return with_type(Number<4>(), Number<4>());
    return "more than 16 states";
}

// The recurrence over each chunk, from zero, without output: its final state, and the sum of its step sizes.
// `reverse`: of the gradients of the states, which go from later to earlier chunks. Then replaces the final states by
// those with which each chunk begins. `driving` is u, or the gradient of y.
const char* start_chunks(Problem p, const Signal& driving, bool reverse, float* ends, float* totals, void* stream);

}  // namespace scan
