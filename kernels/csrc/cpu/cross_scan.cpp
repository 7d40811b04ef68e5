// Cross scan and cross merge: images along four routes, and their sequences merged back.
// Definition: ../../vision_kernels/cross_scan.
//
// Pixels are moved in squares of kLanes x kLanes: whether rows or columns are adjacent in memory, on either side, they
// are read and written as vectors.
#include "lanes.h"

namespace {

constexpr int kRoutes = 4;

// Location of the pixels of an image: start + row by_row + column by_column.
struct Layout {
    int64_t start, by_row, by_column;

    // For a contiguous image, in the order of a route; `step` is the raster distance to the next position.
    static Layout of_route(int64_t step, int64_t height, int64_t width) {
        const int64_t end = height * width - 1;
        if (step == 1) return {0, width, 1};
        if (step == -1) return {end, -width, -1};
        return step > 0 ? Layout{0, 1, height} : Layout{end, -1, -height};
    }
    bool of_adjacent_columns() const { return by_column == 1 || by_column == -1; }
    bool of_adjacent_rows() const { return by_row == 1 || by_row == -1; }
};

// A square of pixels, as seen from a layout in which rows or columns are adjacent, forwards or backwards: `line(i)` is
// the offset of kLanes adjacent pixels.
struct Square {
    bool turned, backwards;
    int64_t first, pitch;
    Square(const Layout& layout, int64_t row, int64_t column)
        : turned(!layout.of_adjacent_columns()), backwards((turned ? layout.by_row : layout.by_column) < 0),
          first(layout.start + row * layout.by_row + column * layout.by_column - (backwards ? kLanes - 1 : 0)),
          pitch(turned ? layout.by_column : layout.by_row) {}
    int64_t line(int i) const { return first + i * pitch; }
};

VK_INLINE void swap_ends(Vec* rows) {
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
        const Vec row = rows[i];
        rows[i] = rows[kLanes - 1 - i], rows[kLanes - 1 - i] = row;
    }
}

template <class T>
VK_INLINE void load_square(const T* image, const Square& square, Vec* rows) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = load(image + square.line(i));
    if (square.turned) {
        transpose(rows);
        if (square.backwards) swap_ends(rows);
    } else if (square.backwards) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) rows[i] = reversed(rows[i]);
    }
}

// A number that was loaded from this type, so conversion is exact.
VK_INLINE void store_exact(float* p, Vec x) { store(p, x); }
VK_INLINE void store_exact(BFloat16* p, Vec x) {
    *reinterpret_cast<UnalignedShortVec*>(p) = __builtin_convertvector((UIntVec)x >> 16, ShortVec);
}

template <class T>
VK_INLINE void store_square(T* image, const Square& square, const Vec* rows) {
    Vec lines[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) lines[i] = rows[i];
    if (square.turned) {
        if (square.backwards) swap_ends(lines);
        transpose(lines);
    } else if (square.backwards) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) lines[i] = reversed(lines[i]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) store_exact(image + square.line(i), lines[i]);
}

// Calls body(row, column) for squares that cover the image. The last ones overlap those before them.
template <class Body>
VK_INLINE void for_squares(int64_t height, int64_t width, const Body& body) {
    for (int64_t row = 0; row < height; row += kLanes)
        for (int64_t column = 0; column < width; column += kLanes)
            body(minimum(row, height - kLanes), minimum(column, width - kLanes));
}

struct Problem {
    int64_t height, width;
    Layout routes[kRoutes];

    Problem(int64_t height, int64_t width, const int64_t* steps) : height(height), width(width) {
        for (int j = 0; j < kRoutes; ++j) routes[j] = Layout::of_route(steps[j], height, width);
    }
    bool has_squares() const { return height >= kLanes && width >= kLanes; }
};

