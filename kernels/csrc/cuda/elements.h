// Loads and stores of tensors whose element type is a runtime parameter of the kernel. All threads of a
// launch take the same branch, and one kernel serves every mixture of types.
//
// Elements are moved four at a time. They are kept in their memory representation until they are used, so that a thread
// can request those of the next tile before it processes this one.
#pragma once
#include "launch.h"

constexpr int kVector = 4;

struct Raw {
    unsigned word[kVector];  // a float32 each, or two 16-bit elements
};

__device__ __forceinline__ int64_t bytes_of(int dtype) { return dtype == kFloat32 ? 4 : 2; }

__device__ __forceinline__ unsigned load_bits(const char* address, int dtype) {
    return dtype == kFloat32 ? __ldg(reinterpret_cast<const unsigned*>(address))
                             : unsigned(__ldg(reinterpret_cast<const unsigned short*>(address)));
}

__device__ __forceinline__ float half_to_float(unsigned bits) {
    __half value;
    const unsigned short lower = static_cast<unsigned short>(bits);
    memcpy(&value, &lower, sizeof value);
    return __half2float(value);
}

__device__ __forceinline__ unsigned bits_of(float value, int dtype) {
    if (dtype == kFloat32) return unsigned(__float_as_int(value));
    unsigned short bits;
    if (dtype == kBFloat16) {
        const __nv_bfloat16 rounded = __float2bfloat16_rn(value);
        memcpy(&bits, &rounded, sizeof bits);
    } else {
        const __half rounded = __float2half_rn(value);
        memcpy(&bits, &rounded, sizeof bits);
    }
    return bits;
}

__device__ __forceinline__ float float_of(unsigned bits, int dtype) {
    if (dtype == kFloat16) return half_to_float(bits);
    return __int_as_float(int(dtype == kFloat32 ? bits : bits << 16));
}

// A vector over channels or states, any stride.
struct Row {
    const char* data;  // null: absent
    int dtype;
    int64_t stride;
    __device__ float operator[](int64_t i) const {
        return float_of(load_bits(data + i * stride * bytes_of(dtype), dtype), dtype);
    }
};

inline Row row_of(const View* view, int dim) {
    if (!view) return {};
    return {static_cast<const char*>(view->data), int(view->dtype), view->stride[dim]};
}

// A tensor (batch, channels, steps). Four elements of it lie along the channels, or along the steps if `along_steps`.
struct Signal {
    char* data;
    int dtype;
    bool vectors;  // the four can be moved at once
    int64_t by_batch, by_channel, by_step, by_element;  // strides; the last one is that of the four

    __device__ char* at(int64_t batch, int64_t channel, int64_t step) const {
        return data + (batch * by_batch + channel * by_channel + step * by_step) * bytes_of(dtype);
    }
};

// `divisible`: blocks of channels begin at multiples of four and hold multiples of four.
inline Signal signal_of(const View& view, bool channels_last, bool along_steps, bool divisible) {
    const int channel = channels_last ? 2 : 1, step = channels_last ? 1 : 2;
    Signal signal{static_cast<char*>(view.data), int(view.dtype), false,
                  view.stride[0], view.stride[channel], view.stride[step], 0};
    const int64_t across = along_steps ? signal.by_channel : signal.by_step;
    signal.by_element = along_steps ? signal.by_step : signal.by_channel;
    const int64_t bytes = view.dtype == kFloat32 ? 4 : 2;
    signal.vectors = signal.by_element == 1 && across % kVector == 0 && signal.by_batch % kVector == 0 &&
                     reinterpret_cast<uintptr_t>(view.data) % (kVector * bytes) == 0 &&
                     (along_steps ? view.size[step] % kVector == 0 : divisible);
    return signal;
}

// The first `count` of four elements; the others are zero.
__device__ __forceinline__ Raw load(const Signal& signal, const char* address, int count) {
    Raw raw{};
    if (count <= 0) return raw;
    if (signal.vectors) {
        if (signal.dtype == kFloat32) {
            const uint4 all = __ldg(reinterpret_cast<const uint4*>(address));
            raw = {{all.x, all.y, all.z, all.w}};
        } else {
            const uint2 pairs = __ldg(reinterpret_cast<const uint2*>(address));
            raw.word[0] = pairs.x;
            raw.word[1] = pairs.y;
        }
        return raw;
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
        if (i >= count) break;
        const unsigned bits = load_bits(address + i * signal.by_element * bytes_of(signal.dtype), signal.dtype);
        if (signal.dtype == kFloat32)
            raw.word[i] = bits;
        else
            raw.word[i / 2] |= bits << (i % 2 * 16);
    }
    return raw;
}

__device__ __forceinline__ void to_floats(const Raw& raw, int dtype, float (&values)[kVector]) {
    if (dtype == kFloat32) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) values[i] = __int_as_float(int(raw.word[i]));
    } else if (dtype == kBFloat16) {
#pragma unroll
        for (int i = 0; i < kVector; ++i)
            values[i] = __int_as_float(int(i % 2 ? raw.word[i / 2] & 0xFFFF0000u : raw.word[i / 2] << 16));
    } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i) values[i] = half_to_float(raw.word[i / 2] >> i % 2 * 16);
    }
}

// Two elements of a 16-bit type, the first one in the lower half.
__device__ __forceinline__ unsigned pair_bits(float lower, float upper, int dtype) {
    unsigned bits;
    if (dtype == kBFloat16) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(lower, upper);
        memcpy(&bits, &pair, sizeof bits);
    } else {
        const __half2 pair = __floats2half2_rn(lower, upper);
        memcpy(&bits, &pair, sizeof bits);
    }
    return bits;
}

// The first `count` of four elements.
__device__ __forceinline__ void store(const Signal& signal, char* address, int count, const float (&values)[kVector]) {
    if (count <= 0) return;
    if (signal.vectors) {
        if (signal.dtype == kFloat32)
            *reinterpret_cast<float4*>(address) = float4{values[0], values[1], values[2], values[3]};
        else if (signal.dtype == kBFloat16)
            *reinterpret_cast<uint2*>(address) =
                uint2{pair_bits(values[0], values[1], kBFloat16), pair_bits(values[2], values[3], kBFloat16)};
        else
            *reinterpret_cast<uint2*>(address) =
                uint2{pair_bits(values[0], values[1], kFloat16), pair_bits(values[2], values[3], kFloat16)};
        return;
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
        if (i >= count) break;
        char* const target = address + i * signal.by_element * bytes_of(signal.dtype);
        const unsigned bits = bits_of(values[i], signal.dtype);
        if (signal.dtype == kFloat32)
            *reinterpret_cast<unsigned*>(target) = bits;
        else
            *reinterpret_cast<unsigned short*>(target) = static_cast<unsigned short>(bits);
    }
}
