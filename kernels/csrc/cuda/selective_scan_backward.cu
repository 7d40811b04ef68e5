// Gradients of the selective scan. Division of the work: selective_scan.h.
//
// With g the gradient of y and h that of the states, time reversed: h_t = g_t C_t + a_{t+1} h_{t+1}, a = exp(delta A).
// A block goes through its chunk forwards and keeps the states with which the tiles begin, then backwards, and
// recomputes the states of one tile after the other in registers. Gradients that sum over channels, steps or batch
// entries are summed in a fixed order: in a block, then over the blocks by `sum_parts`.
#include "selective_scan.h"
#include "sum_parts.h"

namespace scan {
namespace {

constexpr int kTile = 8;

struct Gradients {
    Problem problem;
    Signal y, u, delta;  // gradients
    Couplings B, C;      // their first part; others follow after `coupling_elements` each
    int64_t coupling_elements;
    float *A, *D, *bias;     // parts for (chunks, batch): (dim, states) and (dim); null: not asked for
    float* checkpoints;      // (blocks, chunks, tiles of a chunk, S, threads of a block)
    const float *starts, *carries;  // of the chunks, (chunks, batch, dim, states); null: zero
};

// Step size, u, gradient of y, and the factor of the gradient of the step size.
using Step = float4;

template <class L>
struct Shared {
    Step steps[kTile][kChannels];
    float bias[kChannels], D[kChannels];
    float B[kTile * L::kStates], C[kTile * L::kStates];
    float2 outputs[kTile][kChannels];  // gradients of u and delta
    float of_B[L::kThreads / 32][kTile * L::kStates], of_C[L::kThreads / 32][kTile * L::kStates];  // of each warp
};

// `grad` may be absent. Steps beyond the end contribute nothing, as their u and gradient of y are zero.
template <class L>
__device__ __forceinline__ void stage_steps(const Problem& p, const SignalTile<L>& delta, const SignalTile<L>& u,
                                            const SignalTile<L>* grad, int grad_dtype, Shared<L>& shared) {
    const int by_step = p.along_steps, by_channel = !p.along_steps;  // from one of four elements to the next
#pragma unroll
    for (int i = 0; i < L::kVectors; ++i) {
        const Spot spot = spot_of<L>(p, i);
        if (spot.step >= kTile || spot.channel >= kChannels) continue;
        float raw[kVector], input[kVector], of_y[kVector] = {}, bias[kVector];
        to_floats(delta.raw[i], p.delta.dtype, raw);
        to_floats(u.raw[i], p.u.dtype, input);
        if (grad) to_floats(grad->raw[i], grad_dtype, of_y);
        load_channels(shared.bias, spot, p.along_steps, bias);
        Step steps[kVector];
#pragma unroll
        for (int e = 0; e < kVector; ++e) steps[e] = Step{raw[e] + bias[e], input[e], of_y[e], 1};
        if (p.softplus) {
#pragma unroll
            for (int e = 0; e < kVector; ++e) {
                if (grad) steps[e].w = sigmoid(steps[e].x);
                steps[e].x = softplus(steps[e].x);
            }
        }
#pragma unroll
        for (int e = 0; e < kVector; ++e) shared.steps[spot.step + e * by_step][spot.channel + e * by_channel] = steps[e];
    }
}

template <int S>
struct Lane {
    int first, channel;  // first state; channel in the block
    float rates[S], state[S], carry[S], of_A[S] = {}, of_D = 0, of_bias = 0;
};

// Forwards through the chunk: the states with which the tiles begin.
template <class L, int S>
__device__ __forceinline__ void keep_states(const Gradients& r, const Place& place, int tiles, Lane<S>& own,
                                            float* checkpoints, Shared<L>& shared) {
    const Problem& p = r.problem;
    SignalTile<L> delta(p.delta, p, place, place.begin), u(p.u, p, place, place.begin);
    CouplingTile<L> B(p.B, p, place, place.begin);
    for (int i = 0; i < tiles; ++i) {
        const int left = place.end - place.begin - i * kTile;
#pragma unroll
        for (int s = 0; s < S; ++s) checkpoints[(i * S + s) * L::kThreads] = own.state[s];
        if (i + 1 == tiles) break;
        delta.fetch(p.delta, p, place, left, kTile);
        u.fetch(p.u, p, place, left, kTile);
        B.fetch(p.B, p, left, kTile);
        __syncthreads();
        stage_steps<L>(p, delta, u, nullptr, 0, shared);
        B.stage(p.B.dtype, p.along_steps, shared.B);
        __syncthreads();
#pragma unroll
        for (int t = 0; t < kTile; ++t) {
            const Step step = shared.steps[t][own.channel];
            float b[S];
            load_states(shared.B + t * L::kStates + own.first, b);
#pragma unroll
            for (int s = 0; s < S; ++s)
                own.state[s] = exp2_fast(step.x * own.rates[s]) * own.state[s] + step.x * step.y * b[s];
        }
    }
    __syncthreads();
}

// Sums over the channels of a warp, of kTile x S values of each lane.
template <class L, int S>
__device__ __forceinline__ void sum_channels(float (&values)[kTile * S], int first, float* target) {
    constexpr int own = kTile * L::kStates / 32 > 1 ? kTile * L::kStates / 32 : 1;
    const int lane = threadIdx.x % warpSize;
    sum_across<L::kChannelMask, kTile * S>(values, lane);
    const int from = first_sum<L::kChannelMask, kTile * S>(lane);
#pragma unroll
    for (int i = 0; i < own; ++i) target[(from + i) / S * L::kStates + first + (from + i) % S] = values[i];
}

// Backwards through a tile that is staged, from the states with which it begins.
template <class L, int S>
__device__ __forceinline__ void differentiate(Lane<S>& own, Shared<L>& shared) {
    constexpr int K = L::kStates / S;
    const int lane = threadIdx.x % warpSize, warp = threadIdx.x / warpSize;
    float previous[kTile][S], decay[kTile][S], shares[kTile * S];
#pragma unroll
    for (int t = 0; t < kTile; ++t) {
        const Step step = shared.steps[t][own.channel];
        float b[S];
        load_states(shared.B + t * L::kStates + own.first, b);
#pragma unroll
        for (int s = 0; s < S; ++s) {
            decay[t][s] = exp2_fast(step.x * own.rates[s]);
            previous[t][s] = own.state[s];
            own.state[s] = decay[t][s] * own.state[s] + step.x * step.y * b[s];
            shares[t * S + s] = step.z * own.state[s];
        }
    }
    sum_channels<L, S>(shares, own.first, shared.of_C[warp]);
    float drive[K], exponent[K];  // the lane's part of the gradients of delta u and, times log2(e), of the step size
#pragma unroll
    for (int t = kTile - 1; t >= 0; --t) {
        const Step step = shared.steps[t][own.channel];
        float b[S], c[S];
        load_states(shared.B + t * L::kStates + own.first, b);
        load_states(shared.C + t * L::kStates + own.first, c);
        drive[t % K] = exponent[t % K] = 0;
#pragma unroll
        for (int s = 0; s < S; ++s) {
            const float of_state = own.carry[s] + step.z * c[s];
            drive[t % K] += of_state * b[s];
            shares[t * S + s] = of_state * step.x * step.y;
            own.carry[s] = of_state * decay[t][s];
            const float of_exponent = own.carry[s] * previous[t][s];
            own.of_A[s] += of_exponent * step.x;
            exponent[t % K] += of_exponent * own.rates[s];
        }
        if (t % K) continue;
        sum_across<L::kStateMask, K>(drive, lane);
        sum_across<L::kStateMask, K>(exponent, lane);
        const int mine = t + first_sum<L::kStateMask, K>(lane);
        const Step at = shared.steps[mine][own.channel];
        const float of_delta = (kLn2 * exponent[0] + drive[0] * at.y) * at.w;
        shared.outputs[mine][own.channel] = float2{drive[0] * at.x + shared.D[own.channel] * at.z, of_delta};
        own.of_D += at.z * at.y;
        own.of_bias += of_delta;
    }
    sum_channels<L, S>(shares, own.first, shared.of_B[warp]);
}

// Contributions of a tile to the gradients of u and delta, and to the block's part of those of B and C.
template <class L>
__device__ __forceinline__ void write_tile(const Gradients& r, const Place& place, int left, int tile, Walk<L>& of_u,
                                           Walk<L>& of_delta, const Shared<L>& shared) {
    const Problem& p = r.problem;
    const int by_step = p.along_steps, by_channel = !p.along_steps;
#pragma unroll
    for (int i = 0; i < L::kVectors; ++i) {
        const Spot spot = spot_of<L>(p, i);
        const int count = count_of<L>(p, place, left, spot);
        char *const to_u = of_u.next(r.u, i, -kTile), *const to_delta = of_delta.next(r.delta, i, -kTile);
        if (count <= 0) continue;
        float first[kVector], second[kVector];
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
            const float2 both = shared.outputs[spot.step + e * by_step][spot.channel + e * by_channel];
            first[e] = both.x;
            second[e] = both.y;
        }
        store(r.u, to_u, count, first);
        store(r.delta, to_delta, count, second);
    }
    for (int i = threadIdx.x; i < kTile * L::kStates; i += L::kThreads) {
        const int step = i / L::kStates, state = i % L::kStates;
        if (step >= left || state >= p.states) continue;
        float of_B = 0, of_C = 0;
        for (int warp = 0; warp < L::kThreads / 32; ++warp) of_B += shared.of_B[warp][i], of_C += shared.of_C[warp][i];
        const int64_t part = place.block * r.coupling_elements;
        reinterpret_cast<float*>(r.B.at(place.batch, place.group, state, tile + step))[part] = of_B;
        reinterpret_cast<float*>(r.C.at(place.batch, place.group, state, tile + step))[part] = of_C;
    }
}

template <class L, int S>
__device__ __forceinline__ void write_sums(const Gradients& r, const Place& place, Lane<S>& own) {
    const Problem& p = r.problem;
    const int lane = threadIdx.x % warpSize;
    sum_across<L::kStateMask, 1>(&own.of_D, lane);
    sum_across<L::kStateMask, 1>(&own.of_bias, lane);
    if (own.channel >= place.channels) return;
    const int64_t at = at_chunk(p, place, own.channel);
#pragma unroll
    for (int s = 0; s < S; ++s)
        if (own.first + s < p.states) r.A[at * p.states + own.first + s] = own.of_A[s];
    if (own.first > 0) return;
    if (r.D) r.D[at] = own.of_D;
    if (r.bias) r.bias[at] = own.of_bias;
}

template <int K, int S, int Type>
__global__ void __launch_bounds__(kChannels* K, K == 4 && S <= 2 ? 5 : 1) gradients(const Gradients given) {
    Gradients r = given;
    assume_packed<Type>(r.problem);
    if constexpr (Type != kAnyType) {
        r.y.vectors = r.u.vectors = r.delta.vectors = true;
        r.u.dtype = r.delta.dtype = Type;
    }
    using L = Layout<K, S, kTile>;
    const Problem& p = r.problem;
    __align__(16) __shared__ Shared<L> shared;
    const Place place(p);
    stage_channels(p.bias, place, shared.bias);
    stage_channels(p.D, place, shared.D);
    __syncthreads();

    Lane<S> own;
    own.first = L::part(threadIdx.x % warpSize) * S;
    own.channel = L::channel(threadIdx.x);
    const bool inside = own.channel < place.channels;
    load_rates(p, place.channel + own.channel, own.first, inside, own.rates);
    const int64_t at = at_chunk(p, place, own.channel) * p.states + own.first;
#pragma unroll
    for (int s = 0; s < S; ++s) {
        const bool exists = r.starts && inside && own.first + s < p.states;
        own.state[s] = exists ? r.starts[at + s] : 0;
        own.carry[s] = exists ? r.carries[at + s] : 0;
    }

    const int tiles = (place.end - place.begin + kTile - 1) / kTile, tiles_of_chunk = (p.chunk + kTile - 1) / kTile;
    float* const checkpoints = r.checkpoints + (int64_t(blockIdx.x) * p.chunks + place.chunk) * tiles_of_chunk * S * L::kThreads +
                               threadIdx.x;
    keep_states<L, S>(r, place, tiles, own, checkpoints, shared);

    const int last = place.begin + (tiles - 1) * kTile;
    SignalTile<L> delta(p.delta, p, place, last), u(p.u, p, place, last), grad(r.y, p, place, last);
    CouplingTile<L> B(p.B, p, place, last), C(p.C, p, place, last);
    Walk<L> of_u(r.u, p, place, last), of_delta(r.delta, p, place, last);
    const auto fetch = [&](int tile) {
        const int left = place.end - tile;
        delta.fetch(p.delta, p, place, left, -kTile);
        u.fetch(p.u, p, place, left, -kTile);
        grad.fetch(r.y, p, place, left, -kTile);
        B.fetch(p.B, p, left, -kTile);
        C.fetch(p.C, p, left, -kTile);
    };
    if (tiles > 0) fetch(last);
    for (int i = tiles - 1; i >= 0; --i) {
        const int tile = place.begin + i * kTile, left = place.end - tile;
        stage_steps<L>(p, delta, u, &grad, r.y.dtype, shared);
        B.stage(p.B.dtype, p.along_steps, shared.B);
        C.stage(p.C.dtype, p.along_steps, shared.C);
#pragma unroll
        for (int s = 0; s < S; ++s) own.state[s] = checkpoints[(i * S + s) * L::kThreads];
        __syncthreads();
        if (i > 0) fetch(tile - kTile);
        differentiate<L, S>(own, shared);
        __syncthreads();
        write_tile<L>(r, place, left, tile, of_u, of_delta, shared);
    }
    write_sums<L, S>(r, place, own);
}

float* floats(const View* view) { return view ? static_cast<float*>(view->data) : nullptr; }

}  // namespace
}  // namespace scan

