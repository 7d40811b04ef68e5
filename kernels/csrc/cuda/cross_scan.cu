// Cross scan and cross merge: images along four routes, and their sequences merged back.
// Definition: ../../vision_kernels/cross_scan.
//
// A block moves a square of one image through shared memory, so that whether rows or columns are adjacent on either
// side, neighbouring threads touch neighbouring elements.
#include "launch.h"

namespace {

constexpr int kRoutes = 4;
constexpr int kSide = 32;  // of a square
constexpr int kRows = 8;   // of it that threads handle at once

// Location of the pixels of an image: start + row by_row + column by_column.
struct Layout {
    int64_t start, by_row, by_column;
    bool turned;  // columns instead of rows are adjacent

    // For a contiguous image, in the order of a route; `step` is the raster distance to the next position.
    static Layout of_route(int64_t step, int64_t height, int64_t width) {
        const int64_t end = height * width - 1;
        if (step == 1) return {0, width, 1, false};
        if (step == -1) return {end, -width, -1, false};
        return step > 0 ? Layout{0, 1, height, true} : Layout{end, -1, -height, true};
    }
};

// (batch, dim) images of height x width, and for each route a sequence, (batch, route, dim, length).
struct Images {
    int64_t dim, height, width;
    Layout image, route[kRoutes];
    int64_t image_by_batch, image_by_dim, by_batch, by_route, by_dim;

    Images(const View* image, const View* sequences, int64_t step0, int64_t step1, int64_t step2, int64_t step3)
        : dim(image->size[1]), height(image->size[2]), width(image->size[3]),
          image{0, image->stride[2], image->stride[3], image->stride[3] != 1 && image->stride[2] == 1},
          route{Layout::of_route(step0, height, width), Layout::of_route(step1, height, width),
                Layout::of_route(step2, height, width), Layout::of_route(step3, height, width)},
          image_by_batch(image->stride[0]), image_by_dim(image->stride[1]), by_batch(sequences->stride[0]),
          by_route(sequences->stride[1]), by_dim(sequences->stride[2]) {}

    __host__ __device__ int64_t across() const { return (width + kSide - 1) / kSide; }
    __host__ __device__ int64_t squares() const { return (height + kSide - 1) / kSide * across(); }
};

// body(offset, element) for each pixel of the block's square, in an order in which those adjacent in memory come
// together; `element` is its place in a kSide x (kSide + 1) array, in which it stays when the layout changes.
template <class Body>
__device__ __forceinline__ void each_pixel(const Images& images, const Layout& layout, const Body& body) {
    const int64_t square = blockIdx.x % images.squares();
    const int64_t top = square / images.across() * kSide, left = square % images.across() * kSide;
#pragma unroll
    for (int i = threadIdx.y; i < kSide; i += kRows) {
        const int row = layout.turned ? threadIdx.x : i, column = layout.turned ? i : threadIdx.x;
        if (top + row < images.height && left + column < images.width)
            body(layout.start + (top + row) * layout.by_row + (left + column) * layout.by_column, row * (kSide + 1) + column);
    }
}

template <class T>
__global__ void __launch_bounds__(kSide* kRows) scan(const T* x, T* y, const __grid_constant__ Images images) {
    __shared__ T square[kSide * (kSide + 1)];
    const int64_t plane = blockIdx.x / images.squares(), batch = plane / images.dim, dim = plane % images.dim;
    x += batch * images.image_by_batch + dim * images.image_by_dim;
    y += batch * images.by_batch + dim * images.by_dim;
    each_pixel(images, images.image, [&](int64_t offset, int element) { square[element] = x[offset]; });
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kRoutes; ++j, y += images.by_route)
        each_pixel(images, images.route[j], [&](int64_t offset, int element) { y[offset] = square[element]; });
}

template <class T>
__global__ void __launch_bounds__(kSide* kRows) merge(const T* y, T* x, const __grid_constant__ Images images) {
    __shared__ float sums[kSide * (kSide + 1)];
    const int64_t plane = blockIdx.x / images.squares(), batch = plane / images.dim, dim = plane % images.dim;
    x += batch * images.image_by_batch + dim * images.image_by_dim;
    y += batch * images.by_batch + dim * images.by_dim;
#pragma unroll
    for (int j = 0; j < kRoutes; ++j, y += images.by_route) {
        each_pixel(images, images.route[j], [&](int64_t offset, int element) {
            sums[element] = j == 0 ? to_float(y[offset]) : sums[element] + to_float(y[offset]);
        });
        __syncthreads();
    }
    each_pixel(images, images.image, [&](int64_t offset, int element) { assign(x + offset, sums[element]); });
}

template <class T>
const char* run(void (*kernel)(const T*, T*, Images), void* stream, const View* source, const View* target,
                const View* image, const Images& images) {
    const unsigned blocks = unsigned(image->size[0] * images.dim * images.squares());
    return launch(kernel, blocks, dim3(kSide, kRows), 0, stream, static_cast<const T*>(source->data),
                  static_cast<T*>(target->data), images);
}

}  // namespace

// x (batch, dim, height, width), with adjacent rows or columns for speed; y (batch, 4, dim, length), its
// sequences contiguous.
VK_ENTRY(cross_scan_forward)
(void* stream, const View* x, const View* y, int64_t step0, int64_t step1, int64_t step2, int64_t step3) {
    const Images images(x, y, step0, step1, step2, step3);
    return for_type(x->dtype, [&](auto type) { return run(scan<decltype(type)>, stream, x, y, x, images); });
}

// Sums in float32.
VK_ENTRY(cross_merge_forward)
(void* stream, const View* y, const View* x, int64_t step0, int64_t step1, int64_t step2, int64_t step3) {
    const Images images(x, y, step0, step1, step2, step3);
    return for_type(x->dtype, [&](auto type) { return run(merge<decltype(type)>, stream, y, x, x, images); });
}
