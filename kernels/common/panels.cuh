// Panel tiles (README.md) as operands of mma.sync, on any device: lines of 128 bytes, 64 k, swizzled. For kernels with a portable path.
#pragma once
#include "common/common.cuh"

// The transpose of an 8 x 8 matrix of 16-bit numbers: lane (g, t) gives {row g: cols 2 t, 2 t + 1} and gets {col g: rows 2 t, 2 t + 1}.
DEVICE uint32_t transpose8(uint32_t v) {
    uint32_t turned;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(v));
    return turned;
}

// Four 8 x 8 matrices of 16-bit numbers; lanes 8 i.. 8 i + 7 give the addresses of the rows of matrix i. A lane (g, t) gets {row g: cols
// 2 t, 2 t + 1} of each.
DEVICE void load_matrices(uint32_t (&v)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(address)
                 : "memory");
}

// Copies LINES lines of a panel with THREADS threads, asynchronously; those from `valid` on are zeroed.
template <int LINES, int THREADS> DEVICE void copy_lines(uint32_t to, const char* from, int valid) {
#pragma unroll
    for (int at = threadIdx.x; at < LINES * 8; at += THREADS)
        copy_async_16(to + at * 16, at / 8 < valid ? from + at * 16 : from, at / 8 < valid ? 16 : 0);
}

// Operand A of the 16 k from 16 `k` on: lines `line`.. + 15 of a tile.
DEVICE void load_a(uint32_t (&a)[4], uint32_t tile, int line, int k) {
    const int lane = threadIdx.x % 32, row = line + lane % 16, chunk = 2 * k + lane / 16;
    load_matrices(a, tile + row * 128 + ((chunk ^ (row & 7)) << 4));
}

// Operands B of the same k for two blocks of eight columns: lines `line`.. + 15 of a tile. {b[0], b[1]} is the first block's.
DEVICE void load_b(uint32_t (&b)[4], uint32_t tile, int line, int k) {
    const int lane = threadIdx.x % 32, row = line + lane / 16 * 8 + lane % 8, chunk = 2 * k + lane / 8 % 2;
    load_matrices(b, tile + row * 128 + ((chunk ^ (row & 7)) << 4));
}
