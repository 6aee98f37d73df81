// Hopper's asynchronous machinery (compute capability 9.0a): barriers in shared memory, bulk copies, warpgroup matrix products.
// Everything here is empty for other targets; kernels that use it have bodies for 9.0a only.
#pragma once
#include "common/common.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HOPPER 1

// Barriers: 8 bytes of shared memory each. `count` arrivals and all announced bytes complete a phase; phases alternate in parity.
DEVICE void barrier_init(uint32_t barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// After the inits, by the thread that made them, before the block's barrier: the copy engine sees them.
DEVICE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives and announces bytes that bulk copies will bring.
DEVICE void barrier_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Until the phase of this parity has completed. A fresh barrier counts as having completed a phase of parity 1.
DEVICE void barrier_wait(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    do {
        asm volatile(
            "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory");
    } while (!done);
}
// What ordinary stores wrote (here or in an earlier kernel) is seen by bulk copies and wgmma issued later.
DEVICE void proxy_fence() { asm volatile("fence.proxy.async;" ::: "memory"); }

// `bytes` (a multiple of 16) from global to shared memory; both 16-byte aligned. The barrier is told of them as they land.
DEVICE void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
                 "r"(bytes), "r"(barrier)
                 : "memory");
}

// A ring of STAGES stages of shared memory between FILLERS warps that fill them by bulk copies and USERS warps that use them. Each warp
// walks it with its own cursor. `barriers` is 2 * STAGES barriers: full ones, then empty ones.
template <int STAGES, int FILLERS, int USERS> struct Ring {
    uint32_t barriers;
    int stage = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ explicit Ring(uint32_t barriers) : barriers(barriers) {}
    __device__ __forceinline__ void init() const {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(barriers + 8 * i, FILLERS);
            barrier_init(barriers + 8 * (STAGES + i), USERS);
        }
        barrier_init_fence();
    }
    __device__ __forceinline__ uint32_t full() const { return barriers + 8 * stage; }
    __device__ __forceinline__ uint32_t empty() const { return barriers + 8 * (STAGES + stage); }
    __device__ __forceinline__ void wait_full() const { barrier_wait(full(), parity); }
    __device__ __forceinline__ void wait_empty() const { barrier_wait(empty(), parity ^ 1); }
    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// Clusters: every thread of every block has come here, and what they wrote to shared memory is seen.
DEVICE void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
DEVICE int cluster_rank() {
    int rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
// 16 bytes of another block's shared memory, at the address that they have in its own.
DEVICE float4 load_of_block(uint32_t address, int block) {
    uint32_t there;
    float4 v;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(block));
    asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(there)
                 : "memory");
    return v;
}

// Registers of a warp for the roles of a warp-specialised kernel; every warp of the warpgroup executes it.
template <int N> DEVICE void registers_grow() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> DEVICE void registers_shrink() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }

