// scores_TYPE: posteriors of raw scores (n, classes), all of them or those of targets (n, k). A block per row.
// nonfinite_TYPE: how many of a row's scores are NaN or infinite. A block per row.
#include "common.cuh"

enum Kind { NONE, SIGMOID, SOFTMAX };

// targets null: every class in order, k = classes. A target that is no class gets NaN.
template <typename T>
__device__ __forceinline__ void scores(float* out, const T* raw, const int* targets, int classes, int k, int kind) {
    size_t n = blockIdx.x;
    raw += n * classes;
    float top = load(raw[0]), total = 0.f;
    if (kind == SOFTMAX) {
        for (int i = threadIdx.x; i < classes; i += blockDim.x) top = fmaxf(top, load(raw[i]));
        top = fold_block<Greatest>(top);
        for (int i = threadIdx.x; i < classes; i += blockDim.x) total += expf(load(raw[i]) - top);
        total = fold_block<Sum>(total);
    }
    for (int j = threadIdx.x; j < k; j += blockDim.x) {
        int target = targets ? targets[n * k + j] : j;
        float value = 0 <= target && target < classes ? load(raw[target]) : __uint_as_float(0x7fffffff);
        if (kind == SOFTMAX) value = expf(value - top) / total;
        if (kind == SIGMOID) value = 1.f / (1.f + expf(-value));
        out[n * k + j] = value;
    }
}

template <typename T>
__device__ __forceinline__ void nonfinite(int* counts, const T* raw, int classes) {
    raw += (size_t)blockIdx.x * classes;
    int count = 0;
    for (int i = threadIdx.x; i < classes; i += blockDim.x) count += !(fabsf(load(raw[i])) <= 3.402823466e38f);
    count = fold_block<Sum>(count);
    if (threadIdx.x == 0) counts[blockIdx.x] = count;
}

#define SCORES(name, type)                                                                                        \
    extern "C" __global__ void __launch_bounds__(BLOCK)                                                          \
        scores_##name(float* out, const type* raw, const int* targets, int classes, int k, int kind) {          \
        scores(out, raw, targets, classes, k, kind);                                                            \
    }                                                                                                         \
    extern "C" __global__ void __launch_bounds__(BLOCK)                                                          \
        nonfinite_##name(int* counts, const type* raw, int classes) {                                           \
        nonfinite(counts, raw, classes);                                                                      \
    }

SCORES(float32, float)
SCORES(float16, float16)
SCORES(bfloat16, bfloat16)
