// What the attention kernels share: the paged cache, its rounding, fragments of keys and values.
#pragma once
#include "common/common.cuh"

constexpr int HEAD_DIM = 64;
constexpr float LOG2E = 1.44269504088896341f;
constexpr float E4M3_MAX = 448.0f;

// One layer of the cache (README.md, "KV pages").
struct Cache {
    char* data;     // [pages][2][kv_heads][page_size][head_dim], bf16 or e4m3
    float* scales;  // [pages][2][kv_heads][page_size] with e4m3
    int kv_heads;
    int page_shift;  // log2 of the page size, 4..8
    int window;      // keys a query sees, itself included; 0 is all
};

// Where the pages of each sequence are: position p of sequence s lives in page pages[at[s] + p / page_size - first[s]].
struct Tables {
    const int* at;
    const int* first;
    const int* pages;
};

DEVICE const int* table_of(const Tables& tables, int sequence) {
    return tables.pages + (tables.at[sequence] - tables.first[sequence]);
}

DEVICE int first_visible(int position, int window) { return window > 0 && position >= window ? position + 1 - window : 0; }

// Number of the head's token `offset` in `page`, keys (values: + kv_heads << page_shift). Times the head's elements it counts those of
// `data`; it also counts scales.
DEVICE size_t token_of(const Cache& cache, int page, int head, int offset) {
    return (((static_cast<size_t>(page) * 2) * cache.kv_heads + head) << cache.page_shift) + offset;
}
DEVICE size_t values_after_keys(const Cache& cache) { return static_cast<size_t>(cache.kv_heads) << cache.page_shift; }

// Sequences of many rows among those of a step. Their gathered lines (kv_gather.cu) follow one another, each padded to a
// multiple of LINES.
struct Sequences {
    const int* first_row;
    const int* row_count;
    const int* start;  // position of the first row
    int first, count;
};
constexpr int LINES = 128;

// A sequence of many rows, found by a line or run of rows.
struct Place {
    int sequence, first_row, rows, start;  // no rows: there is none
    int line;                    // its first
    int run;                     // its first
};

// Which sequence holds line `at` of all that `sequences` have or, with RUNS, run `at` of `length` rows. Each warp looks for itself, a lane a
// sequence, so that nobody waits for a barrier.
template <bool RUNS> DEVICE Place find_place(const Sequences& sequences, int window, int at, int length = 1) {
    const int lane = threadIdx.x % 32;
    int lines = 0, runs = 0;
    for (int base = 0; base < sequences.count; base += 32) {
        const int s = sequences.first + min(base + lane, sequences.count - 1);
        const int first_row = sequences.first_row[s], rows = sequences.row_count[s], start = sequences.start[s];
        const bool there = base + lane < sequences.count;
        const int own_lines = there ? (start + rows - first_visible(start, window) + LINES - 1) / LINES * LINES : 0;
        const int own_runs = RUNS && there ? (rows + length - 1) / length : 0;
        int line_end = own_lines, run_end = own_runs;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int x = __shfl_up_sync(~0u, line_end, step), y = __shfl_up_sync(~0u, run_end, step);
            if (lane >= step) line_end += x, run_end += y;
        }
        line_end += lines, run_end += runs;
        const int end = RUNS ? run_end : line_end, begin = end - (RUNS ? own_runs : own_lines);
        const uint32_t found = __ballot_sync(~0u, at >= begin && at < end);
        if (found) {
            const int from = __ffs(found) - 1;
            return Place{sequences.first + base + from, __shfl_sync(~0u, first_row, from), __shfl_sync(~0u, rows, from), __shfl_sync(~0u, start, from),
                         __shfl_sync(~0u, line_end - own_lines, from), __shfl_sync(~0u, run_end - own_runs, from)};
        }
        lines = __shfl_sync(~0u, line_end, 31), runs = __shfl_sync(~0u, run_end, 31);
    }
    return Place{};
}

DEVICE float exp2_fast(float v) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}

// Two e4m3 codes (the low one first) as fp16, exactly.
DEVICE uint32_t e4m3_to_half2(uint16_t codes) {
#if __CUDA_ARCH__ >= 890
    uint32_t r;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(r) : "h"(codes));
    return r;
#else
    // The bits in place are the value times 2^-8, subnormals included.
    const uint32_t spread = __byte_perm(codes, 0, 0x1404);
    const uint32_t bits = (spread & 0x80008000u) | ((spread >> 1) & 0x3f803f80u);
    const __half2 v = __hmul2(*reinterpret_cast<const __half2*>(&bits), __floats2half2_rn(256.0f, 256.0f));
    return *reinterpret_cast<const uint32_t*>(&v);
#endif
}

// What a head's values are divided by before they become e4m3. Quotients are those of an IEEE division wherever they matter to the code
// (above 2^-12), without its branches: one reciprocal for all, and a correction by the remainder. Scales so small that remainders would
// be subnormal are shifted up, with the values.
struct E4m3Scale {
    float scale, shift, divisor, inverse;

