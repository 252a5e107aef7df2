// What the kernels share: element types, stores, resizing and sums over a block.
// The same text is compiled by NVRTC for a GPU and by g++ for the emulator of the tests, which brings its own conversions.
#pragma once

using uint8 = unsigned char;
using uint16 = unsigned short;

struct float16 { uint16 bits; };
struct bfloat16 { uint16 bits; };

#ifndef HEATMILL_EMULATOR
__device__ __forceinline__ float half_to_float(uint16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ __forceinline__ uint16 float_to_half(float value) {
    uint16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
#endif

__device__ __forceinline__ float load(float value) { return value; }
__device__ __forceinline__ float load(float16 value) { return half_to_float(value.bits); }
__device__ __forceinline__ float load(bfloat16 value) { return __uint_as_float((unsigned)value.bits << 16); }

__device__ __forceinline__ void store(float& to, float value) { to = value; }
__device__ __forceinline__ void store(float16& to, float value) { to.bits = float_to_half(value); }
__device__ __forceinline__ void store(bfloat16& to, float value) {
    // to the nearest, ties to even; no conversion instruction before sm_80
    unsigned bits = __float_as_uint(value);
    to.bits = value != value ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
__device__ __forceinline__ void store(uint8& to, float value) { to = (uint8)fminf(fmaxf(rintf(value), 0.f), 255.f); }

// As many elements as one 128-bit store takes.
template <typename T>
struct alignas(16) Pack {
    static constexpr int LANES = 16 / sizeof(T);
    T lanes[LANES];
};

// The first `count` lanes, in one store where all go and the address allows it.
template <typename T>
__device__ __forceinline__ void write(T* to, const Pack<T>& pack, int count) {
    if (count >= Pack<T>::LANES && (size_t)to % 16 == 0) {
        *reinterpret_cast<Pack<T>*>(to) = pack;
        return;
    }
#pragma unroll
    for (int k = 0; k < Pack<T>::LANES; ++k)
        if (k < count) to[k] = pack.lanes[k];
}

// Where an output sample lies among the input samples of one axis; the host makes a table of them for each rule.
struct Place {
    int first;
    float fraction;
};

__device__ __forceinline__ float between(float from, float to, float fraction) { return from + fraction * (to - from); }

template <typename S>
__device__ __forceinline__ float bilinear(const S* map, int h, int w, Place row, Place column) {
    const S* top = map + row.first * w;
    const S* bottom = row.first + 1 < h ? top + w : top;
    int left = column.first, right = left + 1 < w ? left + 1 : left;
    return between(between(top[left], top[right], column.fraction), between(bottom[left], bottom[right], column.fraction),
                   row.fraction);
}

// RISE: grids (n, s, s) of bits, resized to s + 1 cells and cut at an offset (n, 2).
struct GridMask {
    const uint8* bits;
    const int* offsets;
    int s;
    const Place* rows;
    const Place* columns;
    __device__ __forceinline__ float operator()(int n, int y, int x) const {
        return bilinear(bits + (size_t)n * s * s, s, s, rows[y + offsets[2 * n]], columns[x + offsets[2 * n + 1]]);
    }
};

constexpr int BLOCK = 256;  // the greatest number of threads in a block, a power of two as every block is

struct Sum { template <typename V> __device__ static V of(V a, V b) { return a + b; } };
struct Least { __device__ static float of(float a, float b) { return fminf(a, b); } };
struct Greatest { __device__ static float of(float a, float b) { return fmaxf(a, b); } };

// One value from every thread of the block, folded in a fixed order; every thread gets the result.
template <typename Fold, typename V>
__device__ __forceinline__ V fold_block(V value) {
    __shared__ V values[BLOCK];
    int t = threadIdx.x;
    values[t] = value;
    __syncthreads();
    for (int step = blockDim.x / 2; step > 0; step /= 2) {
        if (t < step) values[t] = Fold::of(values[t], values[t + step]);
        __syncthreads();
    }
    V result = values[0];
    __syncthreads();
    return result;
}
