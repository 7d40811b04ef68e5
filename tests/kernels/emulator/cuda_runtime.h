// Replacement for CUDA's header of this name, so that a C++ compiler builds the CUDA kernels for the CPU and their
// arithmetic, indices and barriers are tested without a GPU.
//
// The blocks of a grid run one after another. The threads of a block take turns: each runs until it reaches a barrier or
// a shuffle. Every other round visits the threads in reverse, so that a missing barrier is detected, and a barrier that
// not all threads reach ends the program. Races within a round and the speed cannot be tested.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict
#define __shared__ static
#define __align__(bytes) alignas(bytes)
#define VK_DYNAMIC_SHARED(Type, name) Type* const name = reinterpret_cast<Type*>(emulator::block.shared.data())

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
    return cudaSuccess;
}

struct cudaFuncAttributes {};
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
    return cudaSuccess;
}

inline dim3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

namespace emulator {

constexpr size_t kStack = 256 << 10;

enum class State { kReady, kAtBarrier, kAtWarpBarrier, kDone };

struct Exchanged {
    unsigned words[8];
};

struct Thread {
    State state;
    bool started;
    unsigned exchanges;
    dim3 index;
    jmp_buf place;
    ucontext_t context;
};

struct Block {
    std::vector<Thread> threads;
    std::vector<char> stacks;
    std::vector<unsigned char> shared;
    std::vector<Exchanged> exchanged;  // for each thread, its values in a shuffle and in the next one
    size_t running;
    jmp_buf scheduler;
    void (*body)(void*);
    void* arguments;
};
inline Block block;

inline void wait(State state) {
    Thread& thread = block.threads[block.running];
    thread.state = state;
    if (!_setjmp(thread.place)) _longjmp(block.scheduler, 1);
}

inline void enter() {
    block.body(block.arguments);
    block.threads[block.running].state = State::kDone;
    _longjmp(block.scheduler, 1);
}

inline void resume(size_t index) {
    Thread& thread = block.threads[index];
    block.running = index;
    threadIdx = thread.index;
    if (_setjmp(block.scheduler)) return;
    if (thread.started) _longjmp(thread.place, 1);
    thread.started = true;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = block.stacks.data() + index * kStack;
    thread.context.uc_stack.ss_size = kStack;
    makecontext(&thread.context, enter, 0);
    setcontext(&thread.context);
}

// Resumes the threads at a barrier that all others, of the block or of the warp, have reached or will never reach.
inline bool release(size_t begin, size_t end, State barrier) {
    bool any = false;
    for (size_t i = begin; i < end; ++i) {
        const State state = block.threads[i].state;
        if (state != barrier && state != State::kDone) return false;
        any = any || state == barrier;
    }
    for (size_t i = begin; i < end; ++i)
        if (block.threads[i].state == barrier) block.threads[i].state = State::kReady;
    return any;
}

inline void run_block(size_t count) {
    for (size_t i = 0; i < count; ++i) {
        Thread& thread = block.threads[i];
        thread.state = State::kReady;
        thread.started = false;
        thread.exchanges = 0;
        thread.index = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
    }
    std::fill(block.shared.begin(), block.shared.end(), 0xFF);  // NaN, to detect reads of unwritten memory
    for (size_t round = 0;; ++round) {
        for (size_t i = 0; i < count; ++i) {
            const size_t index = round % 2 ? count - 1 - i : i;
            if (block.threads[index].state == State::kReady) resume(index);
        }
        bool released = release(0, count, State::kAtBarrier), done = true;
        for (size_t warp = 0; warp < count; warp += warpSize)
            released |= release(warp, warp + warpSize < count ? warp + warpSize : count, State::kAtWarpBarrier);
        for (size_t i = 0; i < count; ++i) done = done && block.threads[i].state == State::kDone;
        if (done) return;
        if (!released) {
            fprintf(stderr, "CUDA emulator: the threads of a block wait at different barriers\n");
            abort();
        }
    }
}

// Offers a value to the other threads of the warp. Returns those of all 32, which stay until the thread's next but one
// exchange: nobody can be further ahead, because each exchange waits for all.
template <class Value>
const Exchanged* offer(const Value& value) {
    static_assert(sizeof value <= sizeof(Exchanged));
    const size_t count = block.threads.size(), index = block.running;
    Exchanged* const row = block.exchanged.data() + block.threads[index].exchanges++ % 2 * (count + warpSize);
    memcpy(&row[index], &value, sizeof value);
    wait(State::kAtWarpBarrier);
    return row + index / warpSize * warpSize;
}

template <class Value>
Value exchange(Value value, int source) {
    const size_t warp = block.running / warpSize * warpSize;
    const Exchanged* const all = offer(value);
    if (warp + source < block.threads.size() && source < warpSize) memcpy(&value, &all[source], sizeof value);
    return value;
}

inline void require_whole_warp(unsigned mask) {
    if (mask == 0xFFFFFFFFu) return;
    fprintf(stderr, "CUDA emulator: only whole warps can be synchronised, mask %x\n", mask);
    abort();
}

inline int lane() { return int(block.running % warpSize); }

}  // namespace emulator

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    void* attrs;
    unsigned numAttrs;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
    using namespace emulator;
    gridDim = config->gridDim;
    blockDim = config->blockDim;
    const size_t count = size_t(blockDim.x) * blockDim.y * blockDim.z;
    block.threads.resize(count);
    block.stacks.resize(count * kStack);
    block.exchanged.resize(2 * (count + warpSize));
    block.shared.resize(config->dynamicSmemBytes);
    auto body = [&] { kernel(arguments...); };
    block.body = [](void* call) { (*static_cast<decltype(body)*>(call))(); };
    block.arguments = &body;
    for (blockIdx.z = 0; blockIdx.z < gridDim.z; ++blockIdx.z)
        for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y)
            for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) run_block(count);
    return cudaSuccess;
}

