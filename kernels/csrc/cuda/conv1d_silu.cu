// Depthwise convolution over time and SiLU. Definition: ../../vision_kernels/conv1d_silu.
//
// A thread has a few neighbouring channels and consecutive steps, whose inputs it requests together, as vectors. Other
// layouts and numbers of taps take a slower path, element by element.
#include "elements.h"
#include "functions.h"
#include "sum_parts.h"

namespace {

constexpr int kThreads = 256;
constexpr int kSteps = 8;            // consecutive steps of a thread of the forward pass
constexpr int kBackwardSteps = 4;    // the same in the backward pass, which keeps more per step
constexpr int kBlockChannels = 128;  // of a block of the backward pass

struct Shape {
    int64_t batch, length, dim;
    int taps, before;  // taps that look back
};

struct Tensors {
    Signal x, grad_y, out;  // out: y or the gradient of x
    Row weight;             // (dim, taps), by channel
    int64_t by_tap;
    float* parts;  // of the gradient of the weight, (batch x spans, dim, taps)
    int64_t span;  // steps of a part
};

__device__ __forceinline__ float weight_of(const Tensors& all, int64_t channel, int tap) {
    return float_of(load_bits(all.weight.data + (channel * all.weight.stride + tap * all.by_tap) * bytes_of(all.weight.dtype),
                              all.weight.dtype),
                    all.weight.dtype);
}

template <int Taps>
__device__ __forceinline__ void load_weights(const Tensors& all, int64_t channel, float (&weight)[Taps][kVector]) {
#pragma unroll
    for (int k = 0; k < Taps; ++k)
#pragma unroll
        for (int i = 0; i < kVector; ++i) weight[k][i] = weight_of(all, channel + i, k);
}

// Tells the compiler the conditions that hold here.
__device__ __forceinline__ Tensors with_vectors(Tensors all) {
    all.x.vectors = all.grad_y.vectors = all.out.vectors = true;
    return all;
}

// Four channels from `channel` on at a step, zero beyond the ends.
__device__ __forceinline__ Raw load_step(const Signal& signal, const Shape& shape, int64_t batch, int64_t channel, int64_t t) {
    return load(signal, signal.at(batch, channel, t), t >= 0 && t < shape.length ? kVector : 0);
}

template <int Taps>
__global__ void __launch_bounds__(kThreads) forward(const Tensors given, const Shape shape) {
    const Tensors all = with_vectors(given);
    // 32 bits suffice for the tiles of any tensor that fits into memory, and divide faster than 64.
    const unsigned vectors = unsigned(shape.dim / kVector), tiles = unsigned((shape.length + kSteps - 1) / kSteps);
    const unsigned index = blockIdx.x * kThreads + threadIdx.x, row = index / vectors;
    const int64_t channel = index % vectors * kVector, t0 = int64_t(row % tiles) * kSteps, batch = row / tiles;
    if (batch >= shape.batch) return;
    constexpr int before = (Taps - 1) / 2;
    Raw raw[kSteps + Taps - 1];
#pragma unroll
    for (int i = 0; i < kSteps + Taps - 1; ++i) raw[i] = load_step(all.x, shape, batch, channel, t0 + i - before);
    float weight[Taps][kVector];
    load_weights(all, channel, weight);
    float x[Taps][kVector];  // of step t + k - before at index (t + k) % Taps
#pragma unroll
    for (int i = 0; i < Taps - 1; ++i) to_floats(raw[i], all.x.dtype, x[i]);
#pragma unroll
    for (int t = 0; t < kSteps; ++t) {
        to_floats(raw[t + Taps - 1], all.x.dtype, x[(t + Taps - 1) % Taps]);
        float y[kVector];
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
            float sum = 0;
#pragma unroll
            for (int k = 0; k < Taps; ++k) sum += weight[k][i] * x[(t + k) % Taps][i];
            y[i] = silu(sum);
        }
        store(all.out, all.out.at(batch, channel, t0 + t), t0 + t < shape.length ? kVector : 0, y);
    }
}

