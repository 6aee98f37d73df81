// What every kernel shares: overlap of launches, memory access, reductions, matrix instructions, the panel layout.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <stdint.h>

#define DEVICE static __device__ __forceinline__
#define KERNEL extern "C" __global__ void

// Programmatic dependent launch (compute capability 9.0): `pdl_launch` lets the next kernel of the stream start once every
// block has said so or ended; `pdl_wait` returns when the kernel before has ended and its writes are visible. Before
// `pdl_wait` a kernel may read weights and nothing else that a kernel writes.
DEVICE void pdl_launch() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
DEVICE void pdl_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Weights are read once: past L1, and first to leave L2.
DEVICE uint4 load_streaming(const void* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// 16 bytes from global to shared memory, asynchronously. With `bytes` = 0 the destination is zeroed and nothing is read.
DEVICE void copy_async_16(uint32_t to, const void* from, uint32_t bytes = 16) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> DEVICE void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

DEVICE float warp_sum(float v) {
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) v += __shfl_xor_sync(~0u, v, step);
    return v;
}
DEVICE float warp_max(float v) {
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) v = fmaxf(v, __shfl_xor_sync(~0u, v, step));
    return v;
}

// Sum over a block of WARPS warps, in one fixed order; every thread gets it. `scratch` holds WARPS floats and may be reused
// after the next barrier.
template <int WARPS> DEVICE float block_sum(float v, float* scratch) {
    v = warp_sum(v);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
    __syncthreads();
    float total = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) total += scratch[warp];
    return total;
}

// D[16 x 8] += A[16 x 16] B[16 x 8]. Lane (g = lane / 4, t = lane % 4) holds of A: {row g, cols 2t..}, {row g + 8, cols 2t..},
// {row g, cols 2t + 8..}, {row g + 8, cols 2t + 8..}; of B: {rows 2t.., col g}, {rows 2t + 8.., col g}; of D: {row g, cols
// 2t, 2t + 1}, {row g + 8, cols 2t, 2t + 1}.
DEVICE void mma_bf16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DEVICE void mma_fp16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

template <class T> DEVICE uint32_t pack2(float low, float high);
template <> __device__ __forceinline__ uint32_t pack2<__nv_bfloat16>(float low, float high) {
    __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&v);
}
template <> __device__ __forceinline__ uint32_t pack2<__half>(float low, float high) {
    __half2 v = __floats2half2_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&v);
}

// The panel layout of a 16-bit matrix [rows, cols] (README.md): panels of 64 columns, each `rows` lines of 128 bytes, the eight
// 16-byte chunks of a line swizzled by the line's number. Byte offset of the chunk that holds (row, col); col % 8 == 0.
// `rows` is a multiple of 8.
DEVICE size_t panel_chunk(int row, int col, int rows) {
    return (static_cast<size_t>(col >> 6) * rows + row) * 128 + ((((col >> 3) & 7) ^ (row & 7)) << 4);
}
