// normalise_TYPE: decoded pixels uint8 (H, W, c) as a network's input, (pixel / 255 - mean) / std; the pixel itself where
// mean is null. out is (c, H, W), or (H, W, c) with channels_last. A thread per element.
#include "common.cuh"

template <typename T>
__device__ __forceinline__ void normalise(T* out, const uint8* pixels, const float* mean, const float* std, int channels,
                                          int count, int channels_last) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= channels * count) return;
    int channel = channels_last ? i % channels : i / count;
    float value = pixels[channels_last ? i : i % count * channels + channel];
    store(out[i], mean ? (value / 255.f - mean[channel]) / std[channel] : value);
}

#define NORMALISE(name, type)                                                                                     \
    extern "C" __global__ void __launch_bounds__(BLOCK)                                                          \
        normalise_##name(type* out, const uint8* pixels, const float* mean, const float* std, int channels,     \
                         int count, int channels_last) {                                                      \
        normalise(out, pixels, mean, std, channels, count, channels_last);                                    \
    }

NORMALISE(float32, float)
NORMALISE(float16, float16)
NORMALISE(bfloat16, bfloat16)
NORMALISE(uint8, uint8)
