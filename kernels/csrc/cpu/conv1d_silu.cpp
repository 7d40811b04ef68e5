// Short depthwise convolution over time, then SiLU; channels are adjacent in memory. One lane per channel.
// Definition: ../../vision_kernels/conv1d_silu.
#include "simd.h"

namespace {

struct Sizes {
    int64_t batch, length, dim, taps, chunks;
    int64_t before() const { return (taps - 1) / 2; }  // taps that look back
    int64_t begin(int64_t chunk) const { return length * chunk / chunks; }
    int64_t vectors() const { return (dim + kLanes * kPack - 1) / (kLanes * kPack) * kPack; }
};

// (dim, taps) -> vectors for each tap, zero beyond dim.
VK_INLINE void load_weight(const View& weight, const Sizes& sizes, Vec* out) {
    float* lanes = reinterpret_cast<float*>(out);
    for (int64_t k = 0; k < sizes.taps; ++k)
        for (int64_t d = 0; d < sizes.vectors() * kLanes; ++d)
            *lanes++ = d < sizes.dim ? *at<const float>(weight, d, k) : 0.0f;
}

template <class T>
VK_INLINE Pack load_row(const T* row, int64_t first, int64_t dim) {
    Pack x;
    VK_EACH {
        const int64_t lane = first + i * kLanes;
        x.v[i] = lane < dim ? load_some(row + lane, int(minimum<int64_t>(kLanes, dim - lane))) : Vec{};
    }
    return x;
}
template <class T>
VK_INLINE void store_row(T* row, int64_t first, int64_t dim, const Pack& x) {
    VK_EACH {
        const int64_t lane = first + i * kLanes;
        if (lane < dim) store_some(row + lane, x.v[i], int(minimum<int64_t>(kLanes, dim - lane)));
    }
}

// The convolution at step t, for one pack of channels.
template <class T>
VK_INLINE Pack convolve(const View& x, const Sizes& sizes, const Vec* weight, int64_t batch, int64_t t,
                        int64_t vector) {
    Pack out;
    VK_EACH out.v[i] = Vec{};
    for (int64_t k = 0; k < sizes.taps; ++k) {
        const int64_t from = t + k - sizes.before();
        if (from < 0 || from >= sizes.length) continue;
        const Pack in = load_row(at<const T>(x, batch, from), vector * kLanes, sizes.dim);
        const Vec* w = weight + k * sizes.vectors() + vector;
        VK_EACH out.v[i] += in.v[i] * w[i];
    }
    return out;
}

template <class T>
Status forward(const View& x, const View& weight, const View& y, const Sizes& sizes) {
    return parallel_for(sizes.batch * sizes.chunks, [&](int64_t task) {
        const int64_t batch = task / sizes.chunks, chunk = task % sizes.chunks;
        Scratch scratch(times(sizes.taps, sizes.vectors()));
        if (!scratch) return false;
        Vec* w = scratch.take(sizes.taps * sizes.vectors());
        load_weight(weight, sizes, w);
        for (int64_t t = sizes.begin(chunk); t < sizes.begin(chunk + 1); ++t)
            for (int64_t v = 0; v < sizes.vectors(); v += kPack) {
                const Pack s = convolve<T>(x, sizes, w, batch, t, v);
                store_row(at<T>(y, batch, t), v * kLanes, sizes.dim, silu(s, sigmoid(s)));
            }
        return true;
    });
}

// grad_weight (batch, chunks, taps, dim) are partial sums, reduced in Python. The gradient of the convolution's output
// is recomputed for the few steps before and after a chunk, so that chunks depend only on the inputs.
template <class T>
Status backward(const View& grad_y, const View& x, const View& weight, const View& grad_x, const View& grad_weight,
                const Sizes& sizes) {
    return parallel_for(sizes.batch * sizes.chunks, [&](int64_t task) {
        const int64_t batch = task / sizes.chunks, chunk = task % sizes.chunks, width = sizes.vectors();
        const int64_t begin = sizes.begin(chunk), end = sizes.begin(chunk + 1);
        const int64_t first = maximum<int64_t>(0, begin + sizes.before() - (sizes.taps - 1));
        const int64_t last = minimum(sizes.length, end + sizes.before());
        Scratch scratch(times(2 * sizes.taps + last - first, width));
        if (!scratch) return false;
        Vec* w = scratch.take(sizes.taps * width);
        Vec* of_weight = scratch.take(sizes.taps * width);
        Vec* of_sum = scratch.take((last - first) * width);
        load_weight(weight, sizes, w);
        for (int64_t i = 0; i < sizes.taps * width; ++i) of_weight[i] = Vec{};

        for (int64_t t = first; t < last; ++t)
            for (int64_t v = 0; v < width; v += kPack) {
                const Pack s = convolve<T>(x, sizes, w, batch, t, v), slope = silu_slope(s, sigmoid(s));
                Pack g = load_row(at<const T>(grad_y, batch, t), v * kLanes, sizes.dim);
                VK_EACH g.v[i] *= slope.v[i];
                store_pack(of_sum + (t - first) * width + v, g);
            }
        for (int64_t t = begin; t < end; ++t)
            for (int64_t v = 0; v < width; v += kPack) {
                Pack of_x;
                VK_EACH of_x.v[i] = Vec{};
                const Pack in = load_row(at<const T>(x, batch, t), v * kLanes, sizes.dim);
                for (int64_t k = 0; k < sizes.taps; ++k) {
                    const int64_t to = t - k + sizes.before();
                    if (to < 0 || to >= sizes.length) continue;
                    const Vec *g = of_sum + (to - first) * width + v, *tap = w + k * width + v;
                    Vec* sum = of_weight + k * width + v;
                    VK_EACH {
                        of_x.v[i] += g[i] * tap[i];
                        sum[i] += g[i] * in.v[i];
                    }
                }
                store_row(at<T>(grad_x, batch, t), v * kLanes, sizes.dim, of_x);
            }
        for (int64_t k = 0; k < sizes.taps; ++k)
            for (int64_t v = 0; v < width; v += kPack)
                store_row(at<float>(grad_weight, batch, chunk, k), v * kLanes, sizes.dim,
                          load_pack(of_weight + k * width + v));
        return true;
    });
}

Sizes sizes_of(const View& x, const View& weight, int64_t chunks) {
    return {x.size[0], x.size[1], x.size[2], weight.size[1], chunks};
}

}  // namespace

// x, y (batch, length, dim) of one type with dim adjacent, weight (dim, taps) float32.
VK_ENTRY(conv1d_silu_forward)
(const View* x, const View* weight, const View* y, int64_t chunks) {
    auto run = x->dtype == kFloat32 ? forward<float> : forward<BFloat16>;
    return run(*x, *weight, *y, sizes_of(*x, *weight, chunks));
}

VK_ENTRY(conv1d_silu_backward)
(const View* grad_y, const View* x, const View* weight, const View* grad_x, const View* grad_weight, int64_t chunks) {
    auto run = x->dtype == kFloat32 ? backward<float> : backward<BFloat16>;
    return run(*grad_y, *x, *weight, *grad_x, *grad_weight, sizes_of(*x, *weight, chunks));
}