    __device__ __forceinline__ explicit E4m3Scale(float amax) {
        constexpr float INVERSE = 1 / E4M3_MAX;
        const float about = __fmul_rn(amax, INVERSE);
        scale = __fmaf_rn(__fmaf_rn(-E4M3_MAX, about, amax), INVERSE, about);
        if (amax < 0x1p-100f) scale = __fdiv_rn(amax, E4M3_MAX);
        shift = scale < 0x1p-60f ? 0x1p64f : 1.0f;
        divisor = __fmul_rn(scale, shift);
        float first;
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(first) : "f"(divisor));
        inverse = __fmaf_rn(first, __fmaf_rn(-divisor, first, 1.0f), first);
    }
    __device__ __forceinline__ float quotient(float v) const {
        const float shifted = __fmul_rn(v, shift), about = __fmul_rn(shifted, inverse);
        return __fmaf_rn(__fmaf_rn(-divisor, about, shifted), inverse, about);
    }
};

// Two values over the head's scale as e4m3: nearest even, limited to 448.
DEVICE uint32_t to_e4m3(float low, float high, const E4m3Scale& scale) {
    const uint32_t codes = __nv_cvt_float2_to_fp8x2(make_float2(scale.quotient(low), scale.quotient(high)), __NV_SATFINITE, __NV_E4M3);
    return scale.scale == 0 ? 0 : codes;
}

DEVICE uint4 load_shared_16(uint32_t at) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
    return v;
}
DEVICE uint2 load_shared_8(uint32_t at) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at) : "memory");
    return v;
}
DEVICE uint32_t load_shared_32(uint32_t at) {
    uint32_t v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
    return v;
}
DEVICE float load_shared_f32(uint32_t at) {
    float v;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(at) : "memory");
    return v;
}
DEVICE void store_shared_32(uint32_t at, uint32_t v) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(v) : "memory"); }
DEVICE void store_shared_zeros(uint32_t at) { asm volatile("st.shared.v4.u32 [%0], {%1,%1,%1,%1};" ::"r"(at), "r"(0) : "memory"); }
DEVICE void store_shared_16(uint32_t at, uint32_t v) {
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(at), "h"(static_cast<uint16_t>(v)) : "memory");
}
DEVICE void store_shared_f32(uint32_t at, float v) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(v) : "memory"); }

// 4 bytes from global to shared memory, asynchronously; `bytes` = 0 zeroes the destination.
DEVICE void copy_async_4(uint32_t to, const void* from, uint32_t bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8. Lane (g, t) gets elements
// (g, 2t), (g, 2t + 1) of each, transposed: (2t, g), (2t + 1, g).
DEVICE uint4 load_matrices(uint32_t at) {
    uint4 v;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(at)
                 : "memory");
    return v;
}
DEVICE uint4 load_matrices_transposed(uint32_t at) {
    uint4 v;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(at)
                 : "memory");
    return v;
}
// An 8 x 8 matrix of 16-bit elements spread over the warp, transposed.
DEVICE uint32_t transpose_8x8(uint32_t v) {
    uint32_t r;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
    return r;
}

// Address of column `col` (a multiple of 2) of row `row`, head `head`, in an output of bf16 [rows, heads * DIM]: row-major, or
// panels of `capacity` rows where that is not 0.
template <int DIM> DEVICE char* output_at(void* out, int row, int head, int col, int heads, int capacity) {
    char* base = static_cast<char*>(out);
    if (capacity == 0) return base + ((static_cast<size_t>(row) * heads + head) * DIM + col) * 2;
    return base + panel_chunk(row, head * DIM + (col & ~7), capacity) + (col & 7) * 2;
}

// Some dimensions of a head, what its scores peak at, and the sum of its probabilities relative to that.
template <int DIMS> struct Part {
    float o[DIMS] = {};
    float peak = -INFINITY, sum = 0;
};

template <int DIMS, int N> DEVICE Part<DIMS> merge(const Part<DIMS>& into, const Part<DIMS> (&parts)[N]) {
    Part<DIMS> all = into;
#pragma unroll
    for (int i = 0; i < N; ++i) all.peak = fmaxf(all.peak, parts[i].peak);
    // Where nothing was seen all peaks are minus infinity.
    const float safe = all.peak == -INFINITY ? 0 : all.peak;
    const float keep = exp2_fast(into.peak - safe);
    all.sum *= keep;
#pragma unroll
    for (int d = 0; d < DIMS; ++d) all.o[d] *= keep;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const float weight = exp2_fast(parts[i].peak - safe);
        all.sum += parts[i].sum * weight;
#pragma unroll
        for (int d = 0; d < DIMS; ++d) all.o[d] += parts[i].o[d] * weight;
    }
    return all;
}
