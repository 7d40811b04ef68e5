// Neighborhood attention of dilation 1. Definition: ../../vision_kernels/neighborhood_attention.
//
// A task is a tile of queries of one head. Queries side by side in a row see almost the same window, so a group of them
// is multiplied with the union of their windows as in a matrix product, and what lies outside the window of each is
// dropped in its softmax. Logits of a group are kept as `units`: vectors over adjacent columns, `row_vectors` of them
// for each row of the window.
#include "neighborhood.h"

namespace {

constexpr float kMinusInfinity = -__builtin_inff();

template <class T>
VK_INLINE void load_position(const T* source, int64_t by_dim, int64_t dim, Vec* target) {
    float* lanes = reinterpret_cast<float*>(target);
    int64_t d = 0;
    if (by_dim == 1)
        for (; d + kLanes <= dim; d += kLanes) store(lanes + d, load(source + d));
    const int64_t padded = round_up(dim, kLanes);
    for (; d < dim; ++d) lanes[d] = to_float(source[d * by_dim]);
    for (; d < padded; ++d) lanes[d] = 0;
}

template <class T>
VK_INLINE void store_position(T* target, int64_t by_dim, int64_t dim, const Vec* source) {
    const float* lanes = reinterpret_cast<const float*>(source);
    int64_t d = 0;
    if (by_dim == 1)
        for (; d + kLanes <= dim; d += kLanes) store(target + d, load(lanes + d));
    for (; d < dim; ++d) assign(target + d * by_dim, lanes[d]);
}

// The window of a tile as (row, column, dim_vectors).
template <class T>
void load_window(const View& view, const Problem& problem, const Tile& tile, Vec* target) {
    for (int64_t row = 0; row < tile.rows.count; ++row) {
        const T* source = at<const T>(view, tile.batch, tile.head, tile.rows.first + row);
        source += tile.columns.first * view.stride[3];
        for (int64_t column = 0; column < tile.columns.count; ++column, target += problem.dim_vectors)
            load_position(source + column * view.stride[3], view.stride[4], problem.dim, target);
    }
}

// The window of a tile as (row, dim, pitch). `block` holds kLanes positions.
template <class T>
void load_transposed(const View& view, const Problem& problem, const Tile& tile, Vec* block, float* target) {
    const int64_t pitch = tile.pitch(problem), dim_pitch = problem.dim_vectors * kLanes;
    const float* lanes = reinterpret_cast<const float*>(block);
    for (int64_t row = 0; row < tile.rows.count; ++row, target += problem.dim * pitch) {
        const T* source = at<const T>(view, tile.batch, tile.head, tile.rows.first + row);
        source += tile.columns.first * view.stride[3];
        for (int64_t column = 0; column < pitch; column += kLanes) {
            const int count = int(minimum<int64_t>(kLanes, tile.columns.count - column));
            for (int i = 0; i < kLanes; ++i) {
                const int64_t dim = i < count ? problem.dim : 0;
                if (dim == 0)
                    for (int64_t d = 0; d < problem.dim_vectors; ++d) block[i * problem.dim_vectors + d] = Vec{};
                else
                    load_position(source + (column + i) * view.stride[3], view.stride[4], dim,
                                  block + i * problem.dim_vectors);
            }
            const int kept = int(minimum<int64_t>(kLanes, pitch - column));
            for (int64_t d = 0; d < problem.dim; ++d)
                for (int i = 0; i < kept; ++i) target[d * pitch + column + i] = lanes[i * dim_pitch + d];
        }
    }
}

template <class T>
VK_INLINE void load_group(const View& view, const Problem& problem, const Tile& tile, const Group& group, Vec* target) {
    const T* source = at<const T>(view, tile.batch, tile.head, group.row) + group.column * view.stride[3];
    for (int q = 0; q < group.count; ++q)
        load_position(source + q * view.stride[3], view.stride[4], problem.dim, target + q * problem.dim_vectors);
    for (int64_t i = group.count * problem.dim_vectors; i < problem.group * problem.dim_vectors; ++i) target[i] = Vec{};
}

template <class T>
VK_INLINE void store_group(const View& view, const Problem& problem, const Tile& tile, const Group& group,
                           const Vec* source) {
    T* target = at<T>(view, tile.batch, tile.head, group.row) + group.column * view.stride[3];
    for (int q = 0; q < group.count; ++q)
        store_position(target + q * view.stride[3], view.stride[4], problem.dim, source + q * problem.dim_vectors);
}

// Inputs of the softmax: the bias times log2(e), for exponentials of base 2, and the lanes inside a window.
struct Tables {
    float* bias;
    float* inside;
    int64_t* unit_offset;  // of a unit from the first one, in a transposed window

