// Selective scan: one lane per channel, step by step. Definition: ../../vision_kernels/selective_scan.
//
// u, delta, y and their gradients are (batch, dim, length), or transposed views of (batch, length, dim), with any
// strides. Where channels or steps are adjacent in memory they are read as vectors, otherwise lane by lane. B and C are
// float32 with adjacent states.
#include "lanes.h"

namespace {

constexpr int kTile = 32;                // steps that the forward pass prepares together
constexpr int64_t kChunkVectors = 8192;  // kept by the backward pass for a chunk of steps; fits into the L2 cache

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

// `count` steps from `begin` on of a block of channels, as vectors; lanes beyond the block are zero.
template <class T>
VK_INLINE void load_tile(const View& view, const Block& block, int64_t begin, int64_t count, Vec* tile) {
    const T* source = at<const T>(view, block.batch, block.channel, begin);
    const int64_t by_channel = view.stride[1], by_step = view.stride[2];
    int64_t t = 0;
    if (block.count == kLanes && by_channel == 1)
        for (; t < count; ++t) tile[t] = load(source + t * by_step);
    if (block.count == kLanes && by_step == 1)
        for (; t + kLanes <= count; t += kLanes) {
            for (int i = 0; i < kLanes; ++i) tile[t + i] = load(source + i * by_channel + t);
            transpose(tile + t);
        }
    for (; t < count; ++t) {
        float lanes[kLanes] = {};
        for (int i = 0; i < block.count; ++i) lanes[i] = to_float(source[i * by_channel + t * by_step]);
        tile[t] = load(lanes);
    }
}

// The tile is overwritten.
template <class T>
VK_INLINE void store_tile(const View& view, const Block& block, int64_t begin, int64_t count, Vec* tile) {
    T* target = at<T>(view, block.batch, block.channel, begin);
    const int64_t by_channel = view.stride[1], by_step = view.stride[2];
    int64_t t = 0;
    if (block.count == kLanes && by_channel == 1)
        for (; t < count; ++t) store(target + t * by_step, tile[t]);
    if (block.count == kLanes && by_step == 1)
        for (; t + kLanes <= count; t += kLanes) {
            transpose(tile + t);
            for (int i = 0; i < kLanes; ++i) store(target + i * by_channel + t, tile[t + i]);
        }
    const float* lanes = reinterpret_cast<const float*>(tile);
    for (; t < count; ++t)
        for (int i = 0; i < block.count; ++i) assign(target + i * by_channel + t * by_step, lanes[t * kLanes + i]);
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
        rates[n] = finite(load(lanes));
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

// decay[n][t] = exp(step[t] A[n]) for a tile; `pitch` vectors from one state to the next.
VK_INLINE void decays(const Vec* step, int64_t count, const Vec* rates, int64_t states, Vec* decay, int64_t pitch) {
    for (int64_t n = 0; n < states; ++n, decay += pitch)
        for (int64_t t = 0; t < count; t += kPack) {
            Pack x = load_pack(step + t);
            VK_EACH x.v[i] *= rates[n];
            store_pack(decay + t, exp2(x));
        }
}

// B and C of one group: the states of a step are adjacent.
struct Couplings {
    const float* values;
    int64_t by_step;
    Couplings(const View& view, const Block& block)
        : values(at<const float>(view, block.batch, block.group)), by_step(view.stride[2]) {}
    const float* step(int64_t t) const { return values + t * by_step; }
};

// Calls body(n, Count) for the states in groups of eight, four and one, with Count known to the compiler.
template <int Count>
struct Number {
    static constexpr int value = Count;
};
template <class Body>
VK_INLINE void for_state_groups(int64_t states, const Body& body) {
    int64_t n = 0;
    for (; n + 8 <= states; n += 8) body(n, Number<8>());
    for (; n + 4 <= states; n += 4) body(n, Number<4>());
    for (; n < states; ++n) body(n, Number<1>());
}

// The recurrence of `Count` states from n on over `count` steps from `begin` on: h = decay h + B drive, in registers.
// use(t, h) sees the states of each step.
template <int Count, class Use>
VK_INLINE void recur(const Vec* decay, int64_t pitch, const Vec* drive, const Couplings& B, int64_t begin,
                     int64_t count, int64_t n, Vec* state, const Use& use) {
    Vec h[Count];
#pragma GCC unroll 8
    for (int i = 0; i < Count; ++i) h[i] = state[n + i];
    for (int64_t t = 0; t < count; ++t) {
        const float* b = B.step(begin + t) + n;
#pragma GCC unroll 8
        for (int i = 0; i < Count; ++i) h[i] = decay[(n + i) * pitch + t] * h[i] + drive[t] * b[i];
        use(t, h);
    }
#pragma GCC unroll 8
    for (int i = 0; i < Count; ++i) state[n + i] = h[i];
}

struct Inputs {
    const View &u, &delta, &A, &B, &C;
    const View *D, *bias;
    bool with_softplus;
    Shape shape;
};

template <class T, class Out>
bool forward_block(const Inputs& in, const View& y, const Block& block) {
    const int64_t states = in.shape.states, length = in.shape.length;
    Scratch scratch((2 + kTile) * states + 3 * kTile);
    if (!scratch) return false;
    Vec* rates = scratch.take(states);
    Vec* state = scratch.take(states);
    Vec* decay = scratch.take(states * kTile);
    Vec* drive = scratch.take(kTile);
    Vec* step = scratch.take(kTile);
    Vec* out = scratch.take(kTile);
    load_rates(in.A, block, states, rates);
    for (int64_t n = 0; n < states; ++n) state[n] = Vec{};
    const Vec skip = load_channels(in.D, block), offset = load_channels(in.bias, block);
    const Couplings B(in.B, block), C(in.C, block);

    for (int64_t begin = 0; begin < length; begin += kTile) {
        const int64_t count = minimum<int64_t>(kTile, length - begin);
        load_tile<T>(in.u, block, begin, count, drive);
        load_tile<T>(in.delta, block, begin, count, step);
        to_step_sizes(step, count, offset, in.with_softplus);
        decays(step, count, rates, states, decay, kTile);
        for (int64_t t = 0; t < count; ++t) {
            out[t] = skip * drive[t];
            drive[t] *= step[t];
        }
        for_state_groups(states, [&](int64_t n, auto group) VK_LAMBDA {
            constexpr int kCount = decltype(group)::value;
            recur<kCount>(decay, kTile, drive, B, begin, count, n, state, [&](int64_t t, const Vec* h) VK_LAMBDA {
                const float* c = C.step(begin + t) + n;
                Vec total[2] = {out[t], Vec{}};  // two sums, so that additions do not depend on each other
#pragma GCC unroll 8
                for (int i = 0; i < kCount; ++i) total[i % 2] += h[i] * c[i];
                out[t] = total[0] + total[1];
            });
        });
        store_tile<Out>(y, block, begin, count, out);
    }
    return true;
}

template <class T, class Out>
Status forward(const Inputs& in, const View& y) {
    const int64_t blocks = in.shape.blocks_per_group();
    return parallel_for(in.shape.batch * in.shape.groups * blocks, [&](int64_t task) {
        const int64_t pair = task / blocks;
        return forward_block<T, Out>(
            in, y, block_of(in.shape, pair / in.shape.groups, pair % in.shape.groups, task % blocks));
    });
}

// Gradients. Those shared by channels or batch entries are partial sums that are reduced in Python, so that the
// result does not depend on the number of threads: A (batch, dim, state), D and bias (batch, dim), B and C (batch,
// groups, splits, length, state), where the channels of a group are split into as many tasks.
struct Gradients {
    const View &y, &u, &delta, &A, &B, &C, &D, &bias;
    int64_t splits() const { return B.size[2]; }
};

// Buffers of the backward pass for a chunk of steps of one block of channels.
struct Chunk {
    int64_t begin, count, pitch;
    Vec *u, *step, *slope, *drive, *grad_y, *grad_drive, *grad_step;  // [t]
    Vec *decay, *states;                                             // [n][t]
};

template <class T>
VK_INLINE void prepare(const Inputs& in, const Block& block, const Vec* rates, Chunk& chunk) {
    load_tile<T>(in.u, block, chunk.begin, chunk.count, chunk.u);
    load_tile<T>(in.delta, block, chunk.begin, chunk.count, chunk.step);
    const Vec offset = load_channels(in.bias, block);
    if (in.with_softplus)
        for (int64_t t = 0; t < chunk.count; t += kPack) {
            Pack x = load_pack(chunk.step + t);
            VK_EACH x.v[i] += offset;
            store_pack(chunk.slope + t, sigmoid(x));
        }
    to_step_sizes(chunk.step, chunk.count, offset, in.with_softplus);
    decays(chunk.step, chunk.count, rates, in.shape.states, chunk.decay, chunk.pitch);
    for (int64_t t = 0; t < chunk.count; ++t) chunk.drive[t] = chunk.step[t] * chunk.u[t];
}

// The reversed recurrence of `Count` states from n on: dh_t = C_t dy_t + decay_{t+1} dh_{t+1}, whose last term `carry`
// holds.
template <int Count>
VK_INLINE void recur_back(const Chunk& chunk, const Couplings& B, const Couplings& C, int64_t states, int64_t n,
                          const Vec* rates, const Vec* start, Vec* carry, Vec* grad_A, Vec* grad_B, Vec* grad_C) {
    Vec later[Count], rate_sum[Count];
    for (int i = 0; i < Count; ++i) later[i] = carry[n + i], rate_sum[i] = grad_A[n + i];
    for (int64_t t = chunk.count; t-- > 0;) {
        const float *b = B.step(chunk.begin + t) + n, *c = C.step(chunk.begin + t) + n;
        const Vec g = chunk.grad_y[t], drive = chunk.drive[t], step = chunk.step[t];
        Vec of_drive = chunk.grad_drive[t], of_step = chunk.grad_step[t];
#pragma GCC unroll 4
        for (int i = 0; i < Count; ++i) {
            const int64_t at_t = (n + i) * chunk.pitch + t;
            const Vec dh = g * c[i] + later[i];
            later[i] = chunk.decay[at_t] * dh;
            const Vec of_exponent = later[i] * (t ? chunk.states[at_t - 1] : start[n + i]);
            grad_B[t * states + n + i] += dh * drive;
            grad_C[t * states + n + i] += g * chunk.states[at_t];
            of_drive += dh * b[i];
            of_step += of_exponent * rates[n + i];
            rate_sum[i] += of_exponent * step;
        }
        chunk.grad_drive[t] = of_drive, chunk.grad_step[t] = of_step;
    }
    for (int i = 0; i < Count; ++i) carry[n + i] = later[i], grad_A[n + i] = rate_sum[i];
}

// Gradients of the inputs of a chunk, from those of drive and of delta A. rates are A log2(e), so grad_step is too.
template <class T>
VK_INLINE void finish(const Inputs& in, const Gradients& out, const Block& block, Chunk& chunk, Vec skip, Vec* grad_D,
                      Vec* grad_bias) {
    for (int64_t t = 0; t < chunk.count; ++t) {
        Vec of_step = chunk.grad_step[t] * (1 / kLog2E) + chunk.grad_drive[t] * chunk.u[t];
        if (in.with_softplus) of_step *= chunk.slope[t];
        *grad_bias += of_step;
        *grad_D += chunk.grad_y[t] * chunk.u[t];
        chunk.grad_drive[t] = chunk.grad_drive[t] * chunk.step[t] + skip * chunk.grad_y[t];
        chunk.grad_step[t] = of_step;
    }
    store_tile<T>(out.u, block, chunk.begin, chunk.count, chunk.grad_drive);
    store_tile<T>(out.delta, block, chunk.begin, chunk.count, chunk.grad_step);
}

VK_INLINE void store_lanes(float* target, int64_t stride, Vec x, int count) {
    float lanes[kLanes];
    store(lanes, x);
    for (int i = 0; i < count; ++i) target[i * stride] = lanes[i];
}

// All steps of the blocks [first, last) of one group.
template <class T, class Grad>
bool backward_task(const Inputs& in, const Gradients& out, int64_t batch, int64_t group, int64_t split) {
    const int64_t states = in.shape.states, length = in.shape.length, blocks = in.shape.blocks_per_group();
    const int64_t first = split * blocks / out.splits(), own = (split + 1) * blocks / out.splits() - first;
    const int64_t limit = maximum<int64_t>(kPack, kChunkVectors / (4 * states + 7));
    const int64_t chunks = (length + limit - 1) / limit;
    const int64_t pitch = chunks ? ((length + chunks - 1) / chunks + kPack - 1) / kPack * kPack : 0;

    Scratch scratch(times(own * states, chunks + 2) + own * 2 + states + pitch * (4 * states + 7));
    if (!scratch) return false;
    Chunk chunk;
    Vec** const per_step[] = {&chunk.u,      &chunk.step,       &chunk.slope,    &chunk.drive,
                              &chunk.grad_y, &chunk.grad_drive, &chunk.grad_step};
    for (Vec** each : per_step) *each = scratch.take(pitch);
    chunk.pitch = pitch;
    chunk.decay = scratch.take(pitch * states);
    chunk.states = scratch.take(pitch * states);
    Vec* grad_B = scratch.take(pitch * states);
    Vec* grad_C = scratch.take(pitch * states);
    Vec* rates = scratch.take(states);
    Vec* starts = scratch.take(own * chunks * states);  // [block][chunk][n]: states before each chunk
    Vec* carry = scratch.take(own * states);
    Vec* grad_A = scratch.take(own * states);
    Vec* grad_D = scratch.take(own);
    Vec* grad_bias = scratch.take(own);
    for (int64_t i = 0; i < own * states; ++i) carry[i] = grad_A[i] = Vec{};
    for (int64_t i = 0; i < own; ++i) grad_D[i] = grad_bias[i] = Vec{};
    auto choose = [&](int64_t index) {
        chunk.begin = minimum(index * pitch, length);
        chunk.count = minimum(pitch, length - chunk.begin);
    };

    for (int64_t k = 0; k < own; ++k) {
        const Block block = block_of(in.shape, batch, group, first + k);
        const Couplings B(in.B, block);
        Vec* start = starts + k * chunks * states;
        load_rates(in.A, block, states, rates);
        for (int64_t n = 0; chunks && n < states; ++n) start[n] = Vec{};
        for (int64_t index = 0; index + 1 < chunks; ++index, start += states) {
            choose(index);
            prepare<T>(in, block, rates, chunk);
            for (int64_t n = 0; n < states; ++n) start[states + n] = start[n];
            for_state_groups(states, [&](int64_t n, auto group_size) VK_LAMBDA {
                recur<decltype(group_size)::value>(chunk.decay, pitch, chunk.drive, B, chunk.begin, chunk.count, n,
                                                   start + states, [](int64_t, const Vec*) VK_LAMBDA {});
            });
        }
    }

    for (int64_t index = chunks; index-- > 0;) {
        choose(index);
        for (int64_t i = 0; i < chunk.count * states; ++i) grad_B[i] = grad_C[i] = Vec{};
        for (int64_t k = 0; k < own; ++k) {
            const Block block = block_of(in.shape, batch, group, first + k);
            const Couplings B(in.B, block), C(in.C, block);
            const Vec* start = starts + (k * chunks + index) * states;
            load_rates(in.A, block, states, rates);
            prepare<T>(in, block, rates, chunk);
            load_tile<Grad>(out.y, block, chunk.begin, chunk.count, chunk.grad_y);
            for (int64_t t = 0; t < chunk.count; ++t) chunk.grad_drive[t] = chunk.grad_step[t] = Vec{};
            for_state_groups(states, [&](int64_t n, auto group_size) VK_LAMBDA {
                constexpr int kCount = decltype(group_size)::value;
                Vec state[kCount];
                for (int i = 0; i < kCount; ++i) state[i] = start[n + i];
                recur<kCount>(chunk.decay, pitch, chunk.drive, B, chunk.begin, chunk.count, n, state - n,
                              [&](int64_t t, const Vec* h) VK_LAMBDA {
#pragma GCC unroll 8
                                  for (int i = 0; i < kCount; ++i) chunk.states[(n + i) * pitch + t] = h[i];
                              });
                constexpr int kHalf = kCount > 4 ? 4 : kCount;
                for (int64_t m = n; m < n + kCount; m += kHalf)
                    recur_back<kHalf>(chunk, B, C, states, m, rates, start, carry + k * states, grad_A + k * states,
                                      grad_B, grad_C);
            });
            finish<T>(in, out, block, chunk, load_channels(in.D, block), grad_D + k, grad_bias + k);
        }
        float* to_B = at<float>(out.B, batch, group, split) + chunk.begin * states;
        float* to_C = at<float>(out.C, batch, group, split) + chunk.begin * states;
        for (int64_t i = 0; i < chunk.count * states; ++i) to_B[i] = sum(grad_B[i]), to_C[i] = sum(grad_C[i]);
    }

    for (int64_t k = 0; k < own; ++k) {
        const Block block = block_of(in.shape, batch, group, first + k);
        for (int64_t n = 0; n < states; ++n)
            store_lanes(at<float>(out.A, batch, block.channel, n), states, grad_A[k * states + n], block.count);
        store_lanes(at<float>(out.D, batch, block.channel), 1, grad_D[k], block.count);
        store_lanes(at<float>(out.bias, batch, block.channel), 1, grad_bias[k], block.count);
    }
    return true;
}

template <class T, class Grad>
Status backward(const Inputs& in, const Gradients& out) {
    const int64_t splits = out.splits(), groups = in.shape.groups;
    return parallel_for(in.shape.batch * groups * splits, [&](int64_t task) {
        return backward_task<T, Grad>(in, out, task / splits / groups, task / splits % groups, task % splits);
    });
}

// The same tensor with two dimensions exchanged.
View turned(const View& view, int first, int second) {
    View result = view;
    result.size[first] = view.size[second], result.size[second] = view.size[first];
    result.stride[first] = view.stride[second], result.stride[second] = view.stride[first];
    return result;
}

}  // namespace

// y <- scan. D and bias may be absent. B and C are (batch, groups, length, state), or (batch, length, groups, state) if
// channels are last.
VK_ENTRY(selective_scan_forward)
(const View* u, const View* delta, const View* A, const View* B, const View* C, const View* D, const View* bias,
 int64_t with_softplus, int64_t channels_last, const View* y) {
    if (channels_last) {
        const View u_ = turned(*u, 1, 2), delta_ = turned(*delta, 1, 2), y_ = turned(*y, 1, 2);
        const View B_ = turned(*B, 1, 2), C_ = turned(*C, 1, 2);
        return VK_JOIN(selective_scan_forward, VK_ISA)(&u_, &delta_, A, &B_, &C_, D, bias, with_softplus, 0, &y_);
    }
    auto run = u->dtype == kFloat32   ? (y->dtype == kFloat32 ? forward<float, float> : forward<float, BFloat16>)
               : y->dtype == kFloat32 ? forward<BFloat16, float>
                                      : forward<BFloat16, BFloat16>;
    return run({*u, *delta, *A, *B, *C, D, bias, with_softplus != 0, shape_of(*u, *B)}, *y);
}

// Gradients of all inputs from that of y; see Gradients. grad_u and grad_delta have the type and layout of u.
VK_ENTRY(selective_scan_backward)
(const View* grad_y, const View* u, const View* delta, const View* A, const View* B, const View* C, const View* D,
 const View* bias, int64_t with_softplus, int64_t channels_last, const View* grad_u, const View* grad_delta,
 const View* grad_A, const View* grad_B, const View* grad_C, const View* grad_D, const View* grad_bias) {
    if (channels_last) {
        const View grad_y_ = turned(*grad_y, 1, 2), u_ = turned(*u, 1, 2), delta_ = turned(*delta, 1, 2);
        const View grad_u_ = turned(*grad_u, 1, 2), grad_delta_ = turned(*grad_delta, 1, 2);
        const View B_ = turned(*B, 1, 2), C_ = turned(*C, 1, 2);
        return VK_JOIN(selective_scan_backward, VK_ISA)(&grad_y_, &u_, &delta_, A, &B_, &C_, D, bias, with_softplus, 0,
                                                        &grad_u_, &grad_delta_, grad_A, grad_B, grad_C, grad_D,
                                                        grad_bias);
    }
    auto run = u->dtype == kFloat32 ? (grad_y->dtype == kFloat32 ? backward<float, float> : backward<float, BFloat16>)
               : grad_y->dtype == kFloat32 ? backward<BFloat16, float>
                                           : backward<BFloat16, BFloat16>;
    return run({*u, *delta, *A, *B, *C, D, bias, with_softplus != 0, shape_of(*u, *B)},
        {*grad_y, *grad_u, *grad_delta, *grad_A, *grad_B, *grad_C, *grad_D, *grad_bias});
}