// Gradients, each with its partial sums, in float32: of_A, of_D and of_bias from (chunks x batch, ..),
// of_B and of_C from (blocks of 32 channels, ..). starts, carries: (chunks, batch, dim, states), totals: (chunks,
// batch, dim), absent if there is one chunk. checkpoints: a state of each block's channels for every kTile steps.
VK_ENTRY(selective_scan_backward)(void* stream, const View* grad_y, const View* u, const View* delta, const View* A,
                                  const View* B, const View* C, const View* D, const View* bias, int64_t softplus,
                                  int64_t channels_last, int64_t chunk, const View* of_u, const View* of_delta,
                                  const View* of_A, const View* of_B, const View* of_C, const View* of_D,
                                  const View* of_bias, const View* A_parts, const View* B_parts, const View* C_parts,
                                  const View* D_parts, const View* bias_parts, const View* checkpoints, const View* starts,
                                  const View* carries, const View* totals) {
    using namespace scan;
    const Problem p = problem_of(*u, *delta, *A, *B, *C, D, bias, softplus, channels_last, chunk);
    const auto signal = [&](const View* view) { return signal_of(*view, channels_last, p.along_steps, p.divisible); };
    const auto parts = [&](const View* view, const View* all) {  // with the strides of the sum, in float32
        View first = *view;
        first.data = all->data;
        first.dtype = kFloat32;
        return couplings_of(first, channels_last);
    };
    Gradients r{p, signal(grad_y), signal(of_u), signal(of_delta), parts(of_B, B_parts), parts(of_C, C_parts), 1,
                floats(A_parts), floats(D_parts), floats(bias_parts), floats(checkpoints), floats(starts), floats(carries)};
    for (int i = 0; i < 4; ++i) r.coupling_elements *= of_B->size[i];
    const char* error = nullptr;
    if (p.chunks > 1) {
        error = start_chunks(p, p.u, false, floats(starts), floats(totals), stream);
        if (!error) error = start_chunks(p, r.y, true, floats(carries), floats(totals), stream);
    }
    const bool vectors = r.y.vectors && r.u.vectors && r.delta.vectors;  // gradients may have another layout than u
    if (!error)
        error = for_states(p.states, vectors ? packed_type(p) : kAnyType, [&](auto lanes, auto states, auto type) {
            constexpr int K = decltype(lanes)::value, S = decltype(states)::value, kType = decltype(type)::value;
            return launch(gradients<K, S, kType>, dim3(p.blocks(), unsigned(p.chunks)), kChannels * K, 0, stream, r);
        });
    if (error) return error;
    return sum_parts({parts_of(A_parts, of_A, 2), parts_of(B_parts, of_B, 4), parts_of(C_parts, of_C, 4),
                      parts_of(D_parts, of_D, 1), parts_of(bias_parts, of_bias, 1)},
                     stream);
}