    Tables(const View* view, const Problem& problem, const Tile& tile, Scratch& scratch) {
        bias = reinterpret_cast<float*>(scratch.take(problem.bias_vectors()));
        inside = reinterpret_cast<float*>(scratch.take(2 * problem.row_vectors + 1));
        unit_offset = reinterpret_cast<int64_t*>(scratch.take(2 * problem.units / kLanes + 1));
        for (int64_t i = 0; i < problem.bias_vectors() * kLanes; ++i) bias[i] = 0;
        for (int64_t i = 0; view && i < problem.bias_rows(); ++i)
            for (int64_t j = 0; j < problem.bias_rows(); ++j)
                bias[i * problem.bias_pitch + problem.group - 1 + j] =
                    *(at<const float>(*view, tile.head, i, j)) * kLog2E;
        for (int64_t i = 0; i < 2 * problem.row_vectors * kLanes; ++i)
            inside[i] = i >= problem.group - 1 && i < problem.group - 1 + problem.window;
        for (int64_t u = 0; u < problem.units; ++u)
            unit_offset[u] = u / problem.row_vectors * problem.dim * tile.pitch(problem) +
                             u % problem.row_vectors * kLanes;
    }
    static int64_t vectors(const Problem& problem) {
        return problem.bias_vectors() + 2 * problem.row_vectors + 1 + 2 * problem.units / kLanes + 1;
    }
};

// out[q][u] = <vectors[q], unit u> for Queries vectors and Units units.
template <int Queries, int Units>
VK_INLINE void multiply(const float* vectors, int64_t vector_pitch, const float* window, const int64_t* unit_offset,
                        int64_t pitch, int64_t dim, Vec* out, int64_t out_pitch) {
    Vec total[Queries][Units] = {};
    const float* unit[Units];
    for (int u = 0; u < Units; ++u) unit[u] = window + unit_offset[u];
    for (int64_t d = 0; d < dim; ++d) {
        Vec x[Units];
#pragma GCC unroll 8
        for (int u = 0; u < Units; ++u) x[u] = load(unit[u] + d * pitch);
#pragma GCC unroll 8
        for (int q = 0; q < Queries; ++q) {
            const Vec factor = broadcast(vectors[q * vector_pitch + d]);
#pragma GCC unroll 8
            for (int u = 0; u < Units; ++u) total[q][u] += factor * x[u];
        }
    }
    for (int q = 0; q < Queries; ++q)
        for (int u = 0; u < Units; ++u) out[q * out_pitch + u] = total[q][u];
}

template <int Queries, int Units>
void multiply_all(const float* vectors, const float* window, const int64_t* unit_offset, int64_t pitch,
                  const Problem& problem, Vec* out) {
    const int64_t vector_pitch = problem.dim_vectors * kLanes;
    int64_t u = 0;
    for (; u + Units <= problem.units; u += Units)
        multiply<Queries, Units>(vectors, vector_pitch, window, unit_offset + u, pitch, problem.dim, out + u,
                                 problem.padded_units);
    for (; u < problem.units; ++u)
        multiply<Queries, 1>(vectors, vector_pitch, window, unit_offset + u, pitch, problem.dim, out + u,
                             problem.padded_units);
}

// The products of a group of vectors with the union of their windows, taken from a transposed window of the tile.
void products(const Vec* vectors, const float* transposed, const Tables& tables, const Problem& problem,
              const Tile& tile, const Group& group, Vec* out) {
    const int64_t pitch = tile.pitch(problem);
    const float* window = transposed + group.first_row * problem.dim * pitch + group.first;
    auto run = problem.group == 6 ? multiply_all<6, 2> : problem.group == 4 ? multiply_all<4, 3> : multiply_all<2, 6>;
    run(reinterpret_cast<const float*>(vectors), window, tables.unit_offset, pitch, problem, out);
}

// Products -> exp(logit - largest), 0 outside the window of query q. Returns the sum.
float exponentials(Vec* logits, const Tables& tables, const Problem& problem, const Group& group, int q) {
    const float* bias = tables.bias + group.bias_offset[q];
    const float* inside = tables.inside + problem.group - 1 - group.offset[q];
    Vec largest = broadcast(kMinusInfinity);
    for (int64_t u = 0; u < problem.units; bias += problem.bias_pitch)
        for (int64_t v = 0; v < problem.row_vectors; ++v, ++u) {
            const Vec logit = logits[u] * kLog2E + load(bias + v * kLanes);
            logits[u] = load(inside + v * kLanes) != 0.0f ? logit : broadcast(kMinusInfinity);
            largest = larger(largest, logits[u]);
        }
    for (int64_t u = problem.units; u < problem.padded_units; ++u) logits[u] = broadcast(kMinusInfinity);
    float lanes[kLanes];
    store(lanes, largest);
    float top = lanes[0];
    for (int i = 1; i < kLanes; ++i) top = maximum(top, lanes[i]);

    Pack total = {};
    for (int64_t u = 0; u < problem.padded_units; u += kPack) {
        const Pack logit = load_pack(logits + u);
        Pack x;
        VK_EACH x.v[i] = logit.v[i] - top;
        x = exp2(x);
        VK_EACH x.v[i] = logit.v[i] == kMinusInfinity ? Vec{} : x.v[i];
        VK_EACH total.v[i] += x.v[i];
        store_pack(logits + u, x);
    }
    return sum((total.v[0] + total.v[1]) + (total.v[2] + total.v[3]));
}

// out[q] = sum of weight times position over rows and columns [begin, end) of the union, for Vectors of the dimensions.
template <int Queries, int Vectors>
VK_INLINE void sum_up(const float* weights, const Vec* positions, int64_t columns, int64_t begin, int64_t end,
                      const Problem& problem, Vec* out) {
    const int64_t weight_pitch = problem.padded_units * kLanes;
    Vec total[Queries][Vectors] = {};
    for (int64_t row = 0; row < problem.window; ++row) {
        const Vec* x = positions + (row * columns + begin) * problem.dim_vectors;
        const float* weight = weights + row * problem.row_vectors * kLanes;
        for (int64_t column = begin; column < end; ++column, x += problem.dim_vectors) {
            Vec factor[Queries];
#pragma GCC unroll 8
            for (int q = 0; q < Queries; ++q) factor[q] = broadcast(weight[q * weight_pitch + column]);
#pragma GCC unroll 8
            for (int d = 0; d < Vectors; ++d)
#pragma GCC unroll 8
                for (int q = 0; q < Queries; ++q) total[q][d] += factor[q] * x[d];
        }
    }
    for (int q = 0; q < Queries; ++q)
        for (int d = 0; d < Vectors; ++d) out[q * problem.dim_vectors + d] = total[q][d];
}

template <int Queries>
VK_INLINE void sum_up_all(const float* weights, const Vec* positions, int64_t columns, int64_t begin, int64_t end,
                          const Problem& problem, Vec* out) {
    int64_t d = 0;
    for (; d + 4 <= problem.dim_vectors; d += 4)
        sum_up<Queries, 4>(weights, positions + d, columns, begin, end, problem, out + d);
    switch (problem.dim_vectors - d) {
        case 3: return sum_up<Queries, 3>(weights, positions + d, columns, begin, end, problem, out + d);
        case 2: return sum_up<Queries, 2>(weights, positions + d, columns, begin, end, problem, out + d);
        case 1: return sum_up<Queries, 1>(weights, positions + d, columns, begin, end, problem, out + d);
    }
}

// Weights are zero outside the window of their query, but zero times an infinity or NaN is not. Therefore queries and
// columns are computed together only if all numbers are finite, otherwise one by one, each in its own window.
bool all_finite(const Vec* vectors, int64_t count) {
    Vec zero = {};
    for (int64_t i = 0; i < count; ++i) zero += vectors[i] * 0.0f;
    return sum(zero) == 0;
}

// Sets the lanes outside the window of query q to zero.
void keep_window(Vec* units, const Tables& tables, const Problem& problem, const Group& group, int q) {
    const float* inside = tables.inside + problem.group - 1 - group.offset[q];
    for (int64_t row = 0; row < problem.window; ++row)
        for (int64_t v = 0; v < problem.row_vectors; ++v, ++units)
            *units = load(inside + v * kLanes) != 0.0f ? *units : Vec{};
    for (int64_t u = problem.units; u < problem.padded_units; ++u) *units++ = Vec{};
}

// out[q] = sum over the union of the weights of query q times the positions of `window`, (row, column, dim_vectors).
void weighted_sums(const Vec* weights, const Vec* window, const Problem& problem, const Tile& tile, const Group& group,
                   bool finite, Vec* out) {
    const int64_t columns = tile.columns.count;
    const Vec* positions = window + (group.first_row * columns + group.first) * problem.dim_vectors;
    const int at_once = !finite ? 1 : problem.group == 6 ? 3 : 2;
    for (int q = 0; q < group.count; q += at_once) {
        const int64_t begin = group.offset[q], end = group.offset[q + at_once - 1] + problem.window;
        const float* weight = reinterpret_cast<const float*>(weights + q * problem.padded_units);
        auto run = at_once == 3 ? sum_up_all<3> : at_once == 2 ? sum_up_all<2> : sum_up_all<1>;
        run(weight, positions, columns, begin, end, problem, out + q * problem.dim_vectors);
    }
}

// target[c] += sum over queries [begin, end) of weight[q][c] vectors[q], for Columns and Vectors of the dimensions.
template <int Columns, int Vectors>
VK_INLINE void spread_out(const float* weight, const Vec* vectors, int begin, int end, const Problem& problem,
                          Vec* target) {
    const int64_t weight_pitch = problem.padded_units * kLanes, pitch = problem.dim_vectors;
    Vec total[Columns][Vectors];
    for (int c = 0; c < Columns; ++c)
        for (int d = 0; d < Vectors; ++d) total[c][d] = target[c * pitch + d];
    for (int q = begin; q < end; ++q) {
        Vec factor[Columns];
#pragma GCC unroll 8
        for (int c = 0; c < Columns; ++c) factor[c] = broadcast(weight[q * weight_pitch + c]);
#pragma GCC unroll 8
        for (int d = 0; d < Vectors; ++d)
#pragma GCC unroll 8
            for (int c = 0; c < Columns; ++c) total[c][d] += factor[c] * vectors[q * pitch + d];
    }
    for (int c = 0; c < Columns; ++c)
        for (int d = 0; d < Vectors; ++d) target[c * pitch + d] = total[c][d];
}

template <int Vectors>
void spread_out_all(const float* weights, const Vec* vectors, const Problem& problem, const Tile& tile,
                    const Group& group, bool finite, Vec* window) {
    const int64_t width = group.offset[group.count - 1] + problem.window, weight_step = problem.row_vectors * kLanes;
    const int64_t step = tile.columns.count * problem.dim_vectors;
    int begin = 0, end = 0;  // queries that see one of the columns
    for (int64_t column = 0; column < width;) {
        const int64_t columns = finite && column + 3 <= width ? 3 : 1;
        while (end < group.count && group.offset[end] < column + columns) ++end;
        while (group.offset[begin] + problem.window <= column) ++begin;
        const float* weight = weights + column;
        Vec* target = window + column * problem.dim_vectors;
        for (int64_t row = 0; row < problem.window; ++row, weight += weight_step, target += step)
            if (columns == 3)
                spread_out<3, Vectors>(weight, vectors, begin, end, problem, target);
            else
                spread_out<1, Vectors>(weight, vectors, begin, end, problem, target);
        column += columns;
    }
}

// The transpose of weighted_sums: to each position of `window` adds the vectors of the queries, times their weights.
void spread(const Vec* weights, const Vec* vectors, const Problem& problem, const Tile& tile, const Group& group,
            bool finite, Vec* window) {
    const float* weight = reinterpret_cast<const float*>(weights);
    window += (group.first_row * tile.columns.count + group.first) * problem.dim_vectors;
    int64_t d = 0;
    for (; d + 4 <= problem.dim_vectors; d += 4)
        spread_out_all<4>(weight, vectors + d, problem, tile, group, finite, window + d);
    switch (problem.dim_vectors - d) {
        case 3: return spread_out_all<3>(weight, vectors + d, problem, tile, group, finite, window + d);
        case 2: return spread_out_all<2>(weight, vectors + d, problem, tile, group, finite, window + d);
        case 1: return spread_out_all<1>(weight, vectors + d, problem, tile, group, finite, window + d);
    }
}

template <class T>
bool forward_tile(const View& query, const View& key, const View& value, const View* bias, const View& out,
                  const Problem& problem, const Tile& tile) {
    const int64_t dims = problem.dim_vectors, group_vectors = problem.group * dims;
    Scratch scratch(tile.transposed_vectors(problem) + tile.positions() * dims + Tables::vectors(problem) +
                    kLanes * dims + 2 * group_vectors + problem.group * problem.padded_units);
    if (!scratch) return false;
    float* keys = reinterpret_cast<float*>(scratch.take(tile.transposed_vectors(problem)));
    Vec* values = scratch.take(tile.positions() * dims);
    Vec* block = scratch.take(kLanes * dims);
    Vec* queries = scratch.take(group_vectors);
    Vec* sums = scratch.take(group_vectors);
    Vec* weights = scratch.take(problem.group * problem.padded_units);
    const Tables tables(bias, problem, tile, scratch);
    load_transposed<T>(key, problem, tile, block, keys);
    load_window<T>(value, problem, tile, values);

    for (int64_t row = tile.rows.begin; row < tile.rows.end; ++row)
        for (int64_t column = tile.columns.begin; column < tile.columns.end; column += problem.group) {
            const Group group(problem, tile, row, column);
            float total[kMaxGroup];
            load_group<T>(query, problem, tile, group, queries);
            products(queries, keys, tables, problem, tile, group, weights);
            for (int q = 0; q < problem.group; ++q)
                total[q] = exponentials(weights + q * problem.padded_units, tables, problem, group, q);
            weighted_sums(weights, values, problem, tile, group, true, sums);
            if (!all_finite(sums, group.count * dims))
                weighted_sums(weights, values, problem, tile, group, false, sums);
            for (int q = 0; q < group.count; ++q)
                for (int64_t d = 0; d < dims; ++d) sums[q * dims + d] *= 1.0f / total[q];
            store_group<T>(out, problem, tile, group, sums);
        }
    return true;
}

template <class T>
Status forward(const View& query, const View& key, const View& value, const View* bias, const View& out,
               int64_t window) {
    const Problem problem(query, window);
    const int64_t across = problem.columns.tiles(), tiles = problem.rows.tiles() * across;
    return parallel_for(problem.batch * problem.heads * tiles, [&](int64_t task) {
        const int64_t image = task / tiles, tile = task % tiles;
        return forward_tile<T>(query, key, value, bias, out, problem,
                               {image / problem.heads, image % problem.heads, Range(problem.rows, tile / across),
                                Range(problem.columns, tile % across)});
    });
}

// Weights and their gradients for one query -> softmax of the logits, and gradient of the logits. Returns whether the
// term common to all of them is finite.
VK_INLINE bool softmax_backward(Vec* weights, Vec* grad, float total, int64_t units) {
    const float scale = 1.0f / total;
    Pack inner = {};
    for (int64_t u = 0; u < units; u += kPack) {
        Pack weight = load_pack(weights + u);
        VK_EACH weight.v[i] *= scale;
        VK_EACH inner.v[i] += weight.v[i] * grad[u + i];
        store_pack(weights + u, weight);
    }
    const float mean = sum((inner.v[0] + inner.v[1]) + (inner.v[2] + inner.v[3]));
    for (int64_t u = 0; u < units; ++u) grad[u] = weights[u] * (grad[u] - mean);
    return mean * 0.0f + scale * 0.0f == 0;
}

VK_INLINE void add_bias_gradient(const Vec* grad, const Problem& problem, float* table) {
    for (int64_t row = 0; row < problem.window; ++row, table += problem.bias_pitch)
        for (int64_t v = 0; v < problem.row_vectors; ++v, ++grad)
            store(table + v * kLanes, load(table + v * kLanes) + *grad);
}

// Adds a window of the tile, (row, column, dim_vectors), to a float32 gradient.
void add_window(const Vec* window, const Problem& problem, const Tile& tile, const View& grad) {
    for (int64_t row = 0; row < tile.rows.count; ++row)
        for (int64_t column = 0; column < tile.columns.count; ++column, window += problem.dim_vectors) {
            float* target = at<float>(grad, tile.batch, tile.head, tile.rows.first + row);
            target += (tile.columns.first + column) * grad.stride[3];
            const float* source = reinterpret_cast<const float*>(window);
            for (int64_t d = 0; d < problem.dim; ++d) target[d * grad.stride[4]] += source[d];
        }
}

struct Gradients {
    const View &query, &key, &value;  // float32
    float* bias;                      // of each tile, (2 window - 1)^2; null if there is none
};

template <class T>
bool backward_tile(const View& grad_out, const View& query, const View& key, const View& value, const View* bias,
                   const Gradients& grads, float* grad_bias, const Problem& problem, const Tile& tile) {
    const int64_t dims = problem.dim_vectors, group_vectors = problem.group * dims, units = problem.padded_units;
    const int64_t window_vectors = tile.positions() * dims, transposed_vectors = tile.transposed_vectors(problem);
    Scratch scratch(2 * transposed_vectors + 3 * window_vectors + Tables::vectors(problem) + problem.bias_vectors() +
                    kLanes * dims + 3 * group_vectors + 2 * problem.group * units);
    if (!scratch) return false;
    float* transposed_keys = reinterpret_cast<float*>(scratch.take(transposed_vectors));
    float* transposed_values = reinterpret_cast<float*>(scratch.take(transposed_vectors));
    Vec* keys = scratch.take(window_vectors);
    Vec* grad_keys = scratch.take(window_vectors);
    Vec* grad_values = scratch.take(window_vectors);
    Vec* block = scratch.take(kLanes * dims);
    Vec* queries = scratch.take(group_vectors);
    Vec* grad_outs = scratch.take(group_vectors);
    Vec* sums = scratch.take(group_vectors);
    Vec* weights = scratch.take(problem.group * units);
    Vec* grad_logits = scratch.take(problem.group * units);
    Vec* bias_table = scratch.take(problem.bias_vectors());
    const Tables tables(bias, problem, tile, scratch);
    load_transposed<T>(key, problem, tile, block, transposed_keys);
    load_transposed<T>(value, problem, tile, block, transposed_values);
    load_window<T>(key, problem, tile, keys);
    load_window<T>(value, problem, tile, grad_values);  // read only
    for (int64_t i = 0; i < problem.bias_vectors(); ++i) bias_table[i] = Vec{};
    for (int64_t i = 0; i < problem.group * units; ++i) grad_logits[i] = Vec{};
    const bool finite_window = all_finite(keys, window_vectors) && all_finite(grad_values, window_vectors);
    for (int64_t i = 0; i < window_vectors; ++i) grad_keys[i] = grad_values[i] = Vec{};

    for (int64_t row = tile.rows.begin; row < tile.rows.end; ++row)
        for (int64_t column = tile.columns.begin; column < tile.columns.end; column += problem.group) {
            const Group group(problem, tile, row, column);
            load_group<T>(query, problem, tile, group, queries);
            load_group<T>(grad_out, problem, tile, group, grad_outs);
            products(queries, transposed_keys, tables, problem, tile, group, weights);
            products(grad_outs, transposed_values, tables, problem, tile, group, grad_logits);
            bool finite = finite_window && all_finite(queries, group_vectors) && all_finite(grad_outs, group_vectors);
            for (int q = 0; q < problem.group; ++q) {
                const float total = exponentials(weights + q * units, tables, problem, group, q);
                if (!finite) keep_window(grad_logits + q * units, tables, problem, group, q);
                if (!softmax_backward(weights + q * units, grad_logits + q * units, total, units)) finite = false;
                if (!finite) keep_window(grad_logits + q * units, tables, problem, group, q);
                if (grad_bias && q < group.count)
                    add_bias_gradient(grad_logits + q * units, problem,
                                      reinterpret_cast<float*>(bias_table) + group.bias_offset[q]);
            }
            weighted_sums(grad_logits, keys, problem, tile, group, finite, sums);
            store_group<float>(grads.query, problem, tile, group, sums);
            spread(grad_logits, queries, problem, tile, group, finite, grad_keys);
            spread(weights, grad_outs, problem, tile, group, finite, grad_values);
        }
    add_window(grad_keys, problem, tile, grads.key);
    add_window(grad_values, problem, tile, grads.value);
    const float* table = reinterpret_cast<const float*>(bias_table) + problem.group - 1;
    for (int64_t i = 0; grad_bias && i < problem.bias_rows(); ++i, table += problem.bias_pitch)
        for (int64_t j = 0; j < problem.bias_rows(); ++j) *grad_bias++ = table[j];
    return true;
}

// Tiles run in four rounds, separated by the parity of their indices. In a round the windows to which gradients are
// added do not overlap, so that there are no races and the order of additions does not depend on the number of threads.
template <class T>
Status backward(const View& grad_out, const View& query, const View& key, const View& value, const View* bias,
                const Gradients& grads, int64_t window) {
    const Problem problem(query, window);
    const int64_t down = problem.rows.tiles(), across = problem.columns.tiles();
    const int64_t table = problem.bias_rows() * problem.bias_rows();
    for (int64_t odd_row = 0; odd_row < 2; ++odd_row)
        for (int64_t odd_column = 0; odd_column < 2; ++odd_column) {
            const int64_t few_across = (across + 1 - odd_column) / 2, tiles = (down + 1 - odd_row) / 2 * few_across;
            const Status status = parallel_for(problem.batch * problem.heads * tiles, [&](int64_t task) {
                const int64_t image = task / tiles, tile = task % tiles;
                const int64_t row = tile / few_across * 2 + odd_row, column = tile % few_across * 2 + odd_column;
                float* grad_bias = grads.bias ? grads.bias + ((image * down + row) * across + column) * table : nullptr;
                return backward_tile<T>(grad_out, query, key, value, bias, grads, grad_bias, problem,
                                        {image / problem.heads, image % problem.heads, Range(problem.rows, row),
                                         Range(problem.columns, column)});
            });
            if (status != kDone) return status;
        }
    return kDone;
}

// Sums the gradients of the many tiles in double precision.
Status reduce_bias(const float* tiles, const Problem& problem, const View& grad_bias) {
    const int64_t side = problem.bias_rows(), table = side * side;
    const int64_t per_image = problem.rows.tiles() * problem.columns.tiles();
    return parallel_for(problem.heads * side, [&](int64_t task) {
        const int64_t head = task / side, row = task % side;
        for (int64_t column = 0; column < side; ++column) {
            double total = 0;
            for (int64_t batch = 0; batch < problem.batch; ++batch)
                for (int64_t tile = 0; tile < per_image; ++tile)
                    total += tiles[((batch * problem.heads + head) * per_image + tile) * table + row * side + column];
            *at<float>(grad_bias, head, row, column) = float(total);
        }
        return true;
    });
}

}  // namespace

