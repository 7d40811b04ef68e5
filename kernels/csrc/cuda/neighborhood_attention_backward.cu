// Neighborhood attention, backward. Overview: neighborhood.cuh.
//
// Weights are recomputed, first by the queries, which store what the keys need to recompute them again. So
// each gradient is a sum owned by one warp, without atomics.
#include "neighborhood.cuh"

namespace {

// Of each query, (batch, heads, height, width): base-2 logarithm of the sum of all exponentials of logits, and mean of
// the gradients of its weights.
struct Statistics {
    float *logarithm, *mean;

    __device__ __forceinline__ static int64_t at(const Problem& problem, const Square& square, Position query) {
        const int64_t image = int64_t(square.batch) * problem.heads + square.head;
        return (image * problem.height + query.row) * problem.width + query.column;
    }
};

template <class T>
struct Inputs {
    Maps<const T> grad_out, query, key, value;
};

// The logits of eight partners from `first` on, or minus infinity where a query does not see a key.
template <bool kOfQueries>
__device__ __forceinline__ void add_bias(const Problem& problem, const Square& square, int first, float (&logits)[4]) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
        const int partner = first + 2 * square.q + k;
        const Position at = square.partner(partner);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const Position query = kOfQueries ? square.own[i] : at, key = kOfQueries ? at : square.own[i];
            const bool seen = partner < square.count && problem.sees(query, key);
            logits[2 * i + k] = seen ? logits[2 * i + k] + problem.bias_of(square.head, query, key) : -INFINITY;
        }
    }
}

// For each relative position adds the gradients of the logits (16, pitch) of a square of queries.
__device__ __forceinline__ void add_to_table(const Problem& problem, const Square& square, const float* logits, int pitch,
                                             float* table) {
    const int side = problem.table_side(), row = square.own[0].row - square.g / kSide;
    const int column = __shfl_sync(~0u, square.own[0].column, 0);
    const int first_row = __shfl_sync(~0u, row, 0);
    for (int element = threadIdx.x % 32; element < side * side; element += 32) {
        const int down = element / side - problem.window + 1, right = element % side - problem.window + 1;
        float sum = table[element];
        for (int i = 0; i < kSide * kSide; ++i) {
            const Position query{first_row + i / kSide, column + i % kSide}, key{query.row + down, query.column + right};
            if (query.row < problem.height && query.column < problem.width && problem.sees(query, key))
                sum += logits[i * pitch + (key.row - square.top) * square.columns + key.column - square.left];
        }
        table[element] = sum;
    }
}

