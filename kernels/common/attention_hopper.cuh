// What the attention of many rows is made of on Hopper: products of 64 rows with tiles of keys and values, the softmax between them.
#pragma once
#include "common/attention.cuh"
#include "common/wgmma.cuh"

#ifdef HOPPER
#define S8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define S32(d, i) S8(d, i), S8(d, i + 8), S8(d, i + 16), S8(d, i + 24)
#define LIST_32                                                                                                  \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28," \
    "%29,%30,%31"
#define LIST_64                                                                                                         \
    LIST_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57," \
            "%58,%59,%60,%61,%62,%63"

// S[64 x N] = (KEEP: +=) Q[64 x 16] K[N x 16]^T.
template <bool KEEP> DEVICE void product_of_keys(float (&s)[64], uint64_t q, uint64_t k) {
    asm volatile("{ .reg .pred keep; setp.ne.b32 keep, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" LIST_64 "}, %64, %65, keep, 1, 1, 0, 0; }"
                 : S32(s, 0), S32(s, 32)
                 : "l"(q), "l"(k), "n"(KEEP ? 1 : 0));
}
// The two halves of 144 keys: one instruction of that size takes more registers in a row than a thread has.
template <bool KEEP> DEVICE void product_of_keys(float (&s)[72], uint64_t q, uint64_t k) {
    const auto half = [&](float* d, uint64_t k) {
        asm volatile("{ .reg .pred keep; setp.ne.b32 keep, %38, 0;\n"
                     "wgmma.mma_async.sync.aligned.m64n72k16.f32.bf16.bf16 {" LIST_32 ",%32,%33,%34,%35}, %36, %37, keep, 1, 1, 0, 0; }"
                     : S32(d, 0), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])
                     : "l"(q), "l"(k), "n"(KEEP ? 1 : 0));
    };
    half(s, k);
    half(s + 36, k + 72 * 128 / 16);
}
// O[64 x 64] += P[64 x 16] V[16 x 64]; V's lines are keys, so it is transposed on the way.
DEVICE void product_of_values(float (&o)[1][32], const uint32_t (&p)[4], uint64_t v) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" LIST_32 "}, {%32,%33,%34,%35}, %36, 1, 1, 1, 1;"
                 : S32(o[0], 0)
                 : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(v));
}
// O[64 x 128] += P[64 x 16] V[16 x 128]: two panels, whose distance the descriptor has. Two products of half the width are slower.
DEVICE void product_of_values(float (&o)[2][32], const uint32_t (&p)[4], uint64_t v) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" LIST_64 "}, {%64,%65,%66,%67}, %68, 1, 1, 1, 1;"
                 : S32(o[0], 0), S32(o[1], 0)
                 : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(v));
}
#undef S8
#undef S32
#undef LIST_32
#undef LIST_64

// Descriptor of values, whose lines are k: panels of 64 columns are `panel` bytes apart.
DEVICE uint64_t values_descriptor(uint32_t address, uint32_t panel) {
    constexpr uint64_t UNUSED = 1ull << 16;
    return (wgmma_descriptor(address) & ~UNUSED) | static_cast<uint64_t>(panel >> 4) << 16;
}

// Issues S = Q K^T for heads of PANELS * 64 dimensions; panels of rows and of keys are so many bytes apart.
template <int PANELS, int N> DEVICE void scores(float (&s)[N], uint32_t q, uint32_t q_panel, uint32_t k, uint32_t k_panel) {
    wgmma_fence();
#pragma unroll
    for (int panel = 0; panel < PANELS; ++panel) {
        const uint64_t a = wgmma_descriptor(q + panel * q_panel), b = wgmma_descriptor(k + panel * k_panel);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (panel + i == 0)
                product_of_keys<false>(s, a, b);
            else
                product_of_keys<true>(s, a + 2 * i, b + 2 * i);
        }
    }
    wgmma_commit();
}
// Issues O += P V.
template <int PANELS, int N> DEVICE void add_values(float (&o)[PANELS][32], const uint32_t (&p)[N][4], uint32_t v, uint32_t v_panel) {
    wgmma_fence();
    const uint64_t first = PANELS == 1 ? wgmma_descriptor(v) : values_descriptor(v, v_panel);
#pragma unroll
    // 16 lines of 128 bytes further each time.
    for (int i = 0; i < N; ++i) product_of_values(o, p[i], first + 128 * i);
    wgmma_commit();
}
// A lane's probabilities as operand A.
template <int N> DEVICE void pack(uint32_t (&p)[N / 8][4], const float (&s)[N]) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) p[i / 4][i % 4] = pack2<__nv_bfloat16>(s[2 * i], s[2 * i + 1]);
}

