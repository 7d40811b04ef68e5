// SS2D, backward. Overview: ss2d.h.
//
// The step sizes and the states between tiles of the forward pass along a route are recomputed and kept; the other
// states are recomputed tile by tile on the way back. With g the gradient of y and h that of the states,
// h_t = g_t C_t + a_{t+1} h_{t+1}, where a = exp(step A).
#include "ss2d.h"

namespace {

constexpr float kLn2 = 0.693147180559945309f;

// Sums of the gradients of parameters of one task, for a block of channels: [route][rank + 1 + states], then that of D.
struct ParameterSums {
    Channels* first;
    Channels* weight(const Route& route, int j) const { return first + j * (route.rank + 1 + route.states); }
    Channels* bias(const Route& route, int j) const { return weight(route, j) + route.rank; }
    Channels* A(const Route& route, int j) const { return bias(route, j) + 1; }
    static int64_t size(const Problem& problem) { return kRoutes * (problem.rank() + 1 + problem.states()) + 1; }
};

// Thread-local memory: for a block of channels, for one of its routes, and for a tile of the route.
struct Memory {
    Channels *x, *g, *grad_x;                // [length], in raster order
    Channels *parameters;                    // Route's
    Channels *step;                          // [length rounded up to tiles], in route order
    Channels *start;                         // [tile][states]: the states before each tile
    Channels *carry;                         // [states]: gradient of the states after a tile
    Channels *x_tile, *g_tile;               // [kTile] as all below
    Channels *drive, *decay, *state, *grad_state;
    Channels *grad_drive, *grad_step;        // of step u; of the step, then of it before the softplus
    Channels *product;
    Vec* columns;                            // [rank + 2 states][kTile] floats: gradient of the projections

