// Selective scan. Definition: ../../vision_kernels/selective_scan. Division of the work: selective_scan.h.
#include "selective_scan.h"

namespace scan {
namespace {

struct Recurrence {
    Problem problem;
    Signal driving;  // u, or in reverse the gradient of y
    Signal y;        // without data: no output
    float *ends, *totals;  // of the chunks, (chunks, batch, dim, states) and (chunks, batch, dim); null if not asked for
    const float* starts;   // like the ends; null: zero
};

// A thread's share of a tile, four elements at a time: computes step sizes and the inputs of the states. Steps beyond
// the end do not matter, because no later step sees the states they change. In reverse they come first, and must add
// nothing.
template <class L, bool Reverse>
__device__ __forceinline__ void stage_steps(const Recurrence& r, int left, const SignalTile<L>& delta,
                                            const SignalTile<L>& driving, const float (&bias)[kChannels],
                                            const float (&D)[kChannels], float2 (&steps)[L::kSteps][kChannels], float (&skip)[L::kVectors][kVector]) {
    const Problem& p = r.problem;
#pragma unroll
    for (int i = 0; i < L::kVectors; ++i) {
        const Spot spot = spot_of<L>(p, i);
        if (spot.step >= (Reverse ? L::kSteps : min(left, L::kSteps)) || spot.channel >= kChannels) continue;
        float size[kVector], u[kVector], constant[kVector];
        to_floats(delta.raw[i], p.delta.dtype, size);
        to_floats(driving.raw[i], r.driving.dtype, u);
        load_channels(bias, spot, p.along_steps, constant);
#pragma unroll
        for (int e = 0; e < kVector; ++e) size[e] += constant[e];
        if (p.softplus) {
#pragma unroll
            for (int e = 0; e < kVector; ++e) size[e] = softplus(size[e]);
        }
        if constexpr (!Reverse) {
            load_channels(D, spot, p.along_steps, constant);
#pragma unroll
            for (int e = 0; e < kVector; ++e) {
                skip[i][e] = constant[e] * u[e];
                u[e] *= size[e];
            }
        }
        if (p.along_steps) {
#pragma unroll
            for (int e = 0; e < kVector; ++e) steps[spot.step + e][spot.channel] = float2{size[e], u[e]};
        } else {
            float4* const target = reinterpret_cast<float4*>(&steps[spot.step][spot.channel]);
            target[0] = float4{size[0], u[0], size[1], u[1]};
            target[1] = float4{size[2], u[2], size[3], u[3]};
        }
    }
}

template <class L>
__device__ __forceinline__ void write_outputs(const Recurrence& r, const Place& place, int left, Walk<L>& walk,
                                              const float (&y)[L::kSteps][kChannels],
                                              const float (&skip)[L::kVectors][kVector]) {
    const bool along_steps = r.problem.along_steps;
#pragma unroll
    for (int i = 0; i < L::kVectors; ++i) {
        const Spot spot = spot_of<L>(r.problem, i);
        char* const address = walk.next(r.y, i, L::kSteps);
        const int count = count_of<L>(r.problem, place, left, spot);
        if (count <= 0) continue;
        float values[kVector];
        if (along_steps) {
#pragma unroll
            for (int e = 0; e < kVector; ++e) values[e] = y[spot.step + e][spot.channel];
        } else {
            load_channels(y[spot.step], spot, along_steps, values);
        }
#pragma unroll
        for (int e = 0; e < kVector; ++e) values[e] += skip[i][e];
        store(r.y, address, count, values);
    }
}

// Blocks that a multiprocessor should hold. With ten and K = 2, the last stage of MambaVision is one wave on an H200.
constexpr int resident_blocks(int K, int S) { return K == 1 ? 16 : K == 2 ? 10 : S == 4 ? 4 : 8; }

template <int K, int S, int Type, bool Reverse>
__global__ void __launch_bounds__(kChannels* K, resident_blocks(K, S)) recurrence(const Recurrence given) {
    Recurrence r = given;
    assume_packed<Type>(r.problem);
    if constexpr (Type != kAnyType) {
        r.driving.vectors = r.y.vectors = true;
        if constexpr (!Reverse) r.driving.dtype = Type;
    }
    using L = Layout<K, S, K == 1 ? 8 : 16>;
    const Problem& p = r.problem;
    __align__(16) __shared__ float2 steps[L::kSteps][kChannels];
    __align__(16) __shared__ float B[L::kSteps * L::kStates], C[L::kSteps * L::kStates];
    __align__(16) __shared__ float y[L::kSteps][kChannels];
    __align__(16) __shared__ float bias[kChannels], D[kChannels];
    const Place place(p);
    stage_channels(p.bias, place, bias);
    stage_channels(p.D, place, D);
    __syncthreads();
    const int lane = threadIdx.x % warpSize, first = L::part(lane) * S, channel = L::channel(threadIdx.x);
    const bool inside = channel < place.channels;
    const int64_t at = at_chunk(p, place, channel);

    Recurring<S, Reverse> own;
    load_rates(p, place.channel + channel, first, inside, own.rates);
#pragma unroll
    for (int s = 0; s < S; ++s)
        own.state[s] = r.starts && inside && first + s < p.states ? r.starts[at * p.states + first + s] : 0;
    float total = 0;

    constexpr int on = Reverse ? -L::kSteps : L::kSteps;  // from a tile to the next
    const int tiles = (place.end - place.begin + L::kSteps - 1) / L::kSteps;
    int tile = place.begin + (Reverse ? tiles - 1 : 0) * L::kSteps;
    const Couplings &incoming = Reverse ? p.C : p.B, &outgoing = p.C;
    SignalTile<L> delta(p.delta, p, place, tile), driving(r.driving, p, place, tile);
    CouplingTile<L> next_B(incoming, p, place, tile), next_C(outgoing, p, place, tile);
    Walk<L> outputs(r.y, p, place, tile);
    const auto fetch = [&](int from) {
        const int left = place.end - from;
        delta.fetch(p.delta, p, place, left, on);
        driving.fetch(r.driving, p, place, left, on);
        next_B.fetch(incoming, p, left, on);
        if constexpr (!Reverse) next_C.fetch(outgoing, p, left, on);
    };
    if (tiles > 0) fetch(tile);
    for (int i = 0; i < tiles; ++i) {
        const int left = place.end - tile;
        float skip[L::kVectors][kVector];
        stage_steps<L, Reverse>(r, left, delta, driving, bias, D, steps, skip);
        next_B.stage(incoming.dtype, p.along_steps, B);
        if constexpr (!Reverse) next_C.stage(outgoing.dtype, p.along_steps, C);
        __syncthreads();
        tile += on;
        if (i + 1 < tiles) fetch(tile);
#pragma unroll
        for (int group = 0; group < L::kSteps; group += K) {
            const int t = Reverse ? L::kSteps - K - group : group;
            if (t >= left) continue;
            float sums[K];
#pragma unroll
            for (int k = 0; k < K; ++k) {
                const int step = Reverse ? t + K - 1 - k : t + k, coupling = step * L::kStates + first;
                sums[k] = own.advance(steps[step][channel], B + coupling, C + coupling);
            }
            if constexpr (!Reverse) {
                sum_across<L::kStateMask, K>(sums, lane);
                y[t + first_sum<L::kStateMask, K>(lane)][channel] = sums[0];
            }
        }
        if (r.totals)
            for (int t = 0; t < min(left, L::kSteps); ++t) total += steps[t][channel].x;
        __syncthreads();
        if constexpr (!Reverse)
            if (r.y.data) write_outputs<L>(r, place, left, outputs, y, skip);
    }
    if (!r.ends || !inside) return;
#pragma unroll
    for (int s = 0; s < S; ++s)
        if (first + s < p.states) r.ends[at * p.states + first + s] = own.state[s];
    if (first == 0) r.totals[at] = total;
}

// From the end of each chunk to the start of the next: a thread for each (batch, dim, state).
__global__ void join(const Problem p, float* ends, const float* totals, bool reverse) {
    const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, sequences = p.batch * p.dim;
    if (index >= sequences * p.states) return;
    const int64_t sequence = index / p.states;
    const int64_t offset = sequence % p.dim * p.A_by_channel + index % p.states * p.A_by_state;
    const float rate = finite(kLog2E * float_of(load_bits(p.A + offset * bytes_of(p.A_dtype), p.A_dtype), p.A_dtype));
    float start = 0;
    for (int64_t i = 0; i < p.chunks; ++i) {
        const int64_t chunk = reverse ? p.chunks - 1 - i : i;
        float& end = ends[chunk * sequences * p.states + index];
        const float from_zero = end;
        end = start;
        start = exp2_fast(totals[chunk * sequences + sequence] * rate) * start + from_zero;
    }
}

// From this many blocks on, two lanes per channel occupy a large GPU, and do less work in total than four.
constexpr int64_t kManyBlocks = 512;

template <bool Reverse>
const char* run(const Recurrence& r, void* stream) {
    const Problem& p = r.problem;
    const bool vectors = r.driving.vectors && (r.y.vectors || !r.y.data);
    const int packed = vectors && !Reverse ? packed_type(p) : kAnyType;
    const auto start = [&](auto lanes, auto states, auto type) {
        constexpr int K = decltype(lanes)::value, S = decltype(states)::value;
        constexpr int kType = Reverse ? kAnyType : decltype(type)::value;
        return launch(recurrence<K, S, kType, Reverse>, dim3(p.blocks(), unsigned(p.chunks)), kChannels * K, 0, stream, r);
    };
    if constexpr (!Reverse)
        if (p.states > 4 && p.states <= 8 && int64_t(p.blocks()) * p.chunks >= kManyBlocks)
            return for_packed(packed, [&](auto type) { return start(Number<2>(), Number<4>(), type); });
    return for_states(p.states, packed, start);
}

}  // namespace

const char* start_chunks(Problem p, const Signal& driving, bool reverse, float* ends, float* totals, void* stream) {
    const Recurrence r{p, driving, {}, ends, totals, nullptr};
    const char* error = reverse ? run<true>(r, stream) : run<false>(r, stream);
    if (error) return error;
    const int64_t sequences = p.batch * p.dim * p.states, threads = 128;
    return launch(join, unsigned((sequences + threads - 1) / threads), unsigned(threads), 0, stream, p, ends, totals, reverse);
}

}  // namespace scan

// ends: (chunks, batch, dim, states), totals: (chunks, batch, dim), float32; both absent if there is one chunk.
VK_ENTRY(selective_scan_forward)(void* stream, const View* u, const View* delta, const View* A, const View* B,
                                 const View* C, const View* D, const View* bias, int64_t softplus, int64_t channels_last,
                                 const View* y, int64_t chunk, const View* ends, const View* totals) {
    using namespace scan;
    const Problem p = problem_of(*u, *delta, *A, *B, *C, D, bias, softplus, channels_last, chunk);
    float* starts = nullptr;
    if (p.chunks > 1) {
        starts = static_cast<float*>(ends->data);
        if (const char* error = start_chunks(p, p.u, false, starts, static_cast<float*>(totals->data), stream)) return error;
    }
    return run<false>({p, p.u, signal_of(*y, channels_last, p.along_steps, p.divisible), nullptr, nullptr, starts}, stream);
}
