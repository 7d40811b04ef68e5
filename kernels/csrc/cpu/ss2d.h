// Common parts of the forward and the backward pass of SS2D. Definition: ../../vision_kernels/ss2d/unfused.py.
//
// A block of 16 channels of one image is copied to thread-local memory, where each position is one cache line of
// float32, regardless of the type and memory format of the image. The four routes traverse it in turn.
#pragma once
#include "lanes.h"

namespace {

constexpr int kRoutes = 4;
constexpr int kBlock = 16;               // channels that are computed together
constexpr int kParts = kBlock / kLanes;  // vectors that hold them
constexpr int kTile = 32;                // positions of a route that are prepared together
constexpr int kRows = 4;                 // positions or ranks whose sums are kept in registers together

#define VK_PARTS _Pragma("GCC unroll 4") for (int k = 0; k < kParts; ++k)

struct Channels {
    Vec part[kParts];
};

VK_INLINE Channels* take(Scratch& scratch, int64_t count) {
    return reinterpret_cast<Channels*>(scratch.take(count * kParts));
}

// The tensors are contiguous float32, except for x, which is float32 or bfloat16 with any strides.
struct Problem {
    const View& x;            // (batch, dim, length)
    const View& projections;  // (batch, length, route, rank + 2 states): the low-rank step size, B, C
    const View& dt_weight;    // (route, dim, rank)
    const View& dt_bias;      // (route, dim)
    const View& A;            // (route dim, states)
    const View& D;            // (route dim)
    int64_t step[kRoutes];    // raster distance to the next position

    int64_t dim() const { return x.size[1]; }
    int64_t length() const { return x.size[2]; }
    int64_t rank() const { return dt_weight.size[2]; }
    int64_t states() const { return A.size[1]; }
    int64_t columns() const { return rank() + 2 * states(); }
    int64_t tiles() const { return (length() + kTile - 1) / kTile; }
    int64_t blocks() const { return (dim() + kBlock - 1) / kBlock; }
};

// `count` channels from `channel` on, of one image.
struct Block {
    int64_t batch, channel;
    int count;
};

Block block_of(const Problem& problem, int64_t batch, int64_t index) {
    const int64_t channel = index * kBlock;
    return {batch, channel, int(minimum<int64_t>(kBlock, problem.dim() - channel))};
}

template <class T>
void load_map(const View& map, const Block& block, Channels* target) {
    const T* source = at<const T>(map, block.batch, block.channel);
    const int64_t length = map.size[2], by_channel = map.stride[1], by_position = map.stride[2];
    int64_t p = 0;
    if (block.count == kBlock && by_channel == 1)
        for (; p < length; ++p) VK_PARTS target[p].part[k] = load(source + p * by_position + k * kLanes);
    if (block.count == kBlock && by_position == 1)
        for (; p + kLanes <= length; p += kLanes) VK_PARTS {
            Vec rows[kLanes];
            for (int i = 0; i < kLanes; ++i) rows[i] = load(source + p + (k * kLanes + i) * by_channel);
            transpose(rows);
            for (int i = 0; i < kLanes; ++i) target[p + i].part[k] = rows[i];
        }
    for (; p < length; ++p) {
        float lanes[kBlock] = {};
        for (int i = 0; i < block.count; ++i) lanes[i] = to_float(source[p * by_position + i * by_channel]);
        VK_PARTS target[p].part[k] = load(lanes + k * kLanes);
    }
}

template <class T>
void store_map(const View& map, const Block& block, const Channels* source) {
    T* target = at<T>(map, block.batch, block.channel);
    const int64_t length = map.size[2], by_channel = map.stride[1], by_position = map.stride[2];
    int64_t p = 0;
    if (block.count == kBlock && by_channel == 1)
        for (; p < length; ++p) VK_PARTS store(target + p * by_position + k * kLanes, source[p].part[k]);
    if (block.count == kBlock && by_position == 1)
        for (; p + kLanes <= length; p += kLanes) VK_PARTS {
            Vec rows[kLanes];
            for (int i = 0; i < kLanes; ++i) rows[i] = source[p + i].part[k];
            transpose(rows);
            for (int i = 0; i < kLanes; ++i) store(target + p + (k * kLanes + i) * by_channel, rows[i]);
        }
    for (; p < length; ++p) {
        const float* lanes = reinterpret_cast<const float*>(source + p);
        for (int i = 0; i < block.count; ++i) assign(target + p * by_position + i * by_channel, lanes[i]);
    }
}

void load_map(const View& map, const Block& block, Channels* target) {
    map.dtype == kFloat32 ? load_map<float>(map, block, target) : load_map<BFloat16>(map, block, target);
}
void store_map(const View& map, const Block& block, const Channels* source) {
    map.dtype == kFloat32 ? store_map<float>(map, block, source) : store_map<BFloat16>(map, block, source);
}

// One number for each channel of the block; zero for those beyond the last.
VK_INLINE Channels load_channels(const float* source, int64_t by_channel, int count) {
    float lanes[kBlock] = {};
    for (int i = 0; i < count; ++i) lanes[i] = source[i * by_channel];
    Channels result;
    VK_PARTS result.part[k] = load(lanes + k * kLanes);
    return result;
}

// The skip weights of the routes, whose outputs are summed at the end.
VK_INLINE Channels skip_of(const Problem& problem, const Block& block) {
    Channels skip = {};
    for (int j = 0; j < kRoutes; ++j) {
        const float* D = static_cast<const float*>(problem.D.data) + j * problem.dim() + block.channel;
        const Channels one = load_channels(D, 1, block.count);
        VK_PARTS skip.part[k] += one.part[k];
    }
    return skip;
}

// The parameters of one route for a block of channels.
struct Route {
    int64_t step, length, rank, states;
    int64_t by_position;       // from one position to the next, in floats
    const float* projections;  // of position 0
    Channels bias;
    Channels* weight;  // [rank]
    Channels* rate;    // [states]: A log2(e), so that exp(step A) is a power of two

