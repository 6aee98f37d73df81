// Blocks of a cluster that send each other small parts, and blocks of a grid that meet at a counter.
#pragma once
#include "common/common.cuh"

// Blocks of a cluster send each other their parts: stores into the shared memory of another that count on a barrier there, so that
// nobody fences or waits but the reader.
#if __CUDA_ARCH__ >= 900
// Once a block, by the block's first warp: the barrier will complete when `bytes` have come.
DEVICE void inbox_open(uint32_t barrier, uint32_t bytes) {
    if (threadIdx.x == 0) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncwarp();
    if (threadIdx.x == 0) asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
// To where block `rank` has `address`; its barrier counts the bytes.
DEVICE void send(uint32_t address, uint32_t barrier, int rank, float v) {
    asm volatile(
        "{ .reg .b32 to, done; mapa.shared::cluster.u32 to, %0, %2; mapa.shared::cluster.u32 done, %1, %2;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [to], %3, [done]; }" ::"r"(address),
        "r"(barrier), "r"(rank), "f"(v)
        : "memory");
}
DEVICE void send(uint32_t address, uint32_t barrier, int rank, float2 v) {
    asm volatile(
        "{ .reg .b32 to, done; mapa.shared::cluster.u32 to, %0, %2; mapa.shared::cluster.u32 done, %1, %2;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [to], {%3, %4}, [done]; }" ::"r"(address),
        "r"(barrier), "r"(rank), "f"(v.x), "f"(v.y)
        : "memory");
}
DEVICE void send(uint32_t address, uint32_t barrier, int rank, float4 v) {
    asm volatile(
        "{ .reg .b32 to, done; mapa.shared::cluster.u32 to, %0, %2; mapa.shared::cluster.u32 done, %1, %2;\n"
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [to], {%3, %4, %5, %6}, [done]; }" ::"r"(address),
        "r"(barrier), "r"(rank), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
        : "memory");
}
DEVICE void inbox_wait(uint32_t barrier) {
    uint32_t done;
    do {
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0; selp.u32 %0, 1, 0, p; }"
                     : "=r"(done)
                     : "r"(barrier)
                     : "memory");
    } while (!done);
}
#else
DEVICE void inbox_open(uint32_t, uint32_t) {}
DEVICE void cluster_arrive() {}
DEVICE void cluster_wait() {}
DEVICE void send(uint32_t, uint32_t, int, float) {}
DEVICE void send(uint32_t, uint32_t, int, float2) {}
DEVICE void send(uint32_t, uint32_t, int, float4) {}
DEVICE void inbox_wait(uint32_t) {}
#endif

// Adds one; what this warp wrote before is seen by who sees the sum, and the other way round.
DEVICE int arrive(int* counter) {
    int before;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}