inline void __syncthreads() { emulator::wait(emulator::State::kAtBarrier); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) {
    emulator::require_whole_warp(mask);
    emulator::wait(emulator::State::kAtWarpBarrier);
}

template <class Value>
Value __shfl_sync(unsigned mask, Value value, int source, int width = warpSize) {
    emulator::require_whole_warp(mask);
    return emulator::exchange(value, emulator::lane() / width * width + source % width);
}
template <class Value>
Value __shfl_xor_sync(unsigned mask, Value value, int lanes, int width = warpSize) {
    emulator::require_whole_warp(mask);
    return emulator::exchange(value, emulator::lane() ^ (lanes % width));
}
template <class Value>
Value __shfl_up_sync(unsigned mask, Value value, unsigned distance, int width = warpSize) {
    emulator::require_whole_warp(mask);
    const int lane = emulator::lane();
    return emulator::exchange(value, lane % width < int(distance) ? lane : lane - int(distance));
}
template <class Value>
Value __shfl_down_sync(unsigned mask, Value value, unsigned distance, int width = warpSize) {
    emulator::require_whole_warp(mask);
    const int lane = emulator::lane();
    return emulator::exchange(value, lane % width + int(distance) >= width ? lane : lane + int(distance));
}

// Registers of all lanes of the warp, as those in kernels/csrc/cuda/mma.cuh.
#define VK_WARP_REGISTERS
template <int kCount>
class WarpRegisters {
  public:
    explicit WarpRegisters(const unsigned (&own)[kCount]) : all(emulator::offer(own)) {}
    unsigned of(int lane, int index) const { return all[lane].words[index]; }

  private:
    const emulator::Exchanged* all;
};

template <class Value>
Value __ldg(const Value* address) {
    return *address;
}
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline int __float_as_int(float x) {
    int bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
inline float __int_as_float(int bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
template <class Value>
Value min(Value a, Value b) {
    return b < a ? b : a;
}
template <class Value>
Value max(Value a, Value b) {
    return a < b ? b : a;
}