// What a lane knows of its two rows. Probabilities are relative to a reference: at least the greatest scaled score less SLACK.
struct Softmax {
    static constexpr float SLACK = 8;          // powers of two
    static constexpr float MOST = 0x1p60f;     // of a sum, where nobody looks for peaks after the first tile
    float base[2] = {-INFINITY, -INFINITY};    // the reference; minus infinity until something is seen
    float sum[2] = {0, 0};                     // of this lane's columns
    float rescale[2] = {1, 1};

    // Minus infinity must not be subtracted from itself.
    __device__ __forceinline__ float reference(int r) const { return base[r] == -INFINITY ? 0 : base[r]; }
};

// Leaves out what the rows do not see of the tile's columns from FROM to TO: they see up to column `last` of those that the lane has, and
// `window` of them, if not 0.
template <int FROM, int TO, int N> DEVICE void hide(float (&s)[N], const int (&last)[2], int window) {
#pragma unroll
    for (int i = FROM / 2; i < TO / 2; ++i) {
        const int row = i / 2 % 2, col = i / 4 * 8 + i % 2;
        s[i] = col <= last[row] && (window == 0 || col > last[row] - window) ? s[i] : -INFINITY;
    }
}

template <int N> DEVICE void hide(float (&s)[N], const int (&last)[2], int window) { hide<0, 2 * N>(s, last, window); }

// Moves the references of rows whose greatest score, of all lanes', is above their limit.
DEVICE void move(Softmax& state, const float (&peak)[2], float scale) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float high = fmaxf(peak[r], __shfl_xor_sync(~0u, peak[r], 1));
        high = fmaxf(high, __shfl_xor_sync(~0u, high, 2)) * scale;
        // A row that sees nothing of the tile stays as it is, and so do the rows around one that moves.
        const bool up = high > state.base[r] + Softmax::SLACK;
        state.rescale[r] = up ? exp2_fast(state.base[r] - high) : 1;
        state.base[r] = up ? high : state.base[r];
        state.sum[r] *= state.rescale[r];
    }
}

// Finds whether scores are above the limits, and moves the references if so; the warp agrees on whether any has.
template <int N> DEVICE bool look_up(const float (&s)[N], Softmax& state, float scale) {
    float peak[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float even = s[2 * r], odd = s[2 * r + 1];
#pragma unroll
        for (int i = 1; i < N / 4; ++i) {
            even = fmaxf(even, s[4 * i + 2 * r]);
            odd = fmaxf(odd, s[4 * i + 2 * r + 1]);
        }
        peak[r] = fmaxf(even, odd);
    }
    const bool moved = __any_sync(~0u, peak[0] * scale > state.base[0] + Softmax::SLACK || peak[1] * scale > state.base[1] + Softmax::SLACK);
    if (moved) move(state, peak, scale);
    return moved;
}

// Scores of a tile to probabilities, in place, and this lane's sums of them.
template <int N> DEVICE void soften(float (&s)[N], const Softmax& state, float scale, float (&sums)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float even = 0, odd = 0;
        const float base = state.reference(r);
#pragma unroll
        for (int i = 0; i < N / 4; ++i)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                float& v = s[4 * i + 2 * r + e];
                v = exp2_fast(fmaf(v, scale, -base));
                (e ? odd : even) += v;
            }
        sums[r] = even + odd;
    }
}

// D[16 x 8] += A[16 x 8] B[8 x 8]: of A lane (g, t) holds {row g, cols 2t..}, {row g + 8, cols 2t..}, of B {rows 2t.., col g}.
DEVICE void mma_bf16_short(float* d, uint32_t a0, uint32_t a1, uint32_t b) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a0), "r"(a1), "r"(b));
}

