// Kernels that do what no kernel may, to see that the emulator notices.
#include "common.cuh"

extern "C" __global__ void divergent_barrier(float* out) {
    if (threadIdx.x % 2) out[threadIdx.x] = fold_block<Sum>(1.f);
}

extern "C" __global__ void unexpected_barrier(float* out) {
    __syncthreads();
    out[threadIdx.x] = 1.f;
}

extern "C" __global__ void overrun(float* out, int elements) {
    if ((int)threadIdx.x <= elements) out[threadIdx.x] = 1.f;
}
