// SS2D, forward, and the states from which parts of a route can be computed in parallel. Overview: ss2d.cuh.
//
// One block computes all routes of 16 channels of an image in turn, and sums their outputs in float32, in
// shared memory if the image fits. If there are few images, and large ones, each round of a route has a block of its
// own instead: the states between rounds are computed in advance, and the routes are launched in turn.
#include "ss2d.cuh"

namespace {

// Registers suffice for 8 positions of one state, or 4 of several. Maps of 7 x 7 and multiples of it are divided into
// segments of 7, for which there are kernels without an eighth position.
constexpr int kForwardSteps = 8;
constexpr int kForwardThreads = 448;

// Sums of the outputs of the routes.
struct Sums {
    float* data;  // (batch, length, pitch); null if it is in shared memory, (length, kTile)
    int pitch;
};

struct Routes {
    int first, last;
    bool split;  // each round has a block
};

// Outputs of all states for one lane, and the states at the end of the round.
template <class P, int kSteps>
__device__ __forceinline__ void scan_round(const Work<P, kSteps>& work, const Rounds& rounds, int round, bool split,
                                           float* shared, int& turn, float (&y)[kSteps][4]) {
    const Lane lane = work.lane;
    const int states = work.problem.states(), warps = blockDim.x / 32;
    float* const carried = shared + 2 * warps * 2 * kTile;  // (2, states, kTile)
    float step[kSteps][4], drive[kSteps][4];
    work.step_sizes(step);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
        work.load_x(i, drive[i]);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            drive[i][c] *= step[i][c];
            y[i][c] = 0;
        }
    }
#pragma unroll 1
    for (int n = 0; n < states; ++n, ++turn) {
        float B[kSteps], C[kSteps], input[kSteps][4], decay[kSteps][4];
        Map map[4];
        work.load_couplings(n, B, C);
        inputs(drive, B, input);
        local_maps(work, n, step, input, decay, map);
        float* const published = shared + turn % 2 * warps * 2 * kTile + 4 * lane.q;  // (warps, 2, kTile)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            map[c] = compose<true>(map[c], lane.g);
            if (lane.g == 7) {
                published[lane.warp * 2 * kTile + c] = map[c].factor;
                published[(lane.warp * 2 + 1) * kTile + c] = map[c].offset;
            }
            map[c] = exclude<true>(map[c], lane.g);
        }
        __syncthreads();
        float state[4] = {};
        if (split)
            load_four(rounds.at(1, work.batch, work.route, round, n, work.channel), true, state);
        else if (round > 0)
            load_four(carried + (round % 2 * states + n) * kTile + 4 * lane.q, true, state);
        for (int warp = 0; warp < lane.warp; ++warp)
            apply(published + warp * 2 * kTile, published + (warp * 2 + 1) * kTile, state);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            float h = map[c].factor * state[c] + map[c].offset;
#pragma unroll
            for (int i = 0; i < kSteps; ++i) {
                h = decay[i][c] * h + input[i][c];
                y[i][c] += h * C[i];
            }
            state[c] = h;
        }
        if (!split && lane.warp == warps - 1 && lane.g == 7)
            store_four(carried + ((round + 1) % 2 * states + n) * kTile + 4 * lane.q, state);
    }
}

// Adds D x, of all routes.
template <class P, int kSteps>
__device__ __forceinline__ void add_skip(const Work<P, kSteps>& work, float (&y)[kSteps][4]) {
    float skip[4], x[4];
    work.load_skip(skip);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
        work.load_x(i, x);
#pragma unroll
        for (int c = 0; c < 4; ++c) y[i][c] += skip[c] * x[c];
    }
}

template <int kSteps>
__device__ __forceinline__ void add_sums(const float* total, int pitch, const Segment<kSteps>& segment,
                                         float (&y)[kSteps][4]) {
    float sum[kSteps][4];
    load_segment(total, pitch, segment, true, sum);
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
#pragma unroll
        for (int c = 0; c < 4; ++c) y[i][c] += sum[i][c];
}

