// Checks whether this library has code for the current GPU.
#include "launch.h"

namespace {
__global__ void nothing() {}
}  // namespace

VK_ENTRY(vision_kernels_probe)(void*, const View*) {
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, nothing);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