// Statistics, and gradients of queries and bias. The squares of a head are divided among warps, each of which
// accumulates a table of its own: tables (heads, warps, (2 window - 1)^2), or null.
template <class T, int kDims>
__global__ void __launch_bounds__(32 * kMaxWarps)
    of_queries(const __grid_constant__ Problem problem, const __grid_constant__ Inputs<T> inputs, Statistics statistics,
               const __grid_constant__ Maps<T> grad_query, float* tables, int pitch) {
    using V = Vectors<T, kDims>;
    VK_DYNAMIC_SHARED(float, shared);  // for each warp (16, pitch), then a table
    const int warps = blockDim.x / 32, warp = blockIdx.x * warps + threadIdx.x / 32, head = blockIdx.y;
    const int elements = problem.table_side() * problem.table_side();
    float* const logits = shared + threadIdx.x / 32 * (16 * pitch + elements);
    float* const table = logits + 16 * pitch;
    for (int i = threadIdx.x % 32; tables && i < elements; i += 32) table[i] = 0;
    __syncwarp();

    for (int64_t index = warp; index < int64_t(problem.batch) * problem.squares(); index += int64_t(gridDim.x) * warps) {
        const Square square(problem, int(index / problem.squares()), head, int(index % problem.squares()), true);
        typename V::Pair queries[V::kBlocks][4], grads[V::kBlocks][4];
        V::load_own(inputs.query, square, problem.dims, queries);
        V::load_own(inputs.grad_out, square, problem.dims, grads);
        float largest[2] = {kNever, kNever}, total[2] = {}, mean[2] = {};
#pragma unroll 1
        for (int first = 0; first < square.count; first += 8) {
            typename V::Pair partners[V::kBlocks][2];
            float weights[4], grad_weights[4];
            V::load_partners(inputs.key, square, first, problem.dims, partners);
            V::products(queries, partners, weights);
            add_bias<true>(problem, square, first, weights);
            V::load_partners(inputs.value, square, first, problem.dims, partners);
            V::products(grads, partners, grad_weights);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float before = largest[i];
                largest[i] = fmaxf(before, fmaxf(weights[2 * i], weights[2 * i + 1]));
                const float scale = exp2_fast((before - largest[i]) * kLog2E);
                total[i] *= scale;
                mean[i] *= scale;
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    const float weight = exp2_fast((weights[2 * i + k] - largest[i]) * kLog2E);
                    total[i] += weight;
                    mean[i] += weight * grad_weights[2 * i + k];
                }
            }
        }
        float logarithm[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float largest_of_all = largest_of_four(largest[i]);
            const float scale = exp2_fast((largest[i] - largest_of_all) * kLog2E);
            total[i] = sum_of_four(total[i] * scale);
            mean[i] = sum_of_four(mean[i] * scale) / total[i];
            logarithm[i] = largest_of_all * kLog2E + __log2f(total[i]);
            if (square.q > 0 || !square.exists[i]) continue;
            statistics.logarithm[Statistics::at(problem, square, square.own[i])] = logarithm[i];
            statistics.mean[Statistics::at(problem, square, square.own[i])] = mean[i];
        }

        float sums[2 * V::kBlocks][4] = {};
#pragma unroll 1
        for (int first = 0; first < square.count; first += 16) {
            typename V::Pair values[V::kBlocks][2], keys[2][V::kBlocks][2];
            float weights[2][4], grad_weights[4];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                V::load_partners(inputs.key, square, first + 8 * half, problem.dims, keys[half]);
                V::products(queries, keys[half], weights[half]);
                add_bias<true>(problem, square, first + 8 * half, weights[half]);
                V::load_partners(inputs.value, square, first + 8 * half, problem.dims, values);
                V::products(grads, values, grad_weights);
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    float& weight = weights[half][k];
                    weight = exp2_fast(weight * kLog2E - logarithm[k / 2]) * (grad_weights[k] - mean[k / 2]);
                    const int own = square.g + k / 2 * 8, partner = first + 8 * half + 2 * square.q + k % 2;
                    if (tables) logits[own * pitch + partner] = weight;
                }
            }
            V::add_weighted(weights, keys, sums);
        }
        V::store(grad_query, square, problem.dims, sums);
        if (!tables) continue;
        __syncwarp();
        add_to_table(problem, square, logits, pitch, table);
        __syncwarp();
    }
    for (int i = threadIdx.x % 32; tables && i < elements; i += 32)
        tables[(int64_t(head) * gridDim.x * warps + warp) * elements + i] = table[i];
}

