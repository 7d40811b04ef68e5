// The thread pool that all kernels share.
#pragma once
#include <cstdint>

// torch_parallel_for of libtorch: runs body(begin, end, context) on all threads of torch's pool.
using ParallelFor = int (*)(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void*);
extern "C" ParallelFor vision_kernels_parallel_for;
