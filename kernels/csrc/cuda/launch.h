// Common parts of all kernels: entry points, launches and element types.
//
// No header of Python or torch. Kernels are launched through cudaLaunchKernelEx instead of <<<>>>, so that a C++
// compiler can build them too: tests/kernels/emulator runs them on the CPU.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../view.h"

// Functions that Python calls: they take a CUDA stream, then views and integers, and return an error message or null.
#define VK_ENTRY(name) extern "C" __attribute__((visibility("default"))) const char* name

// Shared memory of a block, of the size given to `launch`.
#ifndef VK_DYNAMIC_SHARED
#define VK_DYNAMIC_SHARED(Type, name)                             \
    extern __shared__ __align__(16) unsigned char vk_shared[];    \
    Type* const name = reinterpret_cast<Type*>(vk_shared)
#endif

constexpr size_t kSharedWithoutAsking = 48 << 10;  // bytes; for more, a kernel's attribute has to be set

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
                   Arguments... arguments) {
    if (size_t(grid.x) * grid.y * grid.z == 0) return nullptr;
    cudaError_t error = cudaSuccess;
    if (shared_bytes > kSharedWithoutAsking)
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (error == cudaSuccess) {
        cudaLaunchConfig_t config{};
        config.gridDim = grid;
        config.blockDim = block;
        config.dynamicSmemBytes = shared_bytes;
        config.stream = static_cast<cudaStream_t>(stream);
        error = cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
    }
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

__device__ __forceinline__ void assign(float* target, float value) { *target = value; }
__device__ __forceinline__ void assign(__nv_bfloat16* target, float value) { *target = __float2bfloat16_rn(value); }
__device__ __forceinline__ void assign(__half* target, float value) { *target = __float2half_rn(value); }

// Calls body(T()) with the type of a view's elements.
template <class Body>
const char* for_type(int64_t dtype, const Body& body) {
    if (dtype == kFloat32) return body(float());
    if (dtype == kBFloat16) return body(__nv_bfloat16());
    return body(__half());
}
