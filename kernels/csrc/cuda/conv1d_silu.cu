// Depthwise convolution over time and SiLU. Definition: ../../vision_kernels/conv1d_silu.
#include "launch.h"

namespace {

constexpr int kThreads = 256;

struct Shape {
    int64_t batch, length, dim, taps;
};

template <class T>
__global__ void __launch_bounds__(kThreads) forward(const T* x, const float* weight, T* y, Shape shape, int64_t by_batch,
                                                    int64_t by_step, int64_t by_channel) {
    const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (index >= shape.batch * shape.length * shape.dim) return;
    const int64_t channel = index % shape.dim, t = index / shape.dim % shape.length, batch = index / shape.dim / shape.length;
    const T* source = x + batch * by_batch + channel * by_channel;
    float sum = 0;
    for (int64_t k = 0; k < shape.taps; ++k) {
        const int64_t at = t + k - (shape.taps - 1) / 2;
        if (at >= 0 && at < shape.length) sum += weight[channel * shape.taps + k] * to_float(source[at * by_step]);
    }
    assign(y + index, sum / (1 + __expf(-sum)));
}

}  // namespace

VK_ENTRY(conv1d_silu_forward)(void* stream, const View* x, const View* weight, const View* y) {
    const Shape shape{x->size[0], x->size[1], x->size[2], weight->size[1]};
    const int64_t elements = shape.batch * shape.length * shape.dim;
    return for_type(x->dtype, [&](auto type) {
        using T = decltype(type);
        return launch(forward<T>, unsigned((elements + kThreads - 1) / kThreads), kThreads, 0, stream,
                      static_cast<const T*>(x->data), static_cast<const float*>(weight->data), static_cast<T*>(y->data),
                      shape, x->stride[0], x->stride[1], x->stride[2]);
    });
}