// Gradients from kBackwardSteps steps. With g_t the gradient of the convolution's output, that of x_t is the sum of
// weight_k g_{t - k + before}, so g is computed for a few steps more.
template <int Taps>
__device__ __forceinline__ void backward_steps(const Tensors& all, const Shape& shape, int64_t batch, int64_t channel,
                                               int64_t t0, const float (&weight)[Taps][kVector],
                                               float (&grad_weight)[Taps][kVector]) {
    constexpr int before = (Taps - 1) / 2, after = Taps - 1 - before, halo = Taps - 1;
    Raw raw_x[kBackwardSteps + 2 * halo], raw_g[kBackwardSteps + halo];  // from steps t0 - after - before and t0 - after on
#pragma unroll
    for (int i = 0; i < kBackwardSteps + 2 * halo; ++i) raw_x[i] = load_step(all.x, shape, batch, channel, t0 + i - halo);
#pragma unroll
    for (int i = 0; i < kBackwardSteps + halo; ++i) raw_g[i] = load_step(all.grad_y, shape, batch, channel, t0 + i - after);
    float x[Taps][kVector], g[Taps][kVector];  // as in `forward`
#pragma unroll
    for (int i = 0; i < halo; ++i) to_floats(raw_x[i], all.x.dtype, x[i]);
#pragma unroll
    for (int j = 0; j < kBackwardSteps + halo; ++j) {  // g of step t0 + j - after
        to_floats(raw_x[j + halo], all.x.dtype, x[(j + halo) % Taps]);
        to_floats(raw_g[j], all.grad_y.dtype, g[j % Taps]);
        const bool own = j >= after && j < after + kBackwardSteps;  // the others belong to another thread
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
            float sum = 0;
#pragma unroll
            for (int k = 0; k < Taps; ++k) sum += weight[k][i] * x[(j + k) % Taps][i];
            g[j % Taps][i] *= silu_slope(sum);
#pragma unroll
            for (int k = 0; k < Taps; ++k)
                if (own) grad_weight[k][i] += g[j % Taps][i] * x[(j + k) % Taps][i];
        }
        if (j < halo) continue;
        const int64_t t = t0 + j - halo;
        float grad_x[kVector];
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
            grad_x[i] = 0;
#pragma unroll
            for (int k = 0; k < Taps; ++k) grad_x[i] += weight[k][i] * g[(j - k) % Taps][i];
        }
        store(all.out, all.out.at(batch, channel, t), t < shape.length ? kVector : 0, grad_x);
    }
}

template <int Taps>
__global__ void __launch_bounds__(kThreads, Taps == 3 ? 2 : 1) backward(const Tensors given, const Shape shape) {
    const Tensors all = with_vectors(given);
    constexpr int kAcross = kBlockChannels / kVector, kRows = kThreads / kAcross;
    __shared__ float parts[kRows][Taps][kBlockChannels];
    const int lane = threadIdx.x % kAcross, row = threadIdx.x / kAcross;
    const int64_t blocks = (shape.dim + kBlockChannels - 1) / kBlockChannels;
    const int64_t first = blockIdx.x % blocks * kBlockChannels, part = blockIdx.x / blocks;
    const int64_t spans = (shape.length + all.span - 1) / all.span;
    const int64_t batch = part / spans, begin = part % spans * all.span, channel = first + lane * kVector;
    float grad_weight[Taps][kVector] = {};
    if (channel < shape.dim) {
        float weight[Taps][kVector];
        load_weights(all, channel, weight);
        for (int64_t t = begin + row * kBackwardSteps; t < begin + all.span && t < shape.length; t += kRows * kBackwardSteps)
            backward_steps<Taps>(all, shape, batch, channel, t, weight, grad_weight);
    }
#pragma unroll
    for (int k = 0; k < Taps; ++k)
#pragma unroll
        for (int i = 0; i < kVector; ++i) parts[row][k][lane * kVector + i] = grad_weight[k][i];
    __syncthreads();
    for (int i = threadIdx.x; i < kBlockChannels * Taps; i += kThreads) {
        const int own = i / Taps, tap = i % Taps;
        if (first + own >= shape.dim) break;
        float sum = 0;
        for (int other = 0; other < kRows; ++other) sum += parts[other][tap][own];
        all.parts[(part * shape.dim + first + own) * Taps + tap] = sum;
    }
}

// Any strides and number of taps.

__device__ float element(const Signal& signal, int64_t batch, int64_t channel, int64_t t) {
    return float_of(load_bits(signal.at(batch, channel, t), signal.dtype), signal.dtype);
}

__device__ float x_at(const Tensors& all, const Shape& shape, int64_t batch, int64_t channel, int64_t t) {
    return t >= 0 && t < shape.length ? element(all.x, batch, channel, t) : 0;
}

__device__ float convolved(const Tensors& all, const Shape& shape, int64_t batch, int64_t channel, int64_t t) {
    float sum = 0;
    for (int k = 0; k < shape.taps; ++k)
        sum += weight_of(all, channel, k) * x_at(all, shape, batch, channel, t + k - shape.before);
    return sum;
}

__device__ float grad_convolved(const Tensors& all, const Shape& shape, int64_t batch, int64_t channel, int64_t t) {
    if (t < 0 || t >= shape.length) return 0;
    return element(all.grad_y, batch, channel, t) * silu_slope(convolved(all, shape, batch, channel, t));
}

