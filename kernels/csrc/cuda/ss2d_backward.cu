// SS2D, backward. Overview: ss2d.cuh.
//
// States and step sizes are recomputed. With the states before each round of a route and the gradients after it
// (ss2d_maps), all rounds can be computed in any order. There are no atomics: gradients that sum over channels
// have a copy for each set of tiles that one block handles, those that sum over images one for each set of images.
#include "ss2d.cuh"

namespace {

constexpr int kSteps = 4;
constexpr int kMaxThreads = 384;

struct Gradients {
    Image y, x;
    float* sums;         // of x: (batch, length, pitch); null if they are in shared memory, (length, kTile)
    int pitch;
    float* projections;  // (parts, batch, length, route, rank + 2 states)
    float* parameters;   // (sets, route, rows, tiles * kTile), rows: weights of the ranks, bias, A of the states, D
};

// The work of a block: tiles part, part + parts, ... of images group, group + groups, ...
struct Share {
    int parts, groups;
    bool split;  // each round has a block
    int first_route, last_route;
};

// Lanes index, index ^ 1, ... 3, `distance` apart, return the sum over them of value[index].
__device__ __forceinline__ float sum_of_own(const float (&value)[4], int index, int distance) {
    const bool odd = index & 1, high = index & 2;
    const float low_pair = (odd ? value[1] : value[0]) + __shfl_xor_sync(~0u, odd ? value[0] : value[1], distance);
    const float high_pair = (odd ? value[3] : value[2]) + __shfl_xor_sync(~0u, odd ? value[2] : value[3], distance);
    return (high ? high_pair : low_pair) + __shfl_xor_sync(~0u, high ? low_pair : high_pair, 2 * distance);
}

// One round of a route, for one lane.
template <class P>
struct Round {
    using T = typename P::Element;
    using Parts = Split<kGradientParts<T>>;
    const Work<P, kSteps>& work;
    const Gradients& gradients;
    float* row_sums;   // (rows, kTile) of this warp
    float* projected;  // gradients of the projections, at position 0
    bool first;        // nothing has been added to these yet
    float step[kSteps][4], x[kSteps][4], grad_y[kSteps][4], grad_step[kSteps][4], grad_drive[kSteps][4];

    __device__ __forceinline__ Round(const Work<P, kSteps>& work, const Gradients& gradients, float* row_sums,
                                     float* projected, bool first)
        : work(work), gradients(gradients), row_sums(row_sums), projected(projected), first(first) {
        work.step_sizes(step);
        gradients.y.load(work.batch, work.segment, work.channel, work.exists, grad_y);
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
            work.load_x(i, x[i]);
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                if (i >= work.segment.count) x[i][c] = 0;
                grad_step[i][c] = grad_drive[i][c] = 0;
            }
        }
    }

    // Adds the sums over all segments of the warp for four channels.
    __device__ __forceinline__ void add_to_row(int row, const float (&value)[4]) const {
        float sum = sum_of_own(value, work.lane.g, 4);
        sum += __shfl_xor_sync(~0u, sum, 16);
        if (work.lane.g < 4) row_sums[row * kTile + 4 * work.lane.q + work.lane.g] += sum;
    }

    __device__ __forceinline__ float* projections_at(int position) const {
        return at_position(projected, position, kRoutes * work.problem.columns());
    }
    // Adds the sums over all channels of the tile, of all positions of the segment.
    __device__ __forceinline__ void add_to_column(int column, const float (&value)[kSteps]) const {
        static_assert(kSteps == 4);
        const float sum = sum_of_own(value, work.lane.q, 1);
        const int(&at)[kSteps] = work.segment.position, even = at[0], odd = at[1], high_even = at[2], high_odd = at[3];
        const int q = work.lane.q, position = q < 2 ? (q == 0 ? even : odd) : (q == 2 ? high_even : high_odd);
        float* const target = projections_at(position) + column;
        if (q < work.segment.count) *target = first ? sum : *target + sum;
    }

    // `behind` is the gradient of the state after the round, times its decay; `published` of this state has the maps of
    // all warps, (warps, 3, kTile).
    __device__ __forceinline__ void recur(int n, const float* before, const float* behind, float* published) {
        const Lane lane = work.lane;
        const int states = work.problem.states(), rank = work.problem.rank, warps = blockDim.x / 32;
        float B[kSteps], C[kSteps], decay[kSteps][4], drive[kSteps][4], input[kSteps][4];
        Map forth[4], back[4];
        work.load_couplings(n, B, C);
#pragma unroll
        for (int i = 0; i < kSteps; ++i)
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                drive[i][c] = step[i][c] * x[i][c];
                input[i][c] = drive[i][c] * B[i];
            }
        local_maps(work, n, step, input, decay, forth);
        published += 4 * lane.q;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            back[c] = {forth[c].factor, 0};
