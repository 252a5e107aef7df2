// blend_SOURCE_TYPE: rows image * m + baseline * (1 - m), for masks that are never stored.
//
// out (n, c, H, W), or (n, H, W, c) with channels_last, of TYPE; image fp32 in the same order; baseline fp32, likewise
// per_element, else (c,). Grid (ceil(elements of a plane / (block * lanes)), n): a thread makes as many neighbouring
// elements as one 128-bit store takes, of every plane. The mask sources are the structures below and GridMask.
#include "common.cuh"

struct MapMask {
    const float* maps;
    int h, w;
    const Place* rows;
    const Place* columns;
    __device__ __forceinline__ float operator()(int n, int y, int x) const {
        return bilinear(maps + (size_t)n * h * w, h, w, rows[y], columns[x]);
    }
};

struct SegmentMask {
    const int* ids;
    const uint8* bits;
    int segments, width;
    __device__ __forceinline__ float operator()(int n, int y, int x) const {
        return bits[(size_t)n * segments + ids[y * width + x]] ? 1.f : 0.f;
    }
};

struct RankMask {
    const int* ranks;
    const int* thresholds;
    int width;
    __device__ __forceinline__ float operator()(int n, int y, int x) const {
        return ranks[y * width + x] >= thresholds[n] ? 1.f : 0.f;
    }
};

struct PathMask {
    const float* shares;
    __device__ __forceinline__ float operator()(int n, int, int) const { return shares[n]; }
};

struct WindowMask {
    const int* boxes;
    __device__ __forceinline__ float operator()(int n, int y, int x) const {
        const int* box = boxes + (size_t)n * 4;
        return y >= box[0] && y < box[2] && x >= box[1] && x < box[3] ? 0.f : 1.f;
    }
};

struct Picture {
    const float* image;
    const float* baseline;
    int per_element, channels, height, width, channels_last;
};

template <typename T, typename Mask>
__device__ __forceinline__ void blend(T* out, const Picture& p, const Mask& mask) {
    constexpr int LANES = Pack<T>::LANES;
    int repeat = p.channels_last ? p.channels : 1, planes = p.channels_last ? 1 : p.channels;
    int n = blockIdx.y, span = p.height * p.width * repeat;
    int first = (blockIdx.x * blockDim.x + threadIdx.x) * LANES;
    if (first >= span) return;
    int pixel = first / repeat, begin = first - pixel * repeat, channel = begin;
    int y = pixel / p.width, x = pixel - y * p.width;
    float m[LANES], shown = 0.f;
#pragma unroll
    for (int k = 0; k < LANES; ++k) {
        if (k == 0 || channel == 0) shown = mask(n, y, x);
        m[k] = shown;
        if (++channel == repeat) {
            channel = 0;
            if (++x == p.width) x = 0, y = min(y + 1, p.height - 1);
        }
    }
#pragma unroll 1
    for (int plane = 0; plane < planes; ++plane) {
        Pack<T> pack;
        channel = plane + begin;
#pragma unroll
        for (int k = 0; k < LANES; ++k) {
            int element = plane * span + min(first + k, span - 1);
            float below = p.baseline[p.per_element ? element : channel];
            store(pack.lanes[k], p.image[element] * m[k] + below * (1.f - m[k]));
            if (p.channels_last && ++channel == p.channels) channel = 0;
        }
        write(out + ((size_t)n * planes + plane) * span + first, pack, span - first);
    }
}

#define BLEND(source, name, type, mask, ...)                                                                       \
    extern "C" __global__ void __launch_bounds__(BLOCK, 2) blend_##source##_##name(                                   \
        type* out, const float* image, const float* baseline, int per_element, int channels, int height, int width, \
        int channels_last, __VA_ARGS__) {                                                                          \
        blend(out, Picture{image, baseline, per_element, channels, height, width, channels_last}, mask);           \
    }
#define BLEND_TO_EVERY_TYPE(source, mask, ...)           \
    BLEND(source, float32, float, mask, __VA_ARGS__)     \
    BLEND(source, float16, float16, mask, __VA_ARGS__)   \
    BLEND(source, bfloat16, bfloat16, mask, __VA_ARGS__) \
    BLEND(source, uint8, uint8, mask, __VA_ARGS__)

BLEND_TO_EVERY_TYPE(maps, (MapMask{maps, h, w, rows, columns}), const float* maps, int h, int w, const Place* rows,
                    const Place* columns)
BLEND_TO_EVERY_TYPE(grids, (GridMask{bits, offsets, s, rows, columns}), const uint8* bits, const int* offsets, int s,
                    const Place* rows, const Place* columns)
BLEND_TO_EVERY_TYPE(segments, (SegmentMask{ids, bits, segments, width}), const int* ids, const uint8* bits,
                    int segments)
BLEND_TO_EVERY_TYPE(ranks, (RankMask{ranks, thresholds, width}), const int* ranks, const int* thresholds)
BLEND_TO_EVERY_TYPE(path, (PathMask{shares}), const float* shares)
BLEND_TO_EVERY_TYPE(windows, (WindowMask{boxes}), const int* boxes)
