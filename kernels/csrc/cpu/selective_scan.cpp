// Selective scan: a lane for each channel, one step after the other. Definition: ../../vision_kernels/selective_scan.
//
// u, delta, y and their gradients are (batch, dim, length) with any strides; where channels are adjacent in memory
// they are read as vectors, otherwise lane by lane. B and C are float32 with adjacent states.
#include "simd.h"

namespace {

constexpr int kTile = 32;  // steps that are prepared together

struct Shape {
    int64_t batch, dim, length, groups, states;
    int64_t channels_per_group() const { return dim / groups; }
    int64_t blocks_per_group() const { return (channels_per_group() + kLanes - 1) / kLanes; }
};

// `count` channels from `channel` on, of one batch entry.
struct Block {
    int64_t batch, group, channel;
    int count;
};

Shape shape_of(const View& u, const View& B) { return {u.size[0], u.size[1], u.size[2], B.size[1], B.size[3]}; }

Block block_of(const Shape& shape, int64_t batch, int64_t group, int64_t index) {
    const int64_t first = index * kLanes, channels = shape.channels_per_group();
    return {batch, group, group * channels + first, int(minimum<int64_t>(kLanes, channels - first))};
}

// Steps [begin, end) of a block of channels, as vectors.
template <class T>
VK_INLINE void load_tile(const View& view, const Block& block, int64_t begin, int64_t end, Vec* tile) {
    const T* source = at<const T>(view, block.batch, block.channel, begin);
    const int64_t by_channel = view.stride[1], by_step = view.stride[2];
    if (by_channel == 1 && block.count == kLanes) {
        for (int64_t t = begin; t < end; ++t, source += by_step) *tile++ = load(source);
        return;
    }
    float* lanes = reinterpret_cast<float*>(tile);
    for (int i = 0; i < kLanes; ++i) {
        const T* row = source + minimum(i, block.count - 1) * by_channel;
        for (int64_t t = 0; t < end - begin; ++t) lanes[t * kLanes + i] = to_float(row[t * by_step]);
    }
}

template <class T>
VK_INLINE void store_tile(const View& view, const Block& block, int64_t begin, int64_t end, const Vec* tile) {
    T* target = at<T>(view, block.batch, block.channel, begin);
    const int64_t by_channel = view.stride[1], by_step = view.stride[2];
    if (by_channel == 1 && block.count == kLanes) {
        for (int64_t t = begin; t < end; ++t, target += by_step) store(target, *tile++);
        return;
    }
    const float* lanes = reinterpret_cast<const float*>(tile);
    for (int i = 0; i < block.count; ++i)
        for (int64_t t = 0; t < end - begin; ++t) assign(target + i * by_channel + t * by_step, lanes[t * kLanes + i]);
}

VK_INLINE Vec load_channels(const View* vector, const Block& block) {
    return vector ? load_some(static_cast<const float*>(vector->data) + block.channel, block.count) : Vec{};
}

// A (dim, state), contiguous -> a vector for each state, times log2(e) so that exp(delta A) is a power of two.
VK_INLINE void load_rates(const View& A, const Block& block, int64_t states, Vec* rates) {
    const float* source = static_cast<const float*>(A.data) + block.channel * states;
    for (int64_t n = 0; n < states; ++n) {
        float lanes[kLanes] = {};
        for (int i = 0; i < block.count; ++i) lanes[i] = source[i * states + n] * kLog2E;
        rates[n] = load(lanes);
    }
}

// delta -> step sizes, in place, for a tile whose length is rounded up to whole packs.
VK_INLINE void to_step_sizes(Vec* tile, int64_t count, Vec bias, bool with_softplus) {
    for (int64_t t = 0; t < count; t += kPack) {
        Pack x = load_pack(tile + t);
        VK_EACH x.v[i] += bias;
        store_pack(tile + t, with_softplus ? softplus(x) : x);
    }
}

// decay[n][t] = exp(step[t] A[n]) for a tile.
VK_INLINE void decays(const Vec* step, int64_t count, const Vec* rates, int64_t states, Vec* decay) {
    for (int64_t n = 0; n < states; ++n, decay += kTile)
        for (int64_t t = 0; t < count; t += kPack) {
            Pack x = load_pack(step + t);
            VK_EACH x.v[i] *= rates[n];
            store_pack(decay + t, exp2(x));
        }
}

// The recurrence of `Count` states over a tile: out += C h. They stay in registers.
template <int Count>
VK_INLINE void recur(const Vec* decay, const Vec* drive, const float* b, int64_t b_step, const float* c,
                     int64_t c_step, int64_t count, Vec* state, Vec* out) {
    Vec h[Count];
#pragma GCC unroll 8
    for (int n = 0; n < Count; ++n) h[n] = state[n];
    for (int64_t t = 0; t < count; ++t, b += b_step, c += c_step) {
        Vec total[2] = {out[t], Vec{}};
#pragma GCC unroll 8
        for (int n = 0; n < Count; ++n) {
            h[n] = decay[n * kTile + t] * h[n] + drive[t] * b[n];
            total[n % 2] += h[n] * c[n];
        }
        out[t] = total[0] + total[1];
    }
#pragma GCC unroll 8
    for (int n = 0; n < Count; ++n) state[n] = h[n];
}

// One block of channels over all steps.
template <class T, class Out>
void forward_block(const View& u, const View& delta, const View& A, const View& B, const View& C, const View* D,
                   const View* bias, bool with_softplus, const View& y, const Shape& shape, const Block& block) {
    const int64_t states = shape.states, b_step = B.stride[2], c_step = C.stride[2];
    Scratch scratch((2 + kTile) * states + 3 * kTile);
    Vec* rates = scratch.take(states);
    Vec* state = scratch.take(states);
    Vec* decay = scratch.take(states * kTile);
    Vec* x = scratch.take(kTile);
    Vec* step = scratch.take(kTile);
    Vec* out = scratch.take(kTile);
    load_rates(A, block, states, rates);
    for (int64_t n = 0; n < states; ++n) state[n] = Vec{};
    const Vec skip = load_channels(D, block), offset = load_channels(bias, block);
    const float* b = at<const float>(B, block.batch, block.group);
    const float* c = at<const float>(C, block.batch, block.group);

    for (int64_t begin = 0; begin < shape.length; begin += kTile) {
        const int64_t end = minimum(begin + kTile, shape.length), count = end - begin;
        load_tile<T>(u, block, begin, end, x);
        load_tile<T>(delta, block, begin, end, step);
        to_step_sizes(step, count, offset, with_softplus);
        decays(step, count, rates, states, decay);
        for (int64_t t = 0; t < count; ++t) {
            out[t] = skip * x[t];
            x[t] *= step[t];
        }
        int64_t n = 0;
        for (; n + 8 <= states; n += 8)
            recur<8>(decay + n * kTile, x, b + n, b_step, c + n, c_step, count, state + n, out);
        if (n + 4 <= states) {
            recur<4>(decay + n * kTile, x, b + n, b_step, c + n, c_step, count, state + n, out);
            n += 4;
        }
        for (; n < states; ++n)
            recur<1>(decay + n * kTile, x, b + n, b_step, c + n, c_step, count, state + n, out);
        b += count * b_step, c += count * c_step;
        store_tile<Out>(y, block, begin, end, out);
    }
}

template <class T, class Out>
void forward(const View& u, const View& delta, const View& A, const View& B, const View& C, const View* D,
             const View* bias, bool with_softplus, const View& y) {
    const Shape shape = shape_of(u, B);
    const int64_t blocks = shape.blocks_per_group();
    parallel_for(shape.batch * shape.groups * blocks, [&](int64_t task) {
        const int64_t pair = task / blocks;
        const Block block = block_of(shape, pair / shape.groups, pair % shape.groups, task % blocks);
        forward_block<T, Out>(u, delta, A, B, C, D, bias, with_softplus, y, shape, block);
    });
}

}  // namespace

VK_ENTRY(selective_scan_forward)
(const View* u, const View* delta, const View* A, const View* B, const View* C, const View* D, const View* bias,
 int64_t with_softplus, const View* y) {
    auto run = u->dtype == kFloat32   ? (y->dtype == kFloat32 ? forward<float, float> : forward<float, BFloat16>)
               : y->dtype == kFloat32 ? forward<BFloat16, float>
                                      : forward<BFloat16, BFloat16>;
    run(*u, *delta, *A, *B, *C, D, bias, with_softplus, *y);
}