#pragma unroll
            for (int i = kSteps - 1; i >= 0; --i)
                back[c].offset = decay[i][c] * (grad_y[i][c] * C[i] + back[c].offset);
            forth[c] = compose<true>(forth[c], lane.g);
            back[c] = compose<false>(back[c], lane.g);
            if (lane.g == 7) {
                published[lane.warp * 3 * kTile + c] = forth[c].factor;
                published[(lane.warp * 3 + 1) * kTile + c] = forth[c].offset;
            }
            if (lane.g == 0) published[(lane.warp * 3 + 2) * kTile + c] = back[c].offset;
            forth[c] = exclude<true>(forth[c], lane.g);
            back[c] = exclude<false>(back[c], lane.g);
        }
        __syncthreads();
        float state[4] = {}, gradient[4] = {}, rate[4], grad_A[4], sum_B[kSteps] = {}, sum_C[kSteps] = {};
        if (before) load_four(before, true, state);
        if (behind) load_four(behind, true, gradient);
        for (int warp = 0; warp < lane.warp; ++warp)
            apply(published + warp * 3 * kTile, published + (warp * 3 + 1) * kTile, state);
        for (int warp = warps - 1; warp > lane.warp; --warp)
            apply(published + warp * 3 * kTile, published + (warp * 3 + 2) * kTile, gradient);
        work.load_rates(n, rate);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            float previous[kSteps], h = forth[c].factor * state[c] + forth[c].offset;
#pragma unroll
            for (int i = 0; i < kSteps; ++i) {
                previous[i] = h;
                h = decay[i][c] * h + input[i][c];
                sum_C[i] += grad_y[i][c] * h;
            }
            float next = back[c].factor * gradient[c] + back[c].offset;
            grad_A[c] = 0;
