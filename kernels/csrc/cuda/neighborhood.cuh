// Common parts of the forward and the backward pass of neighborhood attention. Definition:
// ../../vision_kernels/neighborhood_attention.
//
// A warp takes 4 x 4 neighbouring positions of a map, queries or keys, and the rectangle of all positions that any of
// them sees or is seen by. Products between the 16 positions and those of the rectangle, 8 or 16 at a time, come from
// tensor cores (mma.cuh); pairs that do not see each other get the weight zero. Vectors are read when they are needed,
// mostly from the cache of the multiprocessor: neighbouring warps read the same ones.
#pragma once
#include "functions.h"
#include "mma.cuh"

namespace {

constexpr int kSide = 4;         // of the square of a warp
constexpr int kMaxWarps = 4;     // of a block
constexpr float kNever = -1e30f;  // below all logits, and finite

// (batch, heads, height, width, head_dim), the dimensions adjacent.
template <class T>
struct Maps {
    T* data;
    int64_t by_batch, by_head, by_row, by_column;
    bool aligned;  // two dimensions can be loaded together

    Maps() = default;
    explicit Maps(const View* view)
        : data(static_cast<T*>(view->data)), by_batch(view->stride[0]), by_head(view->stride[1]),
          by_row(view->stride[2]), by_column(view->stride[3]),
          aligned(reinterpret_cast<uintptr_t>(view->data) % (2 * sizeof(T)) == 0 && view->size[4] % 2 == 0 &&
                  (by_batch | by_head | by_row | by_column) % 2 == 0) {}
    __device__ __forceinline__ T* at(int batch, int head, int row, int column) const {
        return data + batch * by_batch + head * by_head + row * by_row + column * by_column;
    }
};

struct Position {
    int row, column;
};

struct Problem {
    int batch, heads, height, width, dims, window;
    const float* bias;  // (heads, 2 window - 1, 2 window - 1), or null

    Problem(const View* query, const View* bias, int64_t window)
        : batch(int(query->size[0])), heads(int(query->size[1])), height(int(query->size[2])), width(int(query->size[3])),
          dims(int(query->size[4])), window(int(window)), bias(bias ? static_cast<const float*>(bias->data) : nullptr) {}

    __host__ __device__ int across() const { return (width + kSide - 1) / kSide; }
    __host__ __device__ int squares() const { return (height + kSide - 1) / kSide * across(); }
    __host__ __device__ int table_side() const { return 2 * window - 1; }

    // The first position that a query sees, along an axis.
    __device__ __forceinline__ int start(int query, int size) const {
        return min(max(query - window / 2, 0), size - window);
    }
    // The first and the last query that see a position.
    __device__ __forceinline__ int first_query(int key) const { return key < window ? 0 : key - window / 2; }
    __device__ __forceinline__ int last_query(int key, int size) const {
        return key >= size - window ? size - 1 : key + window / 2;
    }
    __device__ __forceinline__ bool sees(Position query, Position key) const {
        const int row = key.row - start(query.row, height), column = key.column - start(query.column, width);
        return row >= 0 && row < window && column >= 0 && column < window;
    }
    __device__ __forceinline__ float bias_of(int head, Position query, Position key) const {
        if (!bias) return 0;
        const int row = key.row - query.row + window - 1, column = key.column - query.column + window - 1;
        return bias[(int64_t(head) * table_side() + row) * table_side() + column];
    }
};

// A square of 16 positions and the rectangle of their partners: the keys that they see as queries, or the queries that
// see them as keys. The lane 4 g + q holds the 16 positions g and g + 8, in products also partners 2 q and 2 q + 1.
struct Square {
    int batch, head, g, q;
    Position own[2];
    bool exists[2];
    int top, left, columns, count;  // of the rectangle

    __device__ __forceinline__ Square(const Problem& problem, int batch, int head, int index, bool of_queries)
        : batch(batch), head(head), g(threadIdx.x % 32 / 4), q(threadIdx.x % 4) {
        const int row = index / problem.across() * kSide, column = index % problem.across() * kSide;
        for (int i = 0; i < 2; ++i) {
            own[i] = {row + 2 * i + g / kSide, column + g % kSide};
            exists[i] = own[i].row < problem.height && own[i].column < problem.width;
            own[i] = {min(own[i].row, problem.height - 1), min(own[i].column, problem.width - 1)};
        }
        const int last_row = min(row + kSide, problem.height) - 1, last_column = min(column + kSide, problem.width) - 1;
        int bottom, right;
        if (of_queries) {
            top = problem.start(row, problem.height);
            left = problem.start(column, problem.width);
            bottom = problem.start(last_row, problem.height) + problem.window;
            right = problem.start(last_column, problem.width) + problem.window;
        } else {
            top = problem.first_query(row);
            left = problem.first_query(column);
            bottom = problem.last_query(last_row, problem.height) + 1;
            right = problem.last_query(last_column, problem.width) + 1;
        }
        columns = right - left;
        count = (bottom - top) * columns;
    }

