// extrema: the least and the greatest value of every resized map, without making it. A block per map.
//
// rows (ny) and columns (nx) need only hold the places next to a source sample: a bilinear surface has its extremes there.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK) extrema(float* low, float* high, const float* maps, int h, int w,
                                                            const Place* rows, int ny, const Place* columns, int nx) {
    const float* map = maps + (size_t)blockIdx.x * h * w;
    float least = bilinear(map, h, w, rows[0], columns[0]), greatest = least;
    for (int i = threadIdx.x; i < ny * nx; i += blockDim.x) {
        float value = bilinear(map, h, w, rows[i / nx], columns[i % nx]);
        least = fminf(least, value);
        greatest = fmaxf(greatest, value);
    }
    least = fold_block<Least>(least);
    greatest = fold_block<Greatest>(greatest);
    if (threadIdx.x == 0) {
        low[blockIdx.x] = least;
        high[blockIdx.x] = greatest;
    }
}
