// Sums of what the blocks of a kernel found, in a fixed order.
#pragma once
#include "../view.h"

struct Parts {
    const float* parts;  // (count, elements)
    int64_t count, elements;
    void* sum;  // (elements), of type dtype
    int64_t dtype;
};

constexpr int kMostTensors = 5;

// Sums up all tensors at once. Returns what went wrong, or null.
const char* sum_parts(const Parts (&tensors)[kMostTensors], void* stream);

// The sum over the leading dimension of `parts` goes to `sum`, of `dims` dimensions, both contiguous. No work if
// absent.
inline Parts parts_of(const View* parts, const View* sum, int dims) {
    if (!parts || !sum) return {};
    int64_t elements = 1;
    for (int i = 0; i < dims; ++i) elements *= sum->size[i];
    return {static_cast<const float*>(parts->data), parts->size[0], elements, sum->data, sum->dtype};
}