template <class T, int kDims>
__global__ void __launch_bounds__(32 * kMaxWarps)
    of_keys(const __grid_constant__ Problem problem, const __grid_constant__ Inputs<T> inputs, Statistics statistics,
            const __grid_constant__ Maps<T> grad_key, const __grid_constant__ Maps<T> grad_value) {
    using V = Vectors<T, kDims>;
    const int64_t index = int64_t(blockIdx.x) * kMaxWarps + threadIdx.x / 32, image = index / problem.squares();
    if (image >= int64_t(problem.batch) * problem.heads) return;
    const Square square(problem, int(image / problem.heads), int(image % problem.heads), int(index % problem.squares()),
                        false);
    typename V::Pair keys[V::kBlocks][4], values[V::kBlocks][4];
    V::load_own(inputs.key, square, problem.dims, keys);
    V::load_own(inputs.value, square, problem.dims, values);
    float key_sums[2 * V::kBlocks][4] = {}, value_sums[2 * V::kBlocks][4] = {};
#pragma unroll 1
    for (int first = 0; first < square.count; first += 16) {
        typename V::Pair queries[2][V::kBlocks][2], grads[2][V::kBlocks][2];
        float weights[2][4], grad_logits[2][4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            V::load_partners(inputs.query, square, first + 8 * half, problem.dims, queries[half]);
            V::products(keys, queries[half], weights[half]);
            add_bias<false>(problem, square, first + 8 * half, weights[half]);
            V::load_partners(inputs.grad_out, square, first + 8 * half, problem.dims, grads[half]);
            V::products(values, grads[half], grad_logits[half]);
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const Position query = square.partner(first + 8 * half + 2 * square.q + k);
                const int64_t at = Statistics::at(problem, square, query);
                const float logarithm = statistics.logarithm[at], mean = statistics.mean[at];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float &weight = weights[half][2 * i + k], &grad = grad_logits[half][2 * i + k];
                    // Zero where the query does not see the key, even if the query's logits are NaN.
                    weight = weight == -INFINITY ? 0.0f : exp2_fast(weight * kLog2E - logarithm);
                    grad = weight == 0.0f ? 0.0f : weight * (grad - mean);
                }
            }
        }
        V::add_weighted(grad_logits, queries, key_sums);
        V::add_weighted(weights, grads, value_sums);
    }
    V::store(grad_key, square, problem.dims, key_sums);
    V::store(grad_value, square, problem.dims, value_sums);
}

template <class T, int kDims>
const char* run(void* stream, const Problem& problem, const Inputs<T>& inputs, const Statistics& statistics,
                const Maps<T>& grad_query, const Maps<T>& grad_key, const Maps<T>& grad_value, const View* tables,
                int64_t warps) {
    const int side = problem.window + kSide - 1, pitch = (side * side + 15) / 16 * 16;
    const size_t bytes = tables ? (16 * pitch + problem.table_side() * problem.table_side()) * sizeof(float) : 0;
    int in_block = kMaxWarps;
    while (in_block > 1 && in_block * bytes > kSharedWithoutAsking) --in_block;
    warps = warps / kMaxWarps * kMaxWarps;
    while (warps % in_block) --in_block;
    float* const target = tables ? static_cast<float*>(tables->data) : nullptr;
    const char* error = launch(of_queries<T, kDims>, dim3(unsigned(warps / in_block), problem.heads), 32 * in_block,
                               in_block * bytes, stream, problem, inputs, statistics, grad_query, target, pitch);
    if (error) return error;
    const int64_t squares = int64_t(problem.batch) * problem.heads * problem.squares();
    return launch(of_keys<T, kDims>, unsigned((squares + kMaxWarps - 1) / kMaxWarps), 32 * kMaxWarps, 0, stream, problem,
                  inputs, statistics, grad_key, grad_value);
}

}  // namespace

// Maps as for neighborhood_attention_forward, all of one type. Float32: statistics (2, batch, heads, height, width);
// tables null, or (heads, warps, 2 window - 1, 2 window - 1), the parts of the gradient of the bias. warps: to share
// out the queries of a head to, a multiple of 4.
VK_ENTRY(neighborhood_attention_backward)
(void* stream, const View* grad_out, const View* query, const View* key, const View* value, const View* bias,
 const View* statistics, const View* grad_query, const View* grad_key, const View* grad_value, const View* tables,
 int64_t window, int64_t warps) {
    const Problem problem(query, bias, window);
    float* const logarithm = static_cast<float*>(statistics->data);
    return for_type(query->dtype, [&](auto type) {
        using T = decltype(type);
        const Inputs<T> inputs{Maps<const T>(grad_out), Maps<const T>(query), Maps<const T>(key), Maps<const T>(value)};
        return for_dims(query->size[4], [&](auto dims) {
            return run<T, decltype(dims)::value>(stream, problem, inputs, {logarithm, logarithm + statistics->stride[0]},
                                                 Maps<T>(grad_query), Maps<T>(grad_key), Maps<T>(grad_value), tables,
                                                 warps);
        });
    });
}
