// blur: one pass of a separable filter along one axis, borders reflected about the edge samples.
//
// The axis has `length` samples that lie `step` elements apart, so one kernel serves both axes and both layouts.
#include "common.cuh"

__device__ __forceinline__ int reflect(int i, int n) {
    if (n == 1) return 0;
    i = abs(i) % (2 * (n - 1));
    return min(i, 2 * (n - 1) - i);
}

extern "C" __global__ void __launch_bounds__(BLOCK) blur(float* out, const float* image, const float* taps, int half,
                                                         int elements, int length, int step) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= elements) return;
    int at = i / step % length;
    float sum = 0.f;
    for (int d = -half; d <= half; ++d) sum += taps[d + half] * image[i + (reflect(at + d, length) - at) * step];
    out[i] = sum;
}