    static int64_t scratch(const Problem& problem) { return problem.rank() + problem.states(); }

    Route(const Problem& problem, const Block& block, int index, Channels* memory)
        : step(problem.step[index]), length(problem.length()), rank(problem.rank()), states(problem.states()),
          by_position(kRoutes * problem.columns()), weight(memory), rate(memory + problem.rank()) {
        const int64_t channel = index * problem.dim() + block.channel;
        projections = at<const float>(problem.projections, block.batch) + index * problem.columns();
        bias = load_channels(static_cast<const float*>(problem.dt_bias.data) + channel, 1, block.count);
        const float* source = static_cast<const float*>(problem.dt_weight.data) + channel * rank;
        for (int64_t r = 0; r < rank; ++r) weight[r] = load_channels(source + r, rank, block.count);
        source = static_cast<const float*>(problem.A.data) + channel * states;
        for (int64_t n = 0; n < states; ++n) {
            rate[n] = load_channels(source + n, states, block.count);
            VK_PARTS rate[n].part[k] = finite(rate[n].part[k] * kLog2E);
        }
    }
};

// Some positions of a route.
struct Tile {
    int64_t count, padded;    // the latter is divisible by kRows; the last position is repeated
    int64_t position[kTile];  // in raster order

    // Each row or column from beginning to end, then the next one; or the reverse.
    Tile(const Route& route, int64_t begin) {
        count = minimum<int64_t>(kTile, route.length - begin);
        padded = (count + kRows - 1) / kRows * kRows;
        const int64_t stride = maximum(route.step, -route.step), in_line = route.length / stride;
        const int64_t t = route.step > 0 ? begin : route.length - 1 - begin;
        int64_t p = t % in_line * stride + t / in_line;
        for (int64_t i = 0; i < count; ++i) {
            position[i] = p;
            p += route.step;
            if (p >= route.length) p -= route.length - 1;
            if (p < 0) p += route.length - 1;
        }
        for (int64_t i = count; i < padded; ++i) position[i] = position[count - 1];
    }
};

// softplus(dt_weight low + dt_bias) for a tile.
VK_INLINE void step_sizes(const Route& route, const Tile& tile, Channels* step) {
    for (int64_t t = 0; t < tile.padded; t += kRows) {
        Channels total[kRows];
        const float* low[kRows];
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) {
            total[i] = route.bias;
            low[i] = route.projections + tile.position[t + i] * route.by_position;
        }
        for (int64_t r = 0; r < route.rank; ++r) {
            const Channels weight = route.weight[r];
#pragma GCC unroll 4
            for (int i = 0; i < kRows; ++i) VK_PARTS total[i].part[k] += weight.part[k] * low[i][r];
        }
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) step[t + i] = total[i];
    }
    Vec* flat = step->part;
    for (int64_t first = 0; first < tile.padded * kParts; first += kPack)
        store_pack(flat + first, softplus(load_pack(flat + first)));
}

// The derivative of softplus where softplus is x: 1 - exp(-x), with a small relative error for small x too.
VK_INLINE Pack softplus_slope(Pack x) {
    Pack shifted, p, scale;
    VK_EACH x.v[i] = larger(broadcast(-126.0f), x.v[i] * -kLog2E);
    VK_EACH shifted.v[i] = x.v[i] + 12582912.0f;  // the polynomial of exp2 without its last term
    VK_EACH x.v[i] -= shifted.v[i] - 12582912.0f;
    VK_EACH p.v[i] = x.v[i] * 1.333353869e-3f + 9.666245425e-3f;
    VK_EACH p.v[i] = p.v[i] * x.v[i] + 5.550500214e-2f;
    VK_EACH p.v[i] = p.v[i] * x.v[i] + 2.402235134e-1f;
    VK_EACH p.v[i] = p.v[i] * x.v[i] + 6.931471435e-1f;
    VK_EACH scale.v[i] = (Vec)(((IntVec)shifted.v[i] << 23) + 0x3f800000);
    VK_EACH p.v[i] = (1.0f - scale.v[i]) - p.v[i] * x.v[i] * scale.v[i];
    return p;
}

// exp(step A) for one state and a tile.
VK_INLINE void decays(const Channels* step, const Channels& rate, int64_t padded, Channels* decay) {
    const Vec* source = step->part;
    Vec* target = decay->part;
    for (int64_t first = 0; first < padded * kParts; first += kPack) {
        Pack x = load_pack(source + first);
        VK_EACH x.v[i] *= rate.part[i % kParts];
        store_pack(target + first, exp2(x));
    }
}

}  // namespace