#pragma unroll
            for (int i = kSteps - 1; i >= 0; --i) {
                const float grad_h = grad_y[i][c] * C[i] + next;
                sum_B[i] += grad_h * drive[i][c];
                grad_drive[i][c] += grad_h * B[i];
                next = decay[i][c] * grad_h;
                grad_step[i][c] += next * previous[i] * (rate[c] * kLn2);
                grad_A[c] += next * previous[i] * step[i][c];
            }
        }
        add_to_column(rank + n, sum_B);
        add_to_column(rank + states + n, sum_C);
        add_to_row(rank + 1 + n, grad_A);
    }

    // Sums gradients of x over the routes; the last route writes them.
    __device__ __forceinline__ void add_to_x(float* total, int pitch) const {
        float skip[4] = {}, sum[kSteps][4] = {};
        if (work.route == 0)
            work.load_skip(skip);
        else
            load_segment(total, pitch, work.segment, true, sum);
#pragma unroll
        for (int i = 0; i < kSteps; ++i)
#pragma unroll
            for (int c = 0; c < 4; ++c)
                sum[i][c] += step[i][c] * grad_drive[i][c] + (work.route == 0 ? skip[c] * grad_y[i][c] : 0.0f);
        if (work.route < kRoutes - 1)
            store_segment(total, pitch, work.segment, sum);
        else if (work.exists)
            gradients.x.store(work.batch, work.segment, work.channel, sum);
    }

    // Gradients of the factors of the step sizes.
    __device__ __forceinline__ void through_step_sizes() {
        const P& problem = work.problem;
        float of_bias[4] = {}, of_skip[4] = {};
        Parts pairs[kSteps / 2][4];  // rows of A: positions 2 i, then 2 i + 1; columns: channels
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                grad_step[i][c] = (grad_step[i][c] + x[i][c] * grad_drive[i][c]) * softplus_slope(step[i][c]);
                of_bias[c] += grad_step[i][c];
                of_skip[c] += x[i][c] * grad_y[i][c];
            }
            pairs[i / 2][i % 2] = Parts(grad_step[i][0], grad_step[i][1]);
            pairs[i / 2][i % 2 + 2] = Parts(grad_step[i][2], grad_step[i][3]);
        }
        add_to_row(problem.rank, of_bias);
        if (work.route == 0) add_to_row(problem.rank + 1 + problem.states(), of_skip);
        low_gradients(pairs);
        weight_gradients(pairs);
    }

    // Products of the gradients with the weights, for 8 ranks at a time.
    __device__ __forceinline__ void low_gradients(const Parts (&pairs)[kSteps / 2][4]) const {
        const P& problem = work.problem;
        const int q = work.lane.q;
#pragma unroll 1
        for (int rank = 0; rank < problem.rank; rank += 8) {
            const int row = rank + work.lane.g, column = rank + 2 * q;
            float weight[4][1];
#pragma unroll
            for (int c = 0; c < 4; ++c) work.load_weights(4 * q + c, row, weight[c]);
            const Parts weights[2] = {Parts(weight[0][0], weight[1][0]), Parts(weight[2][0], weight[3][0])};
#pragma unroll
            for (int i = 0; i < kSteps / 2; ++i) {
                float low[4] = {};
                multiply<kGradientParts<T>>(low[0], low[1], low[2], low[3], pairs[i], weights);
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    float* const target = projections_at(work.segment.position[2 * i + k / 2]) + column + k % 2;
                    if (2 * i + k / 2 < work.segment.count && column + k % 2 < problem.rank)
                        *target = first ? low[k] : *target + low[k];
                }
            }
        }
    }

    // Products of the low-rank step sizes with the gradients, for 16 ranks at a time.
    __device__ __forceinline__ void weight_gradients(const Parts (&pairs)[kSteps / 2][4]) const {
        const P& problem = work.problem;
        Parts rows[kSteps / 2][4];
#pragma unroll
        for (int i = 0; i < kSteps / 2; ++i)
#pragma unroll
            for (int k = 0; k < 4; ++k) rows[i][k] = transposed(pairs[i][k]);
#pragma unroll 1
        for (int rank = 0; rank < problem.rank; rank += 16) {
            float sum[2][4] = {};
#pragma unroll
            for (int i = 0; i < kSteps / 2; ++i) {
                if (2 * i >= problem.steps) break;
                Split<kPartsOf<T>> low[4], columns[4];
                work.load_low(i, rank, low);
#pragma unroll
                for (int k = 0; k < 4; ++k) columns[k] = transposed(low[k % 2 * 2 + k / 2]);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const Parts grads[2] = {rows[i][2 * half], rows[i][2 * half + 1]};
                    multiply<kGradientParts<T>>(sum[half][0], sum[half][1], sum[half][2], sum[half][3], columns, grads);
                }
            }
#pragma unroll
            for (int k = 0; k < 8; ++k) {
                const int row = rank + work.lane.g + k % 4 / 2 * 8;
                if (row < problem.rank)
                    row_sums[row * kTile + 4 * work.lane.q + k / 4 * 2 + k % 2] += sum[k / 4][k % 4];
            }
        }
    }
};

// Adds the sums of all warps, in order, to those of the block.
__device__ __forceinline__ void flush_rows(const float* row_sums, int rows, float* target, int pitch, bool first) {
    const int warps = blockDim.x / 32;
    __syncthreads();
    for (int i = threadIdx.x; i < rows * kTile; i += blockDim.x) {
        float sum = 0;
        for (int warp = 0; warp < warps; ++warp) sum += row_sums[warp * rows * kTile + i];
        float* const element = target + int64_t(i / kTile) * pitch + i % kTile;
        *element = first ? sum : *element + sum;
    }
    __syncthreads();
}