// y, or the gradient of x.
__global__ void __launch_bounds__(kThreads) each_element(const Tensors all, const Shape shape, bool is_backward) {
    const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (index >= shape.batch * shape.length * shape.dim) return;
    const int64_t channel = index % shape.dim, t = index / shape.dim % shape.length;
    const int64_t batch = index / shape.dim / shape.length;
    float result = 0;
    if (is_backward)
        for (int k = 0; k < shape.taps; ++k)
            result += weight_of(all, channel, k) * grad_convolved(all, shape, batch, channel, t - k + shape.before);
    else
        result = silu(convolved(all, shape, batch, channel, t));
    const float values[kVector] = {result};
    Signal single = all.out;
    single.vectors = false;
    store(single, single.at(batch, channel, t), 1, values);
}

// Parts of the gradient of the weight: a thread for each of (batch x spans, dim, taps).
__global__ void __launch_bounds__(kThreads) each_weight(const Tensors all, const Shape shape) {
    const int64_t spans = (shape.length + all.span - 1) / all.span;
    const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (index >= shape.batch * spans * shape.dim * shape.taps) return;
    const int tap = int(index % shape.taps);
    const int64_t channel = index / shape.taps % shape.dim, part = index / shape.taps / shape.dim;
    const int64_t batch = part / spans, begin = part % spans * all.span;
    float sum = 0;
    for (int64_t t = begin; t < begin + all.span && t < shape.length; ++t)
        sum += grad_convolved(all, shape, batch, channel, t) * x_at(all, shape, batch, channel, t + tap - shape.before);
    all.parts[index] = sum;
}

struct Call {
    Shape shape;
    Tensors tensors;
    bool vectors;
};

Call call_of(const View* x, const View* weight, const View* grad_y, const View* out) {
    const int taps = int(weight->size[1]);
    const bool divisible = x->size[2] % kVector == 0;
    Call call{{x->size[0], x->size[1], x->size[2], taps, (taps - 1) / 2}, {}, false};
    call.tensors.x = signal_of(*x, true, false, divisible);
    call.tensors.out = signal_of(*out, true, false, divisible);
    call.tensors.weight = row_of(weight, 0);
    call.tensors.by_tap = weight->stride[1];
    if (grad_y) call.tensors.grad_y = signal_of(*grad_y, true, false, divisible);
    call.vectors = call.tensors.x.vectors && call.tensors.out.vectors && (!grad_y || call.tensors.grad_y.vectors);
    return call;
}

unsigned blocks_for(int64_t threads) { return unsigned((threads + kThreads - 1) / kThreads); }

}  // namespace

VK_ENTRY(conv1d_silu_forward)(void* stream, const View* x, const View* weight, const View* y) {
    const Call call = call_of(x, weight, nullptr, y);
    const Shape& shape = call.shape;
    const int64_t tiles = shape.batch * ((shape.length + kSteps - 1) / kSteps) * (shape.dim / kVector);
    if (call.vectors && shape.taps == 3) return launch(forward<3>, blocks_for(tiles), kThreads, 0, stream, call.tensors, shape);
    if (call.vectors && shape.taps == 4) return launch(forward<4>, blocks_for(tiles), kThreads, 0, stream, call.tensors, shape);
    const unsigned blocks = blocks_for(shape.batch * shape.length * shape.dim);
    return launch(each_element, blocks, kThreads, 0, stream, call.tensors, shape, false);
}

// parts: (batch x spans, dim, taps) in float32, for spans of `span` steps.
VK_ENTRY(conv1d_silu_backward)(void* stream, const View* grad_y, const View* x, const View* weight, const View* grad_x,
                               const View* grad_weight, const View* parts, int64_t span) {
    Call call = call_of(x, weight, grad_y, grad_x);
    const Shape& shape = call.shape;
    call.tensors.parts = static_cast<float*>(parts->data);
    call.tensors.span = span;
    const int64_t blocks = parts->size[0] * ((shape.dim + kBlockChannels - 1) / kBlockChannels);
    const char* error = nullptr;
    if (call.vectors && (shape.taps == 3 || shape.taps == 4)) {
        error = launch(shape.taps == 3 ? backward<3> : backward<4>, unsigned(blocks), kThreads, 0, stream, call.tensors, shape);
    } else {
        error = launch(each_element, blocks_for(shape.batch * shape.length * shape.dim), kThreads, 0, stream, call.tensors,
                       shape, true);
        if (!error)
            error = launch(each_weight, blocks_for(parts->size[0] * shape.dim * shape.taps), kThreads, 0, stream,
                           call.tensors, shape);
    }
    return error ? error : sum_parts({parts_of(parts, grad_weight, 2)}, stream);
}