    static int64_t column_vectors(const Problem& problem) {
        return (problem.columns() + kLanes - 1) / kLanes * kTile;
    }
    static int64_t size(const Problem& problem) {
        const int64_t states = problem.states(), tiles = problem.tiles();
        const int64_t of_route = Route::scratch(problem) + tiles * (kTile + states) + states;
        return (3 * problem.length() + of_route + 9 * kTile) * kParts + column_vectors(problem);
    }
    Memory(const Problem& problem, Scratch& scratch) {
        const int64_t length = problem.length(), states = problem.states(), tiles = problem.tiles();
        x = take(scratch, length), g = take(scratch, length), grad_x = take(scratch, length);
        parameters = take(scratch, Route::scratch(problem));
        step = take(scratch, tiles * kTile);
        start = take(scratch, tiles * states);
        carry = take(scratch, states);
        x_tile = take(scratch, kTile), g_tile = take(scratch, kTile);
        drive = take(scratch, kTile), decay = take(scratch, kTile), state = take(scratch, kTile);
        grad_state = take(scratch, kTile), grad_drive = take(scratch, kTile), grad_step = take(scratch, kTile);
        product = take(scratch, kTile);
        columns = scratch.take(column_vectors(problem));
    }
};

// One state over a tile: all its values, from the one before the tile on. `b` belongs to raster position 0.
VK_INLINE Channels recur(const Route& route, const Tile& tile, const float* b, Channels h, const Memory& memory) {
    for (int64_t t = 0; t < tile.count; ++t) {
        const float factor = b[tile.position[t] * route.by_position];
        VK_PARTS h.part[k] = memory.decay[t].part[k] * h.part[k] + memory.drive[t].part[k] * factor;
        memory.state[t] = h;
    }
    return h;
}

// target[t] = the sum of product[t] over channels.
VK_INLINE void sum_channels(const Channels* product, int64_t count, float* target) {
    for (int64_t t = 0; t < count; t += kLanes) {
        Vec rows[kLanes];
        for (int i = 0; i < kLanes; ++i) {
            rows[i] = product[t + i].part[0];
            for (int k = 1; k < kParts; ++k) rows[i] += product[t + i].part[k];
        }
        store(target + t, sums(rows));
    }
}

void recompute(const Route& route, const Memory& memory) {
    for (int64_t n = 0; n < route.states; ++n) memory.start[n] = {};
    for (int64_t begin = 0, number = 0; begin < route.length; begin += kTile, ++number) {
        const Tile tile(route, begin);
        Channels* step = memory.step + begin;
        step_sizes(route, tile, step);
        if (begin + kTile >= route.length) break;  // the last states are not needed
        for (int64_t t = 0; t < tile.count; ++t)
            VK_PARTS memory.drive[t].part[k] = step[t].part[k] * memory.x[tile.position[t]].part[k];
        const Channels* start = memory.start + number * route.states;
        for (int64_t n = 0; n < route.states; ++n) {
            decays(step, route.rate[n], tile.padded, memory.decay);
            const float* b = route.projections + route.rank + n;
            memory.start[(number + 1) * route.states + n] = recur(route, tile, b, start[n], memory);
        }
    }
}

// Gradients through state n over a tile: of B, C and A, and contributions to those of drive and step.
void state_backward(const Route& route, const Tile& tile, int64_t n, const Channels* step, const Channels& start,
                    const Memory& memory, Channels* grad_A) {
    float* columns = reinterpret_cast<float*>(memory.columns);
    const float* b = route.projections + route.rank + n;
    const float* c = b + route.states;
    decays(step, route.rate[n], tile.padded, memory.decay);
    recur(route, tile, b, start, memory);

    Channels decay, h = memory.carry[n];
    VK_PARTS decay.part[k] = broadcast(1.0f);
    for (int64_t t = tile.count; t-- > 0;) {
        const float factor = c[tile.position[t] * route.by_position];
        VK_PARTS h.part[k] = decay.part[k] * h.part[k] + memory.g_tile[t].part[k] * factor;
        memory.grad_state[t] = h;
        decay = memory.decay[t];
    }
    VK_PARTS memory.carry[n].part[k] = decay.part[k] * h.part[k];

    Channels A = route.rate[n], before = start, sum = {};
    VK_PARTS A.part[k] *= kLn2;
    for (int64_t t = 0; t < tile.count; ++t) {
        const float factor = b[tile.position[t] * route.by_position];
        VK_PARTS {
            const Vec grad = memory.grad_state[t].part[k];
            const Vec grad_exponent = grad * memory.decay[t].part[k] * before.part[k];  // of step A
            sum.part[k] += grad_exponent * step[t].part[k];
            memory.grad_step[t].part[k] += grad_exponent * A.part[k];
            memory.grad_drive[t].part[k] += grad * factor;
            memory.grad_state[t].part[k] = grad * memory.drive[t].part[k];  // of B, in the memory of that of the state
            before.part[k] = memory.state[t].part[k];
            memory.state[t].part[k] *= memory.g_tile[t].part[k];  // of C, in the memory of the state
        }
    }
    VK_PARTS grad_A->part[k] += sum.part[k];
    sum_channels(memory.grad_state, tile.count, columns + (route.rank + n) * kTile);
    sum_channels(memory.state, tile.count, columns + (route.rank + route.states + n) * kTile);
}

// From the gradients of drive and step to that of x, and to that of the step before the softplus.
void step_backward(const Tile& tile, const Channels* step, const Memory& memory, Channels* grad_bias) {
    Channels sum = {};
    const Vec* flat = step->part;
    Vec* slope = memory.product->part;
    for (int64_t first = 0; first < tile.padded * kParts; first += kPack)
        store_pack(slope + first, softplus_slope(load_pack(flat + first)));
    for (int64_t t = 0; t < tile.count; ++t) {
        Channels& grad_x = memory.grad_x[tile.position[t]];
        VK_PARTS {
            const Vec grad_drive = memory.grad_drive[t].part[k];
            grad_x.part[k] += grad_drive * step[t].part[k];
            const Vec grad = memory.grad_step[t].part[k] + grad_drive * memory.x_tile[t].part[k];
            const Vec raw = grad * memory.product[t].part[k];
            memory.grad_step[t].part[k] = raw;
            sum.part[k] += raw;
        }
    }
    VK_PARTS grad_bias->part[k] += sum.part[k];
}

// Ranks [r, r + Count): gradient of dt_weight, and that of the low-rank step sizes from the transposed `rows`.
template <int Count>
VK_INLINE void rank_backward(const Route& route, const Tile& tile, int64_t r, const Vec* rows, const Memory& memory,
                             Channels* grad_weight) {
    Channels sum[Count];
#pragma GCC unroll 4
    for (int i = 0; i < Count; ++i) sum[i] = grad_weight[r + i];
    for (int64_t t = 0; t < tile.count; ++t) {
        const float* low = route.projections + tile.position[t] * route.by_position + r;
#pragma GCC unroll 4
        for (int i = 0; i < Count; ++i) VK_PARTS sum[i].part[k] += memory.grad_step[t].part[k] * low[i];
    }
#pragma GCC unroll 4
    for (int i = 0; i < Count; ++i) grad_weight[r + i] = sum[i];

    const float* weight = reinterpret_cast<const float*>(route.weight + r);
    float* columns = reinterpret_cast<float*>(memory.columns) + r * kTile;
    for (int64_t t = 0; t < tile.count; t += kLanes, rows += kBlock) {
        Vec total[Count] = {};
        for (int channel = 0; channel < kBlock; ++channel)
#pragma GCC unroll 4
            for (int i = 0; i < Count; ++i) total[i] += rows[channel] * weight[i * kBlock + channel];
#pragma GCC unroll 4
        for (int i = 0; i < Count; ++i) store(columns + i * kTile + t, total[i]);
    }
}

void ranks_backward(const Route& route, const Tile& tile, const Memory& memory, Channels* grad_weight) {
    Vec* rows = memory.product->part;  // [positions / kLanes][kBlock]: a vector holds one channel
    for (int64_t t = 0; t < tile.count; t += kLanes)
        VK_PARTS {
            Vec* square = rows + t * kParts + k * kLanes;
            for (int i = 0; i < kLanes; ++i) square[i] = memory.grad_step[t + i].part[k];
            transpose(square);
        }
    int64_t r = 0;
    for (; r + 4 <= route.rank; r += 4) rank_backward<4>(route, tile, r, rows, memory, grad_weight);
    for (; r + 2 <= route.rank; r += 2) rank_backward<2>(route, tile, r, rows, memory, grad_weight);
    if (r < route.rank) rank_backward<1>(route, tile, r, rows, memory, grad_weight);
}

// Add the columns of a tile to the rows (position) of the gradient of the projections.
void scatter_columns(const Route& route, const Tile& tile, const Memory& memory, float* grad_projections) {
    const int64_t columns = route.rank + 2 * route.states;
    const float* source = reinterpret_cast<const float*>(memory.columns);
    for (int64_t first = 0; first < columns; first += kLanes)
        for (int64_t t = 0; t < tile.count; t += kLanes) {
            Vec rows[kLanes];
            for (int i = 0; i < kLanes; ++i) rows[i] = load(source + (first + i) * kTile + t);
            transpose(rows);
            for (int64_t i = 0; i < minimum<int64_t>(kLanes, tile.count - t); ++i) {
                float* target = grad_projections + tile.position[t + i] * route.by_position + first;
                if (first + kLanes <= columns) {
                    store(target, load(target) + rows[i]);
                } else {
                    const float* lanes = reinterpret_cast<const float*>(rows + i);
                    for (int64_t q = 0; q < columns - first; ++q) target[q] += lanes[q];
                }
            }
        }
}

void route_backward(const Route& route, int index, const Memory& memory, float* grad_projections,
                    const ParameterSums& sums) {
    recompute(route, memory);
    for (int64_t n = 0; n < route.states; ++n) memory.carry[n] = {};
    for (int64_t number = (route.length + kTile - 1) / kTile; number-- > 0;) {
        const Tile tile(route, number * kTile);
        const Channels* step = memory.step + number * kTile;
        for (int64_t t = 0; t < tile.count; ++t) {
            const Channels x = memory.x[tile.position[t]];
            memory.x_tile[t] = x;
            memory.g_tile[t] = memory.g[tile.position[t]];
            memory.grad_drive[t] = memory.grad_step[t] = {};
            VK_PARTS memory.drive[t].part[k] = step[t].part[k] * x.part[k];
        }
        for (int64_t n = 0; n < route.states; ++n)
            state_backward(route, tile, n, step, memory.start[number * route.states + n], memory,
                           sums.A(route, index) + n);
        step_backward(tile, step, memory, sums.bias(route, index));
        ranks_backward(route, tile, memory, sums.weight(route, index));
        scatter_columns(route, tile, memory, grad_projections);
    }
}

bool backward_block(const Problem& problem, const Block& block, const View& grad_y, const View& grad_x,
                    float* grad_projections, const ParameterSums& sums) {
    Scratch scratch(Memory::size(problem));
    if (!scratch) return false;
    const Memory memory(problem, scratch);
    load_map(problem.x, block, memory.x);
    load_map(grad_y, block, memory.g);
    const Channels skip = skip_of(problem, block);
    Channels& grad_D = sums.first[ParameterSums::size(problem) - 1];
    for (int64_t p = 0; p < problem.length(); ++p) VK_PARTS {
        memory.grad_x[p].part[k] = skip.part[k] * memory.g[p].part[k];
        grad_D.part[k] += memory.g[p].part[k] * memory.x[p].part[k];
    }
    for (int j = 0; j < kRoutes; ++j)
        route_backward(Route(problem, block, j, memory.parameters), j, memory, grad_projections + j * problem.columns(),
                       sums);
    store_map(grad_x, block, memory.grad_x);
    return true;
}

}  // namespace

