// Runs CUDA kernels on the CPU: blocks one after another, the threads of a block as fibers that meet at __syncthreads.
//
// What it can't show: races between blocks and warps, the fused multiply-adds of a GPU, and the time anything takes.
#pragma once
#define HEATMILL_EMULATOR

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <tuple>
#include <type_traits>
#include <ucontext.h>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct Index {
    unsigned x, y, z;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

using std::max;
using std::min;

template <typename To, typename From>
To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
inline float __uint_as_float(unsigned bits) { return same_bits<float>(bits); }
inline unsigned __float_as_uint(float value) { return same_bits<unsigned>(value); }
inline float half_to_float(unsigned short bits) { return same_bits<_Float16>(bits); }
inline unsigned short float_to_half(float value) { return same_bits<unsigned short>((_Float16)value); }

namespace emulator {

enum Fault { NONE, DIVERGENT_BARRIER, UNEXPECTED_BARRIER };

constexpr size_t STACK = 64 * 1024;

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[STACK]};
    bool done;
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline unsigned current;
inline bool barriers_allowed, unexpected;
inline std::function<void()> body;

inline void become(unsigned thread) {
    current = thread;
    threadIdx = {thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / (blockDim.x * blockDim.y)};
}

inline void enter() {
    body();
    fibers[current].done = true;
    swapcontext(&fibers[current].context, &scheduler);
}

// Every thread runs to its next barrier or its end, in turn, until all have ended.
inline Fault run_block(unsigned threads) {
    if (fibers.size() < threads) fibers.resize(threads);
    for (unsigned i = 0; i < threads; ++i) {
        Fiber& fiber = fibers[i];
        fiber.done = false;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = STACK;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, enter, 0);
    }
    for (unsigned live = threads; live;) {
        unsigned ended = 0;
        for (unsigned i = 0; i < threads; ++i) {
            if (fibers[i].done) continue;
            become(i);
            swapcontext(&scheduler, &fibers[i].context);
            ended += fibers[i].done;
        }
        if (ended && ended != live) return DIVERGENT_BARRIER;
        live -= ended;
    }
    return NONE;
}

inline Fault run(Index grid, Index block, bool barriers) {
    gridDim = grid, blockDim = block, barriers_allowed = barriers, unexpected = false;
    unsigned threads = block.x * block.y * block.z;
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                blockIdx = {x, y, z};
                if (barriers) {
                    if (Fault fault = run_block(threads)) return fault;
                } else {
                    for (unsigned i = 0; i < threads; ++i) become(i), body();
                }
            }
    return unexpected ? UNEXPECTED_BARRIER : NONE;
}

template <typename A>
constexpr char kind() {
    return std::is_pointer_v<A> ? 'p' : std::is_same_v<A, int> ? 'i' : std::is_same_v<A, float> ? 'f' : '?';
}

template <typename... A>
std::string kinds(void (*)(A...)) {
    return {kind<A>()...};
}

// As the driver launches: `arguments` points to the value of each.
template <typename... A>
Fault launch(void (*kernel)(A...), const unsigned* grid, const unsigned* block, bool barriers, void** arguments) {
    auto values = [&]<size_t... I>(std::index_sequence<I...>) {
        return std::tuple<A...>{*static_cast<A*>(arguments[I])...};
    }(std::index_sequence_for<A...>{});
    body = [=] { std::apply(kernel, values); };
    return run({grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, barriers);
}

}  // namespace emulator

inline void __syncthreads() {
    if (emulator::barriers_allowed) swapcontext(&emulator::fibers[emulator::current].context, &emulator::scheduler);
    else emulator::unexpected = true;
}

// kinds_NAME: a letter per argument. launch_NAME: a fault, or 0.
#define LAUNCHER(name, barriers)                                                                        \
    extern "C" const char* kinds_##name() {                                                             \
        static const std::string kinds = emulator::kinds(name);                                         \
        return kinds.c_str();                                                                           \
    }                                                                                                   \
    extern "C" int launch_##name(const unsigned* grid, const unsigned* block, void** arguments) {       \
        return emulator::launch(name, grid, block, barriers, arguments);                                \
    }