    // After the last partner it is repeated.
    __device__ __forceinline__ Position partner(int index) const {
        index = min(index, count - 1);
        const int row = int((index + 0.5f) * __fdividef(1.0f, float(columns)));
        return {top + row, left + index - row * columns};
    }
};

// Vectors of up to kDims dimensions as operands of products, from maps of T.
template <class T, int kDims>
struct Vectors {
    static constexpr int kBlocks = kDims / 16;  // of 16 dimensions
    using Pair = Split<kPartsOf<T>>;

    // The 16 positions of a square, as A.
    __device__ __forceinline__ static void load_own(const Maps<const T>& map, const Square& square, int dims,
                                                    Pair (&vectors)[kBlocks][4]) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const T* row = map.at(square.batch, square.head, square.own[i].row, square.own[i].column);
#pragma unroll
            for (int block = 0; block < kBlocks; ++block)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int first = 16 * block + 8 * half + 2 * square.q;
                    vectors[block][2 * half + i] = load_pair(row + first, dims - first, map.aligned);
                }
        }
    }
    // Eight partners, from `index` on, as the columns of B.
    __device__ __forceinline__ static void load_partners(const Maps<const T>& map, const Square& square, int index, int dims,
                                                         Pair (&vectors)[kBlocks][2]) {
        const Position at = square.partner(index + square.g);
        const T* row = map.at(square.batch, square.head, at.row, at.column);
#pragma unroll
        for (int block = 0; block < kBlocks; ++block)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int first = 16 * block + 8 * half + 2 * square.q;
                vectors[block][half] = load_pair(row + first, dims - first, map.aligned);
            }
    }
    // Inner products.
    __device__ __forceinline__ static void products(const Pair (&own)[kBlocks][4], const Pair (&partners)[kBlocks][2],
                                                    float (&result)[4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) result[i] = 0;
#pragma unroll
        for (int block = 0; block < kBlocks; ++block)
            multiply<kPartsOf<T>>(result[0], result[1], result[2], result[3], own[block], partners[block]);
    }

    // Sums over 16 partners, in two groups of eight, of weights (own, partner) times vectors.
    static constexpr int kWeightParts = sizeof(T) == 4 ? 3 : 2;
    __device__ __forceinline__ static void add_weighted(const float (&weights)[2][4],
                                                        const Pair (&partners)[2][kBlocks][2],
                                                        float (&sums)[2 * kBlocks][4]) {
        Split<kWeightParts> factors[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) factors[i] = Split<kWeightParts>(weights[i / 2][i % 2 * 2], weights[i / 2][i % 2 * 2 + 1]);
#pragma unroll
        for (int i = 0; i < 2 * kBlocks; ++i) {
            const Pair columns[2] = {transposed(partners[0][i / 2][i % 2]), transposed(partners[1][i / 2][i % 2])};
            multiply<kWeightParts>(sums[i][0], sums[i][1], sums[i][2], sums[i][3], factors, columns);
        }
    }
    // Writes such sums for the positions that exist.
    __device__ __forceinline__ static void store(const Maps<T>& map, const Square& square, int dims,
                                                 const float (&sums)[2 * kBlocks][4]) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (!square.exists[i]) continue;
            T* row = map.at(square.batch, square.head, square.own[i].row, square.own[i].column);
#pragma unroll
            for (int block = 0; block < 2 * kBlocks; ++block)
#pragma unroll
                for (int k = 0; k < 2; ++k)
                    if (8 * block + 2 * square.q + k < dims)
                        assign(row + 8 * block + 2 * square.q + k, sums[block][2 * i + k]);
        }
    }
};

// Over the lanes that share positions.
__device__ __forceinline__ float largest_of_four(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ __forceinline__ float sum_of_four(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

// body(dims), with a constant that is at least the number of dimensions.
template <class Body>
const char* for_dims(int64_t dims, const Body& body) {
    if (dims <= 32) return body(std::integral_constant<int, 32>());
    return body(std::integral_constant<int, 64>());
}

}  // namespace