// All of one dtype, (batch, heads, height, width, head_dim); bias float32, (heads, 2 window - 1, 2 window - 1).
VK_ENTRY(neighborhood_attention_forward)
(const View* query, const View* key, const View* value, const View* bias, const View* out, int64_t window) {
    auto run = query->dtype == kFloat32 ? forward<float> : forward<BFloat16>;
    return run(*query, *key, *value, bias, *out, window);
}

// Gradients are float32, and those of key and value must be zero.
VK_ENTRY(neighborhood_attention_backward)
(const View* grad_out, const View* query, const View* key, const View* value, const View* bias, const View* grad_query,
 const View* grad_key, const View* grad_value, const View* grad_bias, int64_t window) {
    const Problem problem(*query, window);
    float* tiles = nullptr;
    if (grad_bias) {
        const int64_t count = problem.batch * problem.heads * problem.rows.tiles() * problem.columns.tiles();
        tiles = static_cast<float*>(
            __builtin_malloc(count * problem.bias_rows() * problem.bias_rows() * sizeof(float) + 1));
        if (!tiles) return kOutOfMemory;
    }
    auto run = query->dtype == kFloat32 ? backward<float> : backward<BFloat16>;
    Status status = run(*grad_out, *query, *key, *value, bias, {*grad_query, *grad_key, *grad_value, tiles}, window);
    if (grad_bias && status == kDone) status = reduce_bias(tiles, problem, *grad_bias);
    __builtin_free(tiles);
    return status;
}
