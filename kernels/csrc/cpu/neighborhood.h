// Division of neighborhood attention into tiles and groups of queries, and the positions that these see.
#pragma once
#include "simd.h"

namespace {

constexpr int kMaxGroup = 6;  // with 2 vectors a query fills the 16 registers of AVX2

constexpr VK_INLINE int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// One axis of the map, divided into tiles. Tiles of the same parity have windows that do not overlap, because they are
// at least three times the radius: the windows of both ends are shifted inwards by up to one.
struct Axis {
    int64_t size, window, step;

    Axis(int64_t size, int64_t window, int64_t target, int64_t multiple) : size(size), window(window) {
        const int64_t tiles = maximum<int64_t>(1, size / maximum(target, window / 2 * 3));
        step = round_up((size + tiles - 1) / tiles, multiple);
    }
    int64_t tiles() const { return (size + step - 1) / step; }
    // The first of the `window` positions that position i sees.
    int64_t start(int64_t i) const { return minimum(maximum<int64_t>(i - window / 2, 0), size - window); }
};

// Positions [begin, end) of an axis and the positions [first, first + count) that they see.
struct Range {
    int64_t begin, end, first, count;

    Range(const Axis& axis, int64_t tile) : begin(tile * axis.step), end(minimum(begin + axis.step, axis.size)) {
        first = axis.start(begin);
        count = axis.start(end - 1) + axis.window - first;
    }
};

// Larger groups need fewer loads, but the union of their windows must not need another vector.
int group_size(int64_t window) {
    int best = 2;
    for (int queries = 4; queries <= kMaxGroup; queries += 2)
        if (round_up(window + queries - 1, kLanes) == round_up(window + 1, kLanes)) best = queries;
    return best;
}

struct Problem {
    int64_t batch, heads, dim, window;
    int group;
    Axis rows, columns;
    int64_t dim_vectors;  // head_dim rounded up
    int64_t row_vectors, units, padded_units;
    int64_t bias_pitch;  // a row of the bias table in scratch: group - 1 zeros on the left, enough on the right

    Problem(const View& query, int64_t window)
        : batch(query.size[0]),
          heads(query.size[1]),
          dim(query.size[4]),
          window(window),
          group(group_size(window)),
          rows(query.size[2], window, 16, 1),
          columns(query.size[3], window, 32, group) {
        dim_vectors = (dim + kLanes - 1) / kLanes;
        row_vectors = round_up(window + group - 1, kLanes) / kLanes;
        units = window * row_vectors;
        padded_units = round_up(units, kPack);
        bias_pitch = group - 1 + window - 1 + row_vectors * kLanes;
    }
    int64_t bias_rows() const { return 2 * window - 1; }
    int64_t bias_vectors() const { return bias_rows() * bias_pitch / kLanes + 1; }
};

struct Tile {
    int64_t batch, head;
    Range rows, columns;

    int64_t positions() const { return rows.count * columns.count; }
    // Columns of a transposed window, with room for vectors that reach beyond the last one.
    int64_t pitch(const Problem& problem) const { return columns.count + problem.row_vectors * kLanes; }
    int64_t transposed_vectors(const Problem& problem) const {
        return rows.count * problem.dim * pitch(problem) / kLanes + 1;
    }
};

// Up to kMaxGroup queries of one row, from `column` on. Missing queries are zeros at the position of the last one.
struct Group {
    int64_t row, column, count;
    int64_t first_row, first;        // of the union of their windows, in the window of the tile
    int64_t offset[kMaxGroup];       // of the window of each in the union
    int64_t bias_offset[kMaxGroup];  // in the bias table: where the union begins

    Group(const Problem& problem, const Tile& tile, int64_t row, int64_t column) : row(row), column(column) {
        count = minimum<int64_t>(problem.group, tile.columns.end - column);
        first_row = problem.rows.start(row);
        const int64_t bias_row = first_row - row + problem.window - 1, start = problem.columns.start(column);
        for (int q = 0; q < problem.group; ++q) {
            const int64_t each = column + minimum<int64_t>(q, count - 1);
            offset[q] = problem.columns.start(each) - start;
            bias_offset[q] = bias_row * problem.bias_pitch + problem.group - 1 + start - each + problem.window - 1;
        }
        first = start - tile.columns.first;
        first_row -= tile.rows.first;
    }
};

}  // namespace
