// What kernels of matrix products share, whatever their weights are: the loops over stages of bf16 panels, and small things of warps.
#pragma once
#include "common/panels.cuh"
#include "common/wgmma.cuh"

// Of a warp: adds to d the products of its 16 weight rows by TOKENS tokens, on any device. `fill` asks for a step's ROWS lines of weights
// and TOKENS lines of tokens, behind one another in stage `step % STAGES`. The block's warps are ROWS / 16, all of them here.
template <int ROWS, int TOKENS, int STAGES, class Fill>
DEVICE void multiply_portable(float (&d)[TOKENS / 8][4], uint32_t stages, int steps, const Fill& fill) {
    const int warp = threadIdx.x / 32;
    // What was there before has been read.
    __syncthreads();
    fill(0);
    fill(1);
    for (int step = 0; step < steps; ++step) {
        copy_wait<1>();
        __syncthreads();
        fill(step + 2);
        const uint32_t from = stages + step % STAGES * ((ROWS + TOKENS) * 128);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            uint32_t a[4];
            load_a(a, from, warp * 16, k);
#pragma unroll
            for (int j = 0; j < TOKENS / 8; j += 2) {
                uint32_t b[4];
                load_b(b, from + ROWS * 128, j * 8, k);
                mma_bf16(d[j], a[0], a[1], a[2], a[3], b[0], b[1]);
                mma_bf16(d[j + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
            }
        }
    }
    copy_wait<0>();
}

#ifdef HOPPER

// A number of columns as a type, for the generic lambdas that ragged tiles are multiplied in.
template <int N> struct Columns {
    static constexpr int value = N;
};

// Of lane 0: tells the compiler that a value is one for the warp.
DEVICE int uniform(int v) { return __shfl_sync(~0u, v, 0); }

// Has L2 fetch; a hint, the same of all lanes, given by one.
DEVICE void prefetch(const char* from, uint32_t bytes) {
    asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; @p cp.async.bulk.prefetch.L2.global [%0], %1; }" ::"l"(from), "r"(bytes)
                 : "memory");
}

// Gives a stage back to the warp that copies.
DEVICE void give_back(uint32_t empty) {
    if (threadIdx.x % 32 == 0) barrier_arrive(empty);
}

// Of a warpgroup: adds to d the products of the next `steps` stages of STAGE bytes: 64 lines `a_at` bytes into each by N lines `b_at` bytes
// into it. Gives all stages back but the last one read, which is returned.
template <int N, int STAGE, class R>
DEVICE uint32_t multiply_stages(float (&d)[N / 2], R& ring, uint32_t stages, uint32_t a_at, uint32_t b_at, int steps) {
    uint32_t before = 0;
    for (int step = 0; step < steps; ++step) {
        ring.wait_full();
        const uint32_t at = stages + ring.stage * STAGE;
        const uint64_t a = wgmma_descriptor(at + a_at), b = wgmma_descriptor(at + b_at);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k) Wgmma<N>::bf16(d, a + 2 * k, b + 2 * k);
        wgmma_commit();
        wgmma_wait<1>();
        if (step > 0) give_back(before);
        before = ring.empty();
        ring.advance();
    }
    wgmma_wait<0>();
    wgmma_settle(d);
    return before;
}
#endif