template <class T>
void scan_image(const Problem& problem, const T* image, const Layout& layout, T* const* sequences) {
    if (problem.has_squares() && (layout.of_adjacent_rows() || layout.of_adjacent_columns()))
        return for_squares(problem.height, problem.width, [&](int64_t row, int64_t column) VK_LAMBDA {
            Vec rows[kLanes];
            load_square(image, Square(layout, row, column), rows);
            for (int j = 0; j < kRoutes; ++j)
                store_square(sequences[j], Square(problem.routes[j], row, column), rows);
        });
    for (int j = 0; j < kRoutes; ++j) {
        const Layout route = problem.routes[j];
        for (int64_t row = 0; row < problem.height; ++row)
            for (int64_t column = 0; column < problem.width; ++column)
                sequences[j][route.start + row * route.by_row + column * route.by_column] =
                    image[row * layout.by_row + column * layout.by_column];
    }
}

template <class T>
void merge_image(const Problem& problem, const T* const* sequences, T* image) {
    if (problem.has_squares())
        return for_squares(problem.height, problem.width, [&](int64_t row, int64_t column) VK_LAMBDA {
            Vec total[kLanes], rows[kLanes];
            load_square(sequences[0], Square(problem.routes[0], row, column), total);
            for (int j = 1; j < kRoutes; ++j) {
                load_square(sequences[j], Square(problem.routes[j], row, column), rows);
#pragma GCC unroll 16
                for (int i = 0; i < kLanes; ++i) total[i] += rows[i];
            }
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i) store(image + (row + i) * problem.width + column, total[i]);
        });
    for (int64_t row = 0; row < problem.height; ++row)
        for (int64_t column = 0; column < problem.width; ++column) {
            float total[kRoutes];
            for (int j = 0; j < kRoutes; ++j) {
                const Layout& route = problem.routes[j];
                total[j] = to_float(sequences[j][route.start + row * route.by_row + column * route.by_column]);
            }
            assign(image++, total[0] + total[1] + total[2] + total[3]);
        }
}

template <class T>
Status scan(const View& x, const View& y, const Problem& problem) {
    const Layout layout{0, x.stride[2], x.stride[3]};
    return parallel_for(x.size[0] * x.size[1], [&](int64_t task) {
        const int64_t batch = task / x.size[1], channel = task % x.size[1];
        T* sequences[kRoutes];
        for (int j = 0; j < kRoutes; ++j) sequences[j] = at<T>(y, batch, j, channel);
        scan_image(problem, at<const T>(x, batch, channel), layout, sequences);
        return true;
    });
}

template <class T>
Status merge(const View& y, const View& x, const Problem& problem) {
    return parallel_for(x.size[0] * x.size[1], [&](int64_t task) {
        const int64_t batch = task / x.size[1], channel = task % x.size[1];
        const T* sequences[kRoutes];
        for (int j = 0; j < kRoutes; ++j) sequences[j] = at<const T>(y, batch, j, channel);
        merge_image(problem, sequences, at<T>(x, batch, channel));
        return true;
    });
}

}  // namespace

// x (batch, dim, height, width) with any strides -> y (batch, 4, dim, length) with adjacent positions; of one type.
VK_ENTRY(cross_scan_forward)
(const View* x, const View* y, int64_t step0, int64_t step1, int64_t step2, int64_t step3) {
    const int64_t steps[] = {step0, step1, step2, step3};
    return (x->dtype == kFloat32 ? scan<float> : scan<BFloat16>)(*x, *y, Problem(x->size[2], x->size[3], steps));
}

// y (batch, 4, dim, length) with adjacent positions -> x (batch, dim, height, width), contiguous; of one type.
VK_ENTRY(cross_merge_forward)
(const View* y, const View* x, int64_t step0, int64_t step1, int64_t step2, int64_t step3) {
    const int64_t steps[] = {step0, step1, step2, step3};
    return (x->dtype == kFloat32 ? merge<float> : merge<BFloat16>)(*y, *x, Problem(x->size[2], x->size[3], steps));
}