template <class P, int kSteps>
__global__ void __launch_bounds__(kForwardThreads)
    forward(const __grid_constant__ P problem, Rounds rounds, Sums sums, Routes routes, Image out) {
    VK_DYNAMIC_SHARED(float, shared);
    int block = blockIdx.x;
    const int first_round = routes.split ? block % problem.rounds : 0;
    const int last_round = routes.split ? first_round + 1 : problem.rounds;
    if (routes.split) block /= problem.rounds;
    const int tile = block % problem.tiles(), batch = block / problem.tiles();
    const int warps = blockDim.x / 32, states = problem.states();
    const int in_tile = threadIdx.x % 4 * 4, channel = tile * kTile + in_tile;
    float* total = sums.data ? sums.data + int64_t(batch) * problem.length * sums.pitch + channel
                             : shared + (2 * warps * 2 + 2 * states) * kTile + in_tile;

    int turn = 0;
    for (int route = routes.first; route < routes.last; ++route)
        for (int round = first_round; round < last_round; ++round) {
            const Work<P, kSteps> work(problem, batch, route, tile, round);
            float y[kSteps][4];
            scan_round(work, rounds, round, routes.split, shared, turn, y);
            if (route == 0)
                add_skip(work, y);
            else
                add_sums(total, sums.pitch, work.segment, y);
            if (route < kRoutes - 1)
                store_segment(total, sums.pitch, work.segment, y);
            else if (work.exists)
                out.store(batch, work.segment, channel, y);
        }
}

// The map of each round, and of the gradients if kGradients: G before the round <- factor G after it + offset.
template <class P, int kSteps, bool kGradients>
__global__ void __launch_bounds__(kForwardThreads)
    summarize(const __grid_constant__ P problem, Rounds rounds, Image grad_y) {
    VK_DYNAMIC_SHARED(float, shared);  // (2, warps, 3, kTile)
    int block = blockIdx.x;
    const int round = block % problem.rounds;
    block /= problem.rounds;
    const int tile = block % problem.tiles();
    block /= problem.tiles();
    const Work<P, kSteps> work(problem, block / kRoutes, block % kRoutes, tile, round);
    const Lane lane = work.lane;
    const int warps = blockDim.x / 32;
    float step[kSteps][4], drive[kSteps][4], grad[kGradients ? kSteps : 1][4];
    work.step_sizes(step);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
        work.load_x(i, drive[i]);
#pragma unroll
        for (int c = 0; c < 4; ++c) drive[i][c] *= step[i][c];
    }
    if constexpr (kGradients) grad_y.load(work.batch, work.segment, work.channel, work.exists, grad);
#pragma unroll 1
    for (int n = 0; n < problem.states(); ++n) {
        float B[kSteps], C[kSteps], input[kSteps][4], decay[kSteps][4];
        Map map[4];
        work.load_couplings(n, B, C);
        inputs(drive, B, input);
        local_maps(work, n, step, input, decay, map);
        float* const published = shared + n % 2 * warps * 3 * kTile + 4 * lane.q;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const float factor = map[c].factor;
            map[c] = compose<true>(map[c], lane.g);
            if (lane.g == 7) {
                published[lane.warp * 3 * kTile + c] = map[c].factor;
                published[(lane.warp * 3 + 1) * kTile + c] = map[c].offset;
            }
            if (!kGradients) continue;
            float behind = 0;
#pragma unroll
            for (int i = kSteps - 1; i >= 0; --i) behind = decay[i][c] * (grad[i][c] * C[i] + behind);
            const Map gradient = compose<false>(Map{factor, behind}, lane.g);
            if (lane.g == 0) published[(lane.warp * 3 + 2) * kTile + c] = gradient.offset;
        }
        __syncthreads();
        if (lane.warp > 0 || lane.g > 0) continue;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            Map whole{1, 0};
            float behind = 0;
            for (int warp = 0; warp < warps; ++warp) {
                Map next{published[warp * 3 * kTile + c], published[(warp * 3 + 1) * kTile + c]};
                if (kGradients) behind += whole.factor * published[(warp * 3 + 2) * kTile + c];
                next.follow(whole.factor, whole.offset);
                whole = next;
            }
            const int channel = work.channel + c;
            *rounds.at(0, work.batch, work.route, round, n, channel) = whole.factor;
            *rounds.at(1, work.batch, work.route, round, n, channel) = whole.offset;
            if (kGradients) *rounds.at(2, work.batch, work.route, round, n, channel) = behind;
        }
    }
}

constexpr int kThreads = 256;