// Before a product: registers that were written since the last one (operands, accumulators) are in order with it.
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most N committed groups are unfinished.
template <int N> DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
// Keeps the compiler from reading accumulators ahead of the wait before it.
template <int N> DEVICE void wgmma_settle(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Descriptor of a 16-bit operand in panel layout: lines of 128 bytes (64 k), swizzled, eight lines to 1024 bytes. `address` is
// 1024-byte aligned, and 32 bytes further for each step of 16 k (add 2 to the descriptor).
DEVICE uint64_t wgmma_descriptor(uint32_t address) {
    constexpr uint64_t SWIZZLE_128 = 1ull << 62, EIGHT_LINES = 64ull << 32, UNUSED = 1ull << 16;
    return SWIZZLE_128 | EIGHT_LINES | UNUSED | ((address & 0x3ffff) >> 4);
}

// D[64 x N] += A[64 x 16] B[N x 16]^T, float32 sums. Of D, warp w of the group holds rows 16 w..; its lane (g, t)
// holds d[4 j..] = {row g: cols 8 j + 2 t, + 1}, {row g + 8: the same}. A in registers is laid out as for mma_fp16.
template <int N> struct Wgmma;
#define D4 "%0,%1,%2,%3"
#define D8 D4 ",%4,%5,%6,%7"
#define D12 D8 ",%8,%9,%10,%11"
#define D16 D12 ",%12,%13,%14,%15"
#define D24 D16 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define D32 D24 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define D40 D32 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define D48 D40 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define D56 D48 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define D64 D56 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define D72 D64 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define D80 D72 ",%72,%73,%74,%75,%76,%77,%78,%79"
#define D96 D80 ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define D112 D96 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111"
#define D128 D112 ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define F8(i) F4(i), F4(i + 4)
#define F16(i) F8(i), F8(i + 8)
#define F32(i) F16(i), F16(i + 16)
#define F64(i) F32(i), F32(i + 32)
#define WGMMA(N, D, F, P0, P1, P2, P3, P4)                                                                                    \
    template <> struct Wgmma<N> {                                                                                             \
        static DEVICE_MEMBER void bf16(float (&d)[N / 2], uint64_t a, uint64_t b) {                                           \
            asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" D "}, " P0 ", " P1 ", 1, 1, 1, 0, 0;"   \
                         : F                                                                                                  \
                         : "l"(a), "l"(b));                                                                                   \
        }                                                                                                                     \
        static DEVICE_MEMBER void bf16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b) {                                \
            asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" D                                       \
                         "}, {" P0 "," P1 "," P2 "," P3 "}, " P4 ", 1, 1, 1, 0;"                                              \
                         : F                                                                                                  \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                               \
        }                                                                                                                     \
        static DEVICE_MEMBER void fp16(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b) {                               \
            asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.f16.f16 {" D                                         \
                         "}, {" P0 "," P1 "," P2 "," P3 "}, " P4 ", 1, 1, 1, 0;"                                              \
                         : F                                                                                                  \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                               \
        }                                                                                                                     \
    }
#define DEVICE_MEMBER __device__ __forceinline__
#define WGMMA_ALL(...) __VA_ARGS__
WGMMA(8, D4, F4(0), "%4", "%5", "%6", "%7", "%8");
WGMMA(16, D8, F8(0), "%8", "%9", "%10", "%11", "%12");
WGMMA(24, D12, WGMMA_ALL(F8(0), F4(8)), "%12", "%13", "%14", "%15", "%16");
WGMMA(32, D16, F16(0), "%16", "%17", "%18", "%19", "%20");
WGMMA(48, D24, WGMMA_ALL(F16(0), F8(16)), "%24", "%25", "%26", "%27", "%28");
WGMMA(64, D32, F32(0), "%32", "%33", "%34", "%35", "%36");
WGMMA(80, D40, WGMMA_ALL(F32(0), F8(32)), "%40", "%41", "%42", "%43", "%44");
WGMMA(96, D48, WGMMA_ALL(F32(0), F16(32)), "%48", "%49", "%50", "%51", "%52");
WGMMA(112, D56, WGMMA_ALL(F32(0), F16(32), F8(48)), "%56", "%57", "%58", "%59", "%60");
WGMMA(128, D64, F64(0), "%64", "%65", "%66", "%67", "%68");
WGMMA(144, D72, WGMMA_ALL(F64(0), F8(64)), "%72", "%73", "%74", "%75", "%76");
WGMMA(160, D80, WGMMA_ALL(F64(0), F16(64)), "%80", "%81", "%82", "%83", "%84");
WGMMA(192, D96, WGMMA_ALL(F64(0), F32(64)), "%96", "%97", "%98", "%99", "%100");
WGMMA(224, D112, WGMMA_ALL(F64(0), F32(64), F16(96)), "%112", "%113", "%114", "%115", "%116");
WGMMA(256, D128, WGMMA_ALL(F64(0), F64(64)), "%128", "%129", "%130", "%131", "%132");
#undef WGMMA_ALL
#undef WGMMA
#undef DEVICE_MEMBER
#undef D4
#undef D8
#undef D12
#undef D16
#undef D24
#undef D32
#undef D40
#undef D48
#undef D56
#undef D64
#undef D72
#undef D80
#undef D96
#undef D112
#undef D128
#undef F4
#undef F8
#undef F16
#undef F32
#undef F64
#endif
