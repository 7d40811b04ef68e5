// Sums over parts: see sum_parts.h.
#include "sum_parts.h"

#include "elements.h"

namespace {

constexpr int kElements = 32, kSlices = 8;  // of a block: a slice takes every eighth part

struct Tensors {
    Parts tensors[kMostTensors];
};

__global__ void __launch_bounds__(kElements* kSlices) sums(Tensors all) {
    const Parts& tensor = all.tensors[blockIdx.y];
    __shared__ float slices[kSlices][kElements];
    const int lane = threadIdx.x % kElements, slice = threadIdx.x / kElements;
    const int64_t index = int64_t(blockIdx.x) * kElements + lane;
    float sum = 0;
    if (index < tensor.elements) {
#pragma unroll 4
        for (int64_t part = slice; part < tensor.count; part += kSlices) sum += tensor.parts[part * tensor.elements + index];
    }
    slices[slice][lane] = sum;
    __syncthreads();
    if (slice > 0 || index >= tensor.elements) return;
    for (int other = 1; other < kSlices; ++other) sum += slices[other][lane];
    if (tensor.dtype == kFloat32)
        static_cast<float*>(tensor.sum)[index] = sum;
    else
        static_cast<unsigned short*>(tensor.sum)[index] = static_cast<unsigned short>(bits_of(sum, int(tensor.dtype)));
}

}  // namespace

const char* sum_parts(const Parts (&tensors)[kMostTensors], void* stream) {
    Tensors all{};
    int64_t largest = 0;
    unsigned count = 0;
    for (const Parts& each : tensors) {
        if (each.elements == 0) continue;
        all.tensors[count++] = each;
        largest = each.elements > largest ? each.elements : largest;
    }
    return launch(sums, dim3(unsigned((largest + kElements - 1) / kElements), count), kElements * kSlices, 0, stream, all);
}