// Replaces offsets by the states before each round, and those of gradients by the gradients after it.
__global__ void __launch_bounds__(kThreads) carry(Rounds rounds, int64_t routes, bool gradients) {
    const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x, row = int64_t(rounds.states) * rounds.pitch;
    if (index >= routes * row) return;
    float* const first = rounds.data + index / row * rounds.rounds * row + index % row;
    float state = 0, gradient = 0;
    for (int round = 0; round < rounds.rounds; ++round) {
        float* const factor = first + round * row;
        float* const offset = factor + rounds.kind;
        const float before = state;
        state = *factor * state + *offset;
        *offset = before;
    }
    for (int round = rounds.rounds - 1; gradients && round >= 0; --round) {
        float* const factor = first + round * row;
        float* const offset = factor + 2 * rounds.kind;
        const float behind = gradient;
        gradient = *factor * gradient + *offset;
        *offset = behind;
    }
}

template <int kSteps, class P>
const char* run_forward(void* stream, const P& problem, const Rounds& rounds, const View* sums, const View* y,
                        int64_t warps, bool split) {
    const Sums target{sums ? static_cast<float*>(sums->data) : nullptr, sums ? int(sums->size[2]) : kTile};
    size_t shared = (2 * warps * 2 + 2 * problem.states()) * kTile * sizeof(float);
    if (!sums) shared += size_t(problem.length) * kTile * sizeof(float);
    const unsigned blocks = problem.batch * problem.tiles(), threads = unsigned(32 * warps);
    const Image out(y);
    if (!split)
        return launch(forward<P, kSteps>, blocks, threads, shared, stream, problem, rounds, target,
                      Routes{0, kRoutes, false}, out);
    const char* error = nullptr;
    for (int route = 0; route < kRoutes && !error; ++route)
        error = launch(forward<P, kSteps>, blocks * problem.rounds, threads, shared, stream, problem, rounds,
                       target, Routes{route, route + 1, true}, out);
    return error;
}

}  // namespace

// x and y (batch, length, dim), their channels adjacent, in aligned fours; the rank even; projections of the type of x;
// the other inputs float32, all contiguous. sums: null, or (batch, length, 16 tiles) float32 in place of shared memory.
// maps: null, or those between rounds if each of these is to have a block.
VK_ENTRY(ss2d_forward)
(void* stream, const View* x, const View* projections, const View* dt_weight, const View* dt_bias, const View* A,
 const View* D, int64_t step0, int64_t step1, int64_t step2, int64_t step3, int64_t warps, int64_t steps, int64_t rounds,
 const View* sums, const View* maps, const View* y) {
    const int64_t route_steps[kRoutes] = {step0, step1, step2, step3};
    return for_problem(x, projections, dt_weight, dt_bias, A, D, route_steps, steps, rounds, [&](const auto& problem) {
        using P = std::decay_t<decltype(problem)>;
        constexpr bool kOneState = P::kKnownStates == 1;
        constexpr int kMost = kOneState ? kForwardSteps : kForwardSteps / 2, kFewer = kOneState ? kMost - 1 : kMost;
        auto run = steps > kFewer ? run_forward<kMost, P> : run_forward<kFewer, P>;
        return run(stream, problem, Rounds(maps, problem), sums, y, warps, maps != nullptr);
    });
}

// Fills maps, (kinds, batch, 4, rounds, states, 16 tiles) float32: two kinds, or three with the gradient of y.
VK_ENTRY(ss2d_maps)
(void* stream, const View* x, const View* projections, const View* dt_weight, const View* dt_bias, const View* A,
 const View* D, int64_t step0, int64_t step1, int64_t step2, int64_t step3, int64_t warps, int64_t steps, int64_t rounds,
 const View* grad_y, const View* maps) {
    const int64_t route_steps[kRoutes] = {step0, step1, step2, step3};
    return for_problem(x, projections, dt_weight, dt_bias, A, D, route_steps, steps, rounds, [&](const auto& problem) {
        using P = std::decay_t<decltype(problem)>;
        const Rounds between(maps, problem);
        const int64_t routes = int64_t(problem.batch) * kRoutes, blocks = routes * problem.tiles() * problem.rounds;
        auto kernel = grad_y ? summarize<P, kForwardSteps / 2, true> : summarize<P, kForwardSteps, false>;
        const char* error = launch(kernel, unsigned(blocks), unsigned(32 * warps), 2 * warps * 3 * kTile * sizeof(float),
                                   stream, problem, between, Image(grad_y ? grad_y : x));
        if (error) return error;
        const int64_t elements = routes * problem.states() * between.pitch;
        return launch(carry, unsigned((elements + kThreads - 1) / kThreads), kThreads, 0, stream, between, routes,
                      grad_y != nullptr);
    });
}
