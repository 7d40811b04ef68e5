// The part of the library that is compiled once: processor features, torch's thread pool, and thread-local memory.
#include "thread_pool.h"

#include <cstdlib>

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

ParallelFor vision_kernels_parallel_for = nullptr;

namespace {

constexpr uint64_t kCacheLine = 64;

struct Memory {
    void* block = nullptr;
    uint64_t capacity = 0;
    ~Memory() { std::free(block); }
};
thread_local Memory memory;

}  // namespace

extern "C" void* vision_kernels_scratch(uint64_t count, uint64_t bytes) {
    uint64_t size;
    if (__builtin_mul_overflow(count, bytes, &size) || __builtin_add_overflow(size, kCacheLine, &size)) return nullptr;
    if (size > memory.capacity) {
        std::free(memory.block);
        memory.block = std::malloc(size);
        memory.capacity = memory.block ? size : 0;
    }
    if (!memory.block) return nullptr;
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.block) + kCacheLine - 1) / kCacheLine * kCacheLine);
}

EXPORT void vision_kernels_use_thread_pool(ParallelFor parallel_for) { vision_kernels_parallel_for = parallel_for; }

EXPORT int vision_kernels_has_avx2() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return 0;
#endif
}

EXPORT int vision_kernels_has_avx512() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
    return 0;
#endif
}
