// Neighborhood attention, forward. Overview: neighborhood.cuh.
#include "neighborhood.cuh"

namespace {

template <class T, int kDims>
__global__ void __launch_bounds__(32 * kMaxWarps)
    forward(const __grid_constant__ Problem problem, const __grid_constant__ Maps<const T> query,
            const __grid_constant__ Maps<const T> key, const __grid_constant__ Maps<const T> value,
            const __grid_constant__ Maps<T> out) {
    using V = Vectors<T, kDims>;
    const int64_t index = int64_t(blockIdx.x) * kMaxWarps + threadIdx.x / 32, image = index / problem.squares();
    if (image >= int64_t(problem.batch) * problem.heads) return;
    const Square square(problem, int(image / problem.heads), int(image % problem.heads), int(index % problem.squares()), true);
    typename V::Pair queries[V::kBlocks][4];
    V::load_own(query, square, problem.dims, queries);

    float largest[2] = {kNever, kNever}, total[2] = {}, sums[2 * V::kBlocks][4] = {};
#pragma unroll 1
    for (int first = 0; first < square.count; first += 16) {
        typename V::Pair keys[V::kBlocks][2], values[2][V::kBlocks][2];
        float weights[2][4], before[2] = {largest[0], largest[1]};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            V::load_partners(key, square, first + 8 * half, problem.dims, keys);
            V::load_partners(value, square, first + 8 * half, problem.dims, values[half]);
            V::products(queries, keys, weights[half]);
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const int partner = first + 8 * half + 2 * square.q + k;
                const Position at = square.partner(partner);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float& logit = weights[half][2 * i + k];
                    if (partner < square.count && problem.sees(square.own[i], at))
                        logit += problem.bias_of(square.head, square.own[i], at);
                    else
                        logit = -INFINITY;
                    largest[i] = fmaxf(largest[i], logit);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            largest[i] = largest_of_four(largest[i]);
            const float scale = exp2_fast((before[i] - largest[i]) * kLog2E);
            total[i] *= scale;
#pragma unroll
            for (int block = 0; block < 2 * V::kBlocks; ++block) {
                sums[block][2 * i] *= scale;
                sums[block][2 * i + 1] *= scale;
            }
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                float& weight = weights[k / 2][2 * i + k % 2];
                weight = exp2_fast((weight - largest[i]) * kLog2E);
                total[i] += weight;
            }
        }
        V::add_weighted(weights, values, sums);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float scale = 1 / sum_of_four(total[i]);
#pragma unroll
        for (int block = 0; block < 2 * V::kBlocks; ++block) {
            sums[block][2 * i] *= scale;
            sums[block][2 * i + 1] *= scale;
        }
    }
    V::store(out, square, problem.dims, sums);
}

}  // namespace

// All of one type, (batch, heads, height, width, head_dim), with adjacent dimensions, at most 64; bias null or float32,
// (heads, 2 window - 1, 2 window - 1), contiguous.
VK_ENTRY(neighborhood_attention_forward)
(void* stream, const View* query, const View* key, const View* value, const View* bias, const View* out, int64_t window) {
    const Problem problem(query, bias, window);
    const int64_t squares = int64_t(problem.batch) * problem.heads * problem.squares();
    return for_type(query->dtype, [&](auto type) {
        using T = decltype(type);
        return for_dims(query->size[4], [&](auto dims) {
            return launch(forward<T, decltype(dims)::value>, unsigned((squares + kMaxWarps - 1) / kMaxWarps),
                          32 * kMaxWarps, 0, stream, problem, Maps<const T>(query), Maps<const T>(key),
                          Maps<const T>(value), Maps<T>(out));
        });
    });
}
