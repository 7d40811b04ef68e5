// The part of the library that is compiled once: what the processor can do, and torch's thread pool.
#include "thread_pool.h"

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

ParallelFor vision_kernels_parallel_for = nullptr;

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
