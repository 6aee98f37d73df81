// Gate/up with SwiGLU and down of the chosen experts in one launch, small batches on Hopper (common/pipe.cuh): `a` passes through memory, a
// barrier of all blocks between the two, and the weights of down are on their way before it.
//
// All blocks must run at once: one to a multiprocessor, and nothing that waits for this kernel runs before they have started.
#include "common/pipe.cuh"

struct Params {
    const char* gate_up;         // strips [experts][inner / 8], hidden / 64 tiles each
    const char* down;            // strips [experts][hidden / 16], inner / 64 tiles each; as many pieces as those of gate/up
    const float* gate_up_bias;   // [experts, 2 * inner]: gate i at 2i, up i at 2i + 1
    const float* down_bias;      // [experts, hidden]
    const __half* h;             // [rows, hidden], fragment order
    const int* choice;           // [rows, top_k]
    const int* live;             // rows to do
    __half* a;                   // [rows * top_k, inner], fragment order
    float* products;             // [rows * top_k, hidden]
    unsigned* arrivals;          // where blocks meet: 0 before the first launch
    int hidden;                  // multiple of 64
    int inner;                   // multiple of 64
    int experts;                 // at most 128
    int top_k;
    int capacity;                // rows * top_k: pairs that fit
    int stages;                  // of the ring
    float alpha;
    float limit;
};

extern __shared__ __align__(128) char shared[];

#ifdef HOPPER

DEVICE unsigned add_released(unsigned* at, unsigned value) {
    unsigned before;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(before) : "l"(at), "r"(value) : "memory");
    return before;
}
DEVICE unsigned load_acquired(const unsigned* at) {
    unsigned value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
    return value;
}

// One thread of each block: until all have come. The top bit of the word turns when the last one does.
DEVICE void meet_blocks(unsigned* word) {
    const unsigned before = add_released(word, blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1u);
    while (((load_acquired(word) ^ before) & 0x80000000u) == 0) {}
}

#endif

KERNEL __launch_bounds__(640, 1) moe_pair(const __grid_constant__ Params p) {
#ifdef HOPPER
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Product first{p.gate_up, p.gate_up_bias, p.h, p.top_k, p.inner / 8, p.hidden / 64}, second{p.down, p.down_bias, p.a, 1, p.hidden / 16, p.inner / 64};
    const int pieces = (first.tiles + PIECE - 1) / PIECE, stage_bytes = max(first.strip_size(), second.strip_size());
    char* const ring = shared + PIPE_FIXED + FINISHERS * pieces * SUMS * 16;
    const Work work = work_at(ring + p.stages * stage_bytes, p.capacity);
    const Pipe pipe{work, shared_address(shared), shared_address(ring), p.stages, stage_bytes, pieces, shared + BARRIERS,
                    reinterpret_cast<float4*>(shared + PIPE_FIXED)};
    // Finishers of the block, then all blocks, are done with the first product.
    const uint32_t finished = pipe.spare(0), met = pipe.spare(1);
    if (threadIdx.x == 0) {
        pipe.init();
        barrier_init(finished, FINISHERS);
        barrier_init(met, 1);
        barrier_init_fence();
    }
    pdl_wait();
    pdl_launch();
    const int segments = list_work(work, p.choice, min(*p.live * p.top_k, p.capacity), p.capacity, p.experts, GROUP_PIPE);
    first.deal(work, segments), second.deal(work, segments);
    if (warp < MULTIPLIERS) {
        registers_of_multipliers();
        Multiplier multiplier{pipe};
        Product now = first;
#pragma unroll 1
        for (int turn = 0; turn < 2; ++turn, now = second) {
            if (turn == 1) barrier_wait(met, 0);
            multiplier.run(now);
        }
        return;
    }
    registers_of_others();
    if (warp == MULTIPLIERS) {
        if (lane == 0) {
            Copier copier{pipe};
            Product now = first;
#pragma unroll 1
            for (int turn = 0; turn < 2; ++turn, now = second) copier.run(now);
        }
        return;
    }
    Finisher finisher{pipe, warp - MULTIPLIERS - 1};
    finisher.run(first, [&](const Segment& segment, int strip, int tile, const float (&sum)[4], const float* bias) {
        const float gate_bias = bias[lane / 4 * 2], up_bias = bias[lane / 4 * 2 + 1];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int token = tile * 8 + lane % 4 * 2 + i;
            if (token >= segment.count) break;
            const float value = swiglu(fmaf(sum[i], FP4_UNIT, gate_bias), fmaf(sum[2 + i], FP4_UNIT, up_bias), p.alpha, p.limit);
            p.a[static_cast<size_t>(work.pairs[segment.first + token]) * p.inner + fragment(strip * 8 + lane / 4)] = __float2half_rn(value);
        }
    });
    __syncwarp();
    if (lane == 0) {
        __threadfence();
        barrier_arrive(finished);
        if (warp == MULTIPLIERS + 1) {
            barrier_wait(finished, 0);
            meet_blocks(p.arrivals);
            barrier_arrive(met);
        }
    }
    __syncwarp();
    finisher.run(second, [&](const Segment& segment, int strip, int tile, const float (&sum)[4], const float* bias) {
        const int row = strip * 16 + lane / 4;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int token = tile * 8 + lane % 4 * 2 + i;
            if (token >= segment.count) break;
            float* to = p.products + static_cast<size_t>(work.pairs[segment.first + token]) * p.hidden + row;
            to[0] = fmaf(sum[i], FP4_UNIT, bias[lane / 4]);
            to[8] = fmaf(sum[2 + i], FP4_UNIT, bias[lane / 4 + 8]);
        }
    });
#endif
}