// Attention of a warp's 16 rows once more, eight keys at a time, from memory, with a reference that follows every peak: for rows whose
// first reference was too low. `q` is the first of the warp's lines, `keys` and `values` those of the first tile; `last` as for `hide`.
template <int PANELS>
DEVICE void redo(float (&o)[PANELS][32], Softmax& state, const bool (&over)[2], uint32_t q, uint32_t q_panel, const char* keys, const char* values, size_t panel_bytes,
                 int count, const int (&last)[2], int first_q, float scale) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    float again[PANELS][32] = {};
    float peak[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
#pragma unroll 1
    for (int key = 0; key < count; key += 8) {
        float s[4] = {};
#pragma unroll
        for (int panel = 0; panel < PANELS; ++panel)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int line = first_q + lane % 16;
                const uint4 a = load_matrices(q + panel * q_panel + line * 128 + (((2 * i + lane / 16) ^ (line & 7)) << 4));
                // Lines of keys start at a multiple of eight, so line `key + g` is swizzled by g.
                const char* from = keys + panel * panel_bytes + static_cast<size_t>(key + g) * 128 + 4 * t;
                mma_bf16(s, a.x, a.y, a.z, a.w, *reinterpret_cast<const uint32_t*>(from + (((2 * i) ^ g) << 4)),
                         *reinterpret_cast<const uint32_t*>(from + (((2 * i + 1) ^ g) << 4)));
            }
        float keep[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float high = peak[r];
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                float& v = s[2 * r + e];
                v = key + e <= last[r] ? v * scale : -INFINITY;
                high = fmaxf(high, v);
            }
            high = fmaxf(high, __shfl_xor_sync(~0u, high, 1));
            high = fmaxf(high, __shfl_xor_sync(~0u, high, 2));
            const float safe = high == -INFINITY ? 0 : high;
            keep[r] = exp2_fast(peak[r] - safe);
            peak[r] = high;
            sum[r] *= keep[r];
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                float& v = s[2 * r + e];
                v = exp2_fast(v - safe);
                sum[r] += v;
            }
        }
        const uint32_t low = pack2<__nv_bfloat16>(s[0], s[1]), high = pack2<__nv_bfloat16>(s[2], s[3]);
#pragma unroll
        for (int panel = 0; panel < PANELS; ++panel)
#pragma unroll
            for (int n = 0; n < 8; ++n) {
                const char* from = values + panel * panel_bytes + static_cast<size_t>(key + 2 * t) * 128 + 2 * g;
                const uint32_t even = *reinterpret_cast<const uint16_t*>(from + ((n ^ (2 * t)) << 4));
                const uint32_t odd = *reinterpret_cast<const uint16_t*>(from + 128 + ((n ^ (2 * t + 1)) << 4));
                float* d = &again[panel][4 * n];
#pragma unroll
                for (int i = 0; i < 4; ++i) d[i] *= keep[i / 2];
                mma_bf16_short(d, low, high, even | odd << 16);
            }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r)
        if (over[r]) {
            state.base[r] = peak[r];
            state.sum[r] = sum[r];
#pragma unroll
            for (int panel = 0; panel < PANELS; ++panel)
#pragma unroll
                for (int i = 0; i < 32; ++i)
                    if (i / 2 % 2 == r) o[panel][i] = again[panel][i];
        }
}

// Never true, which the assembler does not know: it may not put off what `v` is made of until after the next wait.
DEVICE void now(float v) {
    if (v < 0) asm volatile("nanosleep.u32 1;" ::: "memory");
}

// A row's factor from sum to output, once all tiles are in.
DEVICE float inverse_of(const Softmax& state, int r, float sink) {
    float sum = state.sum[r];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    return 1.0f / (sum + exp2_fast(sink * LOG2E - state.reference(r)));
}

// The same number in every lane, which the assembler then knows to be one.
DEVICE uint32_t uniform(uint32_t v) { return __reduce_max_sync(~0u, v); }

DEVICE void shared_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE void group_sync(int barrier) { asm volatile("bar.sync %0, 128;" ::"r"(barrier) : "memory"); }
// Two groups: one waits until the other has been here.
DEVICE void pair_sync(int barrier) { asm volatile("bar.sync %0, 256;" ::"r"(barrier) : "memory"); }
DEVICE void pair_arrive(int barrier) { asm volatile("bar.arrive %0, 256;" ::"r"(barrier) : "memory"); }
DEVICE void store_matrices(uint32_t at, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(at), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
// From shared to global memory; both 16-byte aligned.
DEVICE void bulk_store(void* to, uint32_t from, uint32_t bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes) : "memory");
}
DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until the sources of all bulk stores may be overwritten; until they are done.
DEVICE void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
DEVICE void bulk_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
#endif
