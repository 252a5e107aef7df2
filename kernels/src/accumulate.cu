// accumulate_SOURCE: sums (k, pixels) of masks (n) under weights (k, n), without atomics, so equal to the bit each time.
//
// Grid (ceil(pixels / block), splits, ceil(k / 8)): split s sums the masks s * chunk .. and writes partial (splits, k,
// pixels); accumulate_splits then adds the splits in order.
#include "common.cuh"

constexpr int TOGETHER = 8;  // weights that one thread serves with one look at a mask

struct StoredMask {
    const float* maps;
    int height, width;
    __device__ __forceinline__ float operator()(int n, int y, int x) const {
        return maps[((size_t)n * height + y) * width + x];
    }
};

template <typename Mask>
__device__ __forceinline__ void accumulate(float* partial, const float* weights, int n, int k, int chunk, int height,
                                           int width, const Mask& mask) {
    int pixel = blockIdx.x * blockDim.x + threadIdx.x, pixels = height * width;
    if (pixel >= pixels) return;
    int y = pixel / width, x = pixel - y * width, first = blockIdx.z * TOGETHER;
    int begin = blockIdx.y * chunk, end = min(begin + chunk, n);
    float sums[TOGETHER] = {};
    for (int i = begin; i < end; ++i) {
        float m = mask(i, y, x);
#pragma unroll
        for (int j = 0; j < TOGETHER; ++j)
            if (first + j < k) sums[j] += weights[(size_t)(first + j) * n + i] * m;
    }
#pragma unroll
    for (int j = 0; j < TOGETHER; ++j)
        if (first + j < k) partial[((size_t)blockIdx.y * k + first + j) * pixels + pixel] = sums[j];
}

extern "C" __global__ void __launch_bounds__(BLOCK) accumulate_maps(float* partial, const float* weights, int n, int k,
                                                                    int chunk, int height, int width,
                                                                    const float* maps) {
    accumulate(partial, weights, n, k, chunk, height, width, StoredMask{maps, height, width});
}

extern "C" __global__ void __launch_bounds__(BLOCK) accumulate_grid(float* partial, const float* weights, int n, int k,
                                                                    int chunk, int height, int width,
                                                                    const uint8* bits, const int* offsets, int s,
                                                                    const Place* rows, const Place* columns) {
    accumulate(partial, weights, n, k, chunk, height, width, GridMask{bits, offsets, s, rows, columns});
}

extern "C" __global__ void __launch_bounds__(BLOCK) accumulate_splits(float* out, const float* partial, int splits,
                                                                      int elements) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= elements) return;
    float sum = 0.f;
    for (int s = 0; s < splits; ++s) sum += partial[(size_t)s * elements + i];
    out[i] = sum;
}
