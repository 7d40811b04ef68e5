// The thread pool and the memory of all kernels.
#pragma once
#include <cstdint>

// torch_parallel_for of libtorch: runs body(begin, end, context) on all threads of torch's pool.
using ParallelFor = int (*)(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void*);
extern "C" ParallelFor vision_kernels_parallel_for;

// At least count * bytes of memory of this thread, aligned to a cache line, whose content is lost with the next call;
// or null. It is freed when the thread ends.
extern "C" void* vision_kernels_scratch(uint64_t count, uint64_t bytes);