template <class P>
__global__ void __launch_bounds__(kMaxThreads) backward(const __grid_constant__ P problem, const Rounds maps,
                                                        const __grid_constant__ Gradients gradients, const Share share) {
    VK_DYNAMIC_SHARED(float, shared);
    const int warps = blockDim.x / 32, rows = problem.rank + problem.states() + 2, pitch = problem.tiles() * kTile;
    float* const published = shared;  // (2, warps, 3, kTile)
    float* const row_sums = published + 2 * warps * 3 * kTile;
    float* const sums_in_shared = row_sums + warps * rows * kTile;
    int block = blockIdx.x;
    const int first_round = share.split ? block % problem.rounds : 0;
    const int last_round = share.split ? first_round + 1 : problem.rounds;
    if (share.split) block /= problem.rounds;
    const int part = block % share.parts, group = block / share.parts;
    const int set = share.split ? group * problem.rounds + first_round : group;
    float* const own_rows = row_sums + threadIdx.x / 32 * rows * kTile;

    int turn = 0;
    for (int tile = part; tile < problem.tiles(); tile += share.parts)
        for (int batch = group; batch < problem.batch; batch += share.groups)
            for (int route = share.first_route; route < share.last_route; ++route) {
                for (int i = threadIdx.x % 32; i < rows * kTile; i += 32) own_rows[i] = 0;
                __syncwarp();
                for (int round = first_round; round < last_round; ++round) {
                    const Work<P, kSteps> work(problem, batch, route, tile, round);
                    const int64_t image = int64_t(part) * problem.batch + batch;
                    float* projected = gradients.projections;
                    projected += (image * problem.length * kRoutes + route) * problem.columns();
                    Round<P> at(work, gradients, own_rows, projected, tile == part);
#pragma unroll 1
                    for (int n = 0; n < problem.states(); ++n, ++turn) {
                        const bool known = problem.rounds > 1;
                        at.recur(n, known ? maps.at(1, batch, route, round, n, work.channel) : nullptr,
                                 known ? maps.at(2, batch, route, round, n, work.channel) : nullptr,
                                 published + turn % 2 * warps * 3 * kTile);
                    }
                    float* total = sums_in_shared + 4 * work.lane.q;
                    if (gradients.sums)
                        total = gradients.sums + int64_t(batch) * problem.length * gradients.pitch + work.channel;
                    at.add_to_x(total, gradients.pitch);
                    at.through_step_sizes();
                }
                float* const target = gradients.parameters + (int64_t(set) * kRoutes + route) * rows * pitch;
                flush_rows(row_sums, rows, target + tile * kTile, pitch, batch == group);
            }
}

template <class P>
const char* run(void* stream, const P& problem, const Rounds& maps, const Gradients& gradients, Share share,
                int64_t warps) {
    const int rows = problem.rank + problem.states() + 2;
    size_t shared = warps * (6 + rows) * kTile * sizeof(float);
    if (!gradients.sums) shared += size_t(problem.length) * kTile * sizeof(float);
    const unsigned blocks = unsigned(share.parts * share.groups * (share.split ? problem.rounds : 1));
    const char* error = nullptr;
    for (int route = 0; route < kRoutes && !error; route = share.last_route) {
        share.first_route = route;
        share.last_route = share.split ? route + 1 : kRoutes;
        error = launch(backward<P>, blocks, unsigned(32 * warps), shared, stream, problem, maps, gradients, share);
    }
    return error;
}

}  // namespace

// Inputs as for ss2d_forward, and maps from ss2d_maps with grad_y, or null if there is one round. grad_x: as x.
// Float32: sums as for ss2d_forward; grad_projections (parts, batch, length, 4, rank + 2 states); grad_parameters
// (sets, 4, rank + states + 2, 16 tiles) with a set for each of `groups`, and round, if split.
VK_ENTRY(ss2d_backward)
(void* stream, const View* x, const View* projections, const View* dt_weight, const View* dt_bias, const View* A,
 const View* D, int64_t step0, int64_t step1, int64_t step2, int64_t step3, int64_t warps, int64_t steps, int64_t rounds,
 int64_t parts, int64_t groups, int64_t split, const View* grad_y, const View* sums, const View* maps, const View* grad_x,
 const View* grad_projections, const View* grad_parameters) {
    const int64_t route_steps[kRoutes] = {step0, step1, step2, step3};
    return for_problem(x, projections, dt_weight, dt_bias, A, D, route_steps, steps, rounds, [&](const auto& problem) {
        const Gradients gradients{Image(grad_y),
                                  Image(grad_x),
                                  sums ? static_cast<float*>(sums->data) : nullptr,
                                  sums ? int(sums->size[2]) : kTile,
                                  static_cast<float*>(grad_projections->data),
                                  static_cast<float*>(grad_parameters->data)};
        return run(stream, problem, Rounds(maps, problem), gradients, {int(parts), int(groups), split != 0, 0, 0}, warps);
    });
}
