// What Python hands over: one View for each tensor, a null pointer for an absent one. Mirrors native.py.
#pragma once
#include <cstdint>

enum DType : int64_t { kFloat32 = 0, kBFloat16 = 1 };

struct View {
    void* data;
    int64_t dtype;
    int64_t size[5];
    int64_t stride[5];  // in elements
};

// torch_parallel_for of libtorch: runs body(begin, end, context) on all threads of torch's pool.
using ParallelFor = int (*)(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void*);
extern "C" ParallelFor vision_kernels_parallel_for;
