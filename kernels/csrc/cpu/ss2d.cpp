// SS2D, forward. Overview: ss2d.h.
#include "ss2d.h"

namespace {

// The recurrence of `Count` states over a tile: y += C h. They stay in registers.
template <int Count>
VK_INLINE void recur(const Route& route, const Tile& tile, int64_t first, const Channels* x, const Channels* step,
                     const Channels* decay, Channels* state, Channels* y) {
    Channels h[Count];
#pragma GCC unroll 4
    for (int n = 0; n < Count; ++n) h[n] = state[n];
    const float* b = route.projections + route.rank + first;
    const float* c = b + route.states;
    for (int64_t t = 0; t < tile.count; ++t) {
        const int64_t p = tile.position[t], row = p * route.by_position;
        VK_PARTS {
            const Vec drive = step[t].part[k] * x[p].part[k];
            Vec out = y[p].part[k];
#pragma GCC unroll 4
            for (int n = 0; n < Count; ++n) {
                h[n].part[k] = decay[n * kTile + t].part[k] * h[n].part[k] + drive * b[row + n];
                out += h[n].part[k] * c[row + n];
            }
            y[p].part[k] = out;
        }
    }
#pragma GCC unroll 4
    for (int n = 0; n < Count; ++n) state[n] = h[n];
}

void forward_route(const Route& route, const Channels* x, Channels* y, Channels* memory) {
    constexpr int kStates = 4;  // in registers together
    Channels* step = memory;
    Channels* decay = step + kTile;
    Channels* state = decay + kStates * kTile;
    for (int64_t n = 0; n < route.states; ++n) state[n] = {};
    for (int64_t begin = 0; begin < route.length; begin += kTile) {
        const Tile tile(route, begin);
        step_sizes(route, tile, step);
        int64_t n = 0;
        for (; n + kStates <= route.states; n += kStates) {
            for (int i = 0; i < kStates; ++i) decays(step, route.rate[n + i], tile.padded, decay + i * kTile);
            recur<kStates>(route, tile, n, x, step, decay, state + n, y);
        }
        for (; n < route.states; ++n) {
            decays(step, route.rate[n], tile.padded, decay);
            recur<1>(route, tile, n, x, step, decay, state + n, y);
        }
    }
}

bool forward_block(const Problem& problem, const Block& block, const View& out) {
    const int64_t length = problem.length(), for_tile = 5 * kTile + problem.states();
    Scratch scratch((2 * length + Route::scratch(problem) + for_tile) * kParts);
    if (!scratch) return false;
    Channels* x = take(scratch, length);
    Channels* y = take(scratch, length);
    Channels* parameters = take(scratch, Route::scratch(problem));
    Channels* memory = take(scratch, for_tile);
    load_map(problem.x, block, x);
    const Channels skip = skip_of(problem, block);
    for (int64_t p = 0; p < length; ++p) VK_PARTS y[p].part[k] = skip.part[k] * x[p].part[k];
    for (int j = 0; j < kRoutes; ++j) forward_route(Route(problem, block, j, parameters), x, y, memory);
    store_map(out, block, y);
    return true;
}

}  // namespace

VK_ENTRY(ss2d_forward)
(const View* x, const View* projections, const View* dt_weight, const View* dt_bias, const View* A, const View* D,
 int64_t step0, int64_t step1, int64_t step2, int64_t step3, const View* y) {
    const Problem problem{*x, *projections, *dt_weight, *dt_bias, *A, *D, {step0, step1, step2, step3}};
    const int64_t blocks = problem.blocks();
    return parallel_for(x->size[0] * blocks, [&](int64_t task) {
        return forward_block(problem, block_of(problem, task / blocks, task % blocks), *y);
    });
}
