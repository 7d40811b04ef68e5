// What Python hands over: one View for each tensor, a null pointer for an absent one. Mirrors views.py.
#pragma once
#include <cstdint>

enum DType : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct View {
    void* data;
    int64_t dtype;
    int64_t size[5];
    int64_t stride[5];  // in elements
};