// A task handles some images and some blocks of channels, as the leading sizes of its two outputs say:
// grad_projections (parts of the blocks, batch, length, route, rank + 2 states) and
// grad_parameters (parts of the batch, block, ParameterSums::size, kBlock), both initially zero, to be summed.
VK_ENTRY(ss2d_backward)
(const View* grad_y, const View* x, const View* projections, const View* dt_weight, const View* dt_bias, const View* A,
 const View* D, int64_t step0, int64_t step1, int64_t step2, int64_t step3, const View* grad_x,
 const View* grad_projections, const View* grad_parameters) {
    const Problem problem{*x, *projections, *dt_weight, *dt_bias, *A, *D, {step0, step1, step2, step3}};
    const int64_t batch = x->size[0], blocks = problem.blocks();
    const int64_t batch_parts = grad_parameters->size[0], block_parts = grad_projections->size[0];
    return parallel_for(batch_parts * block_parts, [&](int64_t task) {
        const int64_t i = task / block_parts, j = task % block_parts;
        for (int64_t image = batch * i / batch_parts; image < batch * (i + 1) / batch_parts; ++image)
            for (int64_t index = blocks * j / block_parts; index < blocks * (j + 1) / block_parts; ++index)
                if (!backward_block(problem, block_of(problem, image, index), *grad_y, *grad_x,
                                    at<float>(*grad_projections, j, image),
                                    {reinterpret_cast<Channels*>(at<float>(*grad_parameters, i, index))}))
                    return false;
        return true;
    });
}

// total = the sum over the leading dimension of parts (parts, size), in this order for any number of threads.
VK_ENTRY(ss2d_add_up)(const View* parts, const View* total) {
    constexpr int64_t kChunk = 4096;
    const int64_t size = parts->size[1];
    return parallel_for((size + kChunk - 1) / kChunk, [&](int64_t chunk) {
        float* target = at<float>(*total, 0);
        const int64_t begin = chunk * kChunk, end = minimum(begin + kChunk, size);
        for (int64_t i = begin; i < end; ++i) target[i] = 0;
        for (int64_t part = 0; part < parts->size[0]; ++part) {
            const float* source = at<const float>(*parts, part);
            for (int64_t i = begin; i < end; ++i) target[i] += source[i];
        }
        return true;
    });
}
