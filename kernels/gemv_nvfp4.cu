// Products of at most 16 token rows with NVFP4 strips (README.md), on Hopper: y = factor * (W norm(x)) or factor * (W x), stored, added to
// the residual stream, or as the gate and up of SwiGLU.
//
// A cluster of SPLIT blocks has some strips; each block has its part of their columns. One thread brings a block's part of a strip
// after the other to a ring; the warps that multiply are cut into `8 / pieces` groups, which take strips in turn, and a group's warps have
// a piece of the columns each. Other warps add up what all pieces of all blocks found, in order, and store it: the strips of a cluster are
// finished by its blocks in turn. Nobody waits for a whole block, and what weights fit the ring come before the kernel before has ended.
#include "common/nvfp4.cuh"
#include "common/inbox.cuh"
#include "common/wgmma.cuh"

struct Params {
    const char* weights;   // strips
    const float* factors;  // [strips * 16]
    const void* x;         // float32 [rows, cols] with `norm`, else bf16 [rows, cols]
    const float* norm;     // [cols] or null
    const int* live;       // token rows to do; what later ones hold stays with them and is not written
    void* y;               // [rows, stride]: float32, stored or added to; or bf16 of SwiGLU
    int tiles;             // of a strip
    int each, more;        // strips of a cluster; the first `more` have one more
    int rows;
    int stride;
    int pieces;            // warps that share a block's columns, as a power of two: 0 to 3
    int stages;            // strips in the ring
    int slots;             // strips of which sums are under way, as a power of two: 1 or 2
    int reciprocal;        // 65536 / pairs of rows, rounded up
    int launch;            // the next kernel may start when this many strips have not been asked for yet
    int output;            // 0: stored, 1: added, 2: SwiGLU
    float mean;            // one over the columns that are normed over
    float eps;
};

constexpr int WARPS = 8, FINISHERS = 2, THREADS = (WARPS + FINISHERS + 1) * 32;
constexpr int MOST_SLOTS = 4, PARTS = 16;
constexpr int MOST_STAGES = 16, MOST_SPLIT = 4;
constexpr int STORED = 0, ADDED = 1, SWIGLU = 2;

#ifdef HOPPER
// Everything is shared among powers of two: `parts` is the exponent. Divisions would be on the way of a row's answer.
DEVICE int share(int all, int part, int parts) { return all * part >> parts; }

DEVICE void load_matrices(uint4& v, uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(at)
                 : "memory");
}
// Its reads are done, as their sums are: a release at the scope of the cluster would wait for outputs on their way to memory.
DEVICE void arrive_at(uint32_t barrier, int rank) {
    asm volatile(
        "{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [there]; }" ::"r"(barrier),
        "r"(rank)
        : "memory");
}

// What the roles of a block share.
template <int SPLIT> struct Block {
    const Params& p;
    int rank, first_tile, tiles;  // of the block's part
    int begin, count;             // strips of the cluster
    int pairs;                    // of token rows
    uint32_t shared;

    __device__ __forceinline__ explicit Block(const Params& p, uint32_t shared) : p(p), shared(shared) {
        rank = SPLIT > 1 ? cluster_rank() : 0;
        first_tile = p.tiles * rank / SPLIT, tiles = p.tiles * (rank + 1) / SPLIT - first_tile;
        const int cluster = blockIdx.x / SPLIT;
        begin = cluster * p.each + min(cluster, p.more), count = p.each + (cluster < p.more);
        pairs = (p.rows + 1) / 2;
    }
    __device__ __forceinline__ int most_tiles() const { return (p.tiles + SPLIT - 1) / SPLIT; }
    __device__ __forceinline__ int owned() const { return (count - rank + SPLIT - 1) / SPLIT; }
    __device__ __forceinline__ int parts() const { return SPLIT << p.pieces; }
    __device__ __forceinline__ int part_bytes() const { return pairs * 128; }

    // Barriers.
    __device__ __forceinline__ uint32_t full(int stage) const { return shared + stage * 8; }
    __device__ __forceinline__ uint32_t empty(int stage) const { return shared + (MOST_STAGES + stage) * 8; }
    __device__ __forceinline__ uint32_t summed(int slot) const { return shared + (2 * MOST_STAGES + slot) * 8; }
    __device__ __forceinline__ uint32_t free(int owner, int slot) const {
        return shared + (2 * MOST_STAGES + MOST_SLOTS + owner * MOST_SLOTS + slot) * 8;
    }
    __device__ __forceinline__ uint32_t tokens_full() const { return free(MOST_SPLIT, 0); }
    __device__ __forceinline__ uint32_t norm_full() const { return free(MOST_SPLIT, 1); }
    __device__ __forceinline__ uint32_t squares_full() const { return free(MOST_SPLIT, 2); }

    // Parts of shared memory: barriers, sums of squares [rows][SPLIT * 8], weights of the norm, tokens, sums, ring.
    __device__ __forceinline__ uint32_t squares() const { return shared + 512; }
    __device__ __forceinline__ uint32_t norm() const { return squares() + (p.norm ? 16 * PARTS * 4 : 0); }
    __device__ __forceinline__ uint32_t tokens() const { return norm() + (p.norm ? most_tiles() * 256 : 0); }
    __device__ __forceinline__ uint32_t token_bytes() const { return most_tiles() * 128 + 16; }
    __device__ __forceinline__ uint32_t sums() const { return tokens() + p.rows * token_bytes(); }
    __device__ __forceinline__ uint32_t ring() const { return (sums() + (parts() * part_bytes() << p.slots) + 127) / 128 * 128; }
    __device__ __forceinline__ uint32_t stage_bytes() const { return most_tiles() * (NV_TILE_CODES + NV_TILE_SCALES); }

    // At what warps hand over to one another each lane answers for itself.
    __device__ __forceinline__ void init() const {
        for (int stage = 0; stage < p.stages; ++stage) barrier_init(full(stage), 1), barrier_init(empty(stage), 32 << p.pieces);
        for (int slot = 0; slot < 1 << p.slots; ++slot) {
            barrier_init(summed(slot), SPLIT > 1 ? 1 : 32 << p.pieces);
            for (int owner = 0; owner < SPLIT; ++owner) barrier_init(free(owner, slot), SPLIT > 1 ? 1 : 32);
        }
        barrier_init(tokens_full(), 1), barrier_init(norm_full(), 1), barrier_init(squares_full(), 1);
        barrier_init_fence();
        if (SPLIT > 1) {
            for (int slot = 0; slot < 1 << p.slots && slot < owned(); ++slot) barrier_expect(summed(slot), parts() * part_bytes());
            if (p.norm) barrier_expect(squares_full(), PARTS * p.rows * 4);
        }
    }
};

// The thread that brings weights, and tokens that are bf16.
template <int SPLIT> struct Copier {
    const Block<SPLIT>& b;
    int strip = 0, stage = 0;
    uint32_t parity = 1;

    __device__ __forceinline__ void next() {
        const Params& p = b.p;
        if (strip >= p.stages) barrier_wait(b.empty(stage), parity);
        const char* const from = p.weights + (b.begin + strip) * nv_strip_bytes(p.tiles);
        const uint32_t to = b.ring() + stage * b.stage_bytes(), codes = b.tiles * NV_TILE_CODES, scales = b.tiles * NV_TILE_SCALES;
        barrier_expect(b.full(stage), codes + scales);
        if (SPLIT == 1) {
            bulk_load(to, from, codes + scales, b.full(stage));
        } else {
            bulk_load(to, from + b.first_tile * NV_TILE_CODES, codes, b.full(stage));
            bulk_load(to + codes, from + p.tiles * NV_TILE_CODES + b.first_tile * NV_TILE_SCALES, scales, b.full(stage));
        }
        if (b.count - ++strip == p.launch) pdl_launch();
        if (++stage == p.stages) stage = 0, parity ^= 1;
    }
    __device__ __forceinline__ void norm() const {
        barrier_expect(b.norm_full(), b.tiles * 256);
        bulk_load(b.norm(), b.p.norm + b.first_tile * 64, b.tiles * 256, b.norm_full());
    }
    __device__ __forceinline__ void tokens() const {
        const char* from = static_cast<const char*>(b.p.x) + b.first_tile * 128;
        barrier_expect(b.tokens_full(), b.p.rows * b.tiles * 128);
        for (int row = 0; row < b.p.rows; ++row)
            bulk_load(b.tokens() + row * b.token_bytes(), from + static_cast<size_t>(row) * b.p.tiles * 128, b.tiles * 128, b.tokens_full());
    }
};

// bf16(x * weight) of the block's columns to shared memory, and the sums of squares of a sixteenth of all columns each, BATCH of them in a
// warp's hands at a time.
template <int SPLIT, int BATCH> DEVICE void stage_normed(const Block<SPLIT>& b, int warp, int lane) {
    constexpr int SEGMENTS = PARTS / SPLIT, UNITS = 2;
    const Params& p = b.p;
    const int units = b.tiles * SPLIT, items = p.rows * SEGMENTS;
    const float4* const from = reinterpret_cast<const float4*>(static_cast<const float*>(p.x) + b.first_tile * 64);
    bool waited = false;
    for (int first = warp; first < items; first += BATCH * WARPS) {
        float squares[BATCH];
#pragma unroll
        for (int k = 0; k < BATCH; ++k) squares[k] = 0;
        for (int base = 0; base < units; base += UNITS * 32) {
            float4 v[BATCH][UNITS];
#pragma unroll
            for (int k = 0; k < BATCH; ++k) {
                const int item = first + k * WARPS, row = item / SEGMENTS, start = item % SEGMENTS * units;
#pragma unroll
                for (int i = 0; i < UNITS; ++i) {
                    const int unit = base + i * 32 + lane;
                    if (item < items && unit < units) v[k][i] = __ldcg(from + static_cast<size_t>(row) * p.tiles * 16 + start + unit);
                }
            }
            if (!waited) barrier_wait(b.norm_full(), 0);
            waited = true;
#pragma unroll
            for (int k = 0; k < BATCH; ++k) {
                const int item = first + k * WARPS, row = item / SEGMENTS, start = item % SEGMENTS * units;
#pragma unroll
                for (int i = 0; i < UNITS; ++i) {
                    const int unit = base + i * 32 + lane;
                    if (item >= items || unit >= units) continue;
                    float w[4];
                    asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
                                 : "=f"(w[0]), "=f"(w[1]), "=f"(w[2]), "=f"(w[3])
                                 : "r"(b.norm() + (start + unit) * 16)
                                 : "memory");
                    const float4 a = v[k][i];
                    squares[k] = fmaf(a.x, a.x, fmaf(a.y, a.y, fmaf(a.z, a.z, fmaf(a.w, a.w, squares[k]))));
                    asm volatile("st.shared.v2.b32 [%0], {%1,%2};" ::"r"(b.tokens() + row * b.token_bytes() + (start + unit) * 8),
                                 "r"(pack2<__nv_bfloat16>(a.x * w[0], a.y * w[1])), "r"(pack2<__nv_bfloat16>(a.z * w[2], a.w * w[3]))
                                 : "memory");
                }
            }
        }
#pragma unroll
        for (int k = 0; k < BATCH; ++k) {
            const int item = first + k * WARPS;
            if (item >= items) continue;
            const float sum = warp_sum(squares[k]);
            const uint32_t at = b.squares() + (item / SEGMENTS * PARTS + b.rank * SEGMENTS + item % SEGMENTS) * 4;
            if (SPLIT > 1) {
                if (lane < SPLIT) send(at, b.squares_full(), lane, sum);
            } else if (lane == 0) {
                asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(sum) : "memory");
            }
        }
    }
}

DEVICE void load_tile(uint4& codes, uint2& scales, uint32_t codes_at, uint32_t scales_at) {
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(codes.x), "=r"(codes.y), "=r"(codes.z), "=r"(codes.w) : "r"(codes_at));
    asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(scales.x), "=r"(scales.y) : "r"(scales_at));
}

// Pieces of strips.
template <int SPLIT, int NT> DEVICE void multiply(const Block<SPLIT>& b, int warp, int lane) {
    const Params& p = b.p;
    const int piece = warp & ((1 << p.pieces) - 1), group = warp >> p.pieces, groups = WARPS >> p.pieces, g = lane / 4, t = lane % 4;
    const int first = share(b.tiles, piece, p.pieces), count = share(b.tiles, piece + 1, p.pieces) - first;
    uint32_t tokens[NT];
#pragma unroll
    for (int n = 0; n < NT; ++n)
        tokens[n] = b.tokens() + min(n * 8 + lane % 8, p.rows - 1) * b.token_bytes() + first * 128 + lane / 8 * 16;
    int stage = group;
    uint32_t parity = 0;
#pragma unroll 1
    for (int strip = group; strip < b.count; strip += groups) {
        const uint32_t base = b.ring() + stage * b.stage_bytes();
        uint32_t codes_at = base + first * NV_TILE_CODES + lane * 16, scales_at = base + b.tiles * NV_TILE_CODES + first * NV_TILE_SCALES + g * 8;
        float d[NT][2][4];
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int i = 0; i < 8; ++i) d[n][i / 4][i % 4] = 0;
        barrier_wait(b.full(stage), parity);
        uint32_t at[NT];
#pragma unroll
        for (int n = 0; n < NT; ++n) at[n] = tokens[n];
        uint4 next;
        uint2 next_scales;
        load_tile(next, next_scales, codes_at, scales_at);
#pragma unroll 2
        for (int tile = 0; tile < count; ++tile) {
            const uint4 codes = next;
            const uint2 scales = next_scales;
            uint4 x[NT][2];
#pragma unroll
            for (int n = 0; n < NT; ++n) load_matrices(x[n][0], at[n]), load_matrices(x[n][1], at[n] + 64), at[n] += 128;
            codes_at += NV_TILE_CODES, scales_at += NV_TILE_SCALES;
            if (tile + 1 < count) load_tile(next, next_scales, codes_at, scales_at);
            uint32_t a[4][4];
            nv_dequantise(codes, scales, a);
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int n = 0; n < NT; ++n) {
                    const uint4 v = x[n][half];
                    mma_bf16(d[n][0], a[half * 2][0], a[half * 2][1], a[half * 2][2], a[half * 2][3], v.x, v.y);
                    mma_bf16(d[n][1], a[half * 2 + 1][0], a[half * 2 + 1][1], a[half * 2 + 1][2], a[half * 2 + 1][3], v.z, v.w);
                }
        }
        __syncwarp();
        if (strip + p.stages < b.count) barrier_arrive(b.empty(stage));
        stage += groups;
        while (stage >= p.stages) stage -= p.stages, parity ^= 1;

        const int owner = strip % SPLIT, turn = strip / SPLIT, slot = turn & ((1 << p.slots) - 1), round = turn >> p.slots;
        if (round > 0) {
            barrier_wait(b.free(owner, slot), (round - 1) & 1);
        }
        const uint32_t to = b.sums() + (slot * b.parts() + (b.rank << p.pieces) + piece) * b.part_bytes();
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            const int pair = n * 4 + t;
            if (pair >= b.pairs) continue;
            const float4 v = make_float4(d[n][0][0] + d[n][1][0], d[n][0][1] + d[n][1][1], d[n][0][2] + d[n][1][2], d[n][0][3] + d[n][1][3]);
            const uint32_t out = to + (g * b.pairs + pair) * 16;
            if (SPLIT > 1) send(out, b.summed(slot), owner, v);
            else asm volatile("st.shared.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(out), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
        }
        if (SPLIT == 1) {
            __syncwarp();
            barrier_arrive(b.summed(slot));
        }
    }
}

// Sums of the strips that the block owns, every FINISHERS-th of them.
template <int SPLIT, int NT> DEVICE void finish(const Block<SPLIT>& b, int finisher, int lane) {
    const Params& p = b.p;
    const int owned = b.owned(), items = 8 * b.pairs;
    // Of each of a lane's items: row in the strip, pair of tokens.
    const auto g_of = [&](int k) { return (k * 32 + lane) * p.reciprocal >> 16; };
    const auto pair_of = [&](int k) { return k * 32 + lane - g_of(k) * b.pairs; };
    const auto strip_of = [&](int turn) { return b.begin + turn * SPLIT + b.rank; };
    constexpr int MOST = (8 * 4 * NT + 31) / 32;
    float factors[MOST][2];
    const auto load_factors = [&](int turn) {
#pragma unroll
        for (int k = 0; k < MOST; ++k) {
            if (k * 32 + lane >= items || turn >= owned) continue;
            factors[k][0] = __ldg(p.factors + strip_of(turn) * 16 + g_of(k));
            factors[k][1] = __ldg(p.factors + strip_of(turn) * 16 + g_of(k) + 8);
        }
    };
    load_factors(finisher);
    pdl_wait();
    const int live = min(__ldcg(p.live), p.rows);
    float* const y = static_cast<float*>(p.y);
    float scale = NV_UNIT;
    bool scaled = p.norm == nullptr;
    if (SPLIT > 1 && p.norm) barrier_wait(b.squares_full(), 0);
    for (int turn = finisher; turn < owned; turn += FINISHERS) {
        const int strip = strip_of(turn), slot = turn & ((1 << p.slots) - 1), round = turn >> p.slots;
        float early[MOST][4];
        if (p.output == ADDED) {
#pragma unroll
            for (int k = 0; k < MOST; ++k) {
                const int row = pair_of(k) * 2;
                if (k * 32 + lane >= items) continue;
                const float* const from = y + static_cast<size_t>(row) * p.stride + strip * 16 + g_of(k);
                if (row < live) early[k][0] = __ldcg(from), early[k][2] = __ldcg(from + 8);
                if (row + 1 < live) early[k][1] = __ldcg(from + p.stride), early[k][3] = __ldcg(from + p.stride + 8);
            }
        }
        barrier_wait(b.summed(slot), round & 1);
        float4 sum[MOST];
#pragma unroll
        for (int k = 0; k < MOST; ++k) {
            sum[k] = make_float4(0, 0, 0, 0);
            if (k * 32 + lane >= items) continue;
            const uint32_t from = b.sums() + slot * b.parts() * b.part_bytes() + (k * 32 + lane) * 16;
#pragma unroll 8
            for (int part = 0; part < b.parts(); ++part) {
                float4 v;
                asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
                             : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                             : "r"(from + part * b.part_bytes())
                             : "memory");
                sum[k].x += v.x, sum[k].y += v.y, sum[k].z += v.z, sum[k].w += v.w;
            }
        }
        __syncwarp();
        if (turn + (1 << p.slots) < owned) {
            if (SPLIT > 1) {
                if (lane == 0) barrier_expect(b.summed(slot), b.parts() * b.part_bytes());
                __syncwarp();
                if (lane < SPLIT) arrive_at(b.free(b.rank, slot), lane);
            } else {
                barrier_arrive(b.free(0, slot));
            }
        }
        if (!scaled) {
            // Of row `lane`.
            float square = 0;
            if (lane < p.rows) {
                for (int part = 0; part < PARTS; ++part) {
                    float v;
                    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(b.squares() + (lane * PARTS + part) * 4) : "memory");
                    square += v;
                }
            }
            scale = NV_UNIT * rsqrtf(fmaf(square, p.mean, p.eps));
            scaled = true;
        }
#pragma unroll
        for (int k = 0; k < MOST; ++k) {
            const int row = pair_of(k) * 2, g = g_of(k);
            const float low = __shfl_sync(~0u, scale, row), high = __shfl_sync(~0u, scale, row + 1);
            if (k * 32 + lane >= items) continue;
            const float v[4] = {__fmul_rn(__fmul_rn(sum[k].x, low), factors[k][0]), __fmul_rn(__fmul_rn(sum[k].y, high), factors[k][0]),
                                __fmul_rn(__fmul_rn(sum[k].z, low), factors[k][1]), __fmul_rn(__fmul_rn(sum[k].w, high), factors[k][1])};
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                if (row + i >= live) continue;
                const size_t at = static_cast<size_t>(row + i) * p.stride;
                if (p.output == SWIGLU) {
                    const float silu = __fdividef(v[i], 1.0f + __expf(-v[i]));
                    static_cast<__nv_bfloat16*>(p.y)[at + strip * 8 + g] = __float2bfloat16(silu * v[2 + i]);
                } else if (p.output == ADDED) {
                    y[at + strip * 16 + g] = __fadd_rn(early[k][i], v[i]);
                    y[at + strip * 16 + g + 8] = __fadd_rn(early[k][2 + i], v[2 + i]);
                } else {
                    y[at + strip * 16 + g] = v[i];
                    y[at + strip * 16 + g + 8] = v[2 + i];
                }
            }
        }
        load_factors(turn + FINISHERS);
    }
}

template <int SPLIT, int NT> DEVICE void gemv_nvfp4(const Params& p) {
    extern __shared__ __align__(128) unsigned char memory[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Block<SPLIT> b(p, shared_address(memory));
    Copier<SPLIT> copier{b};
    const bool copies = threadIdx.x == THREADS - 32;
    if (copies) {
        b.init();
        if (b.count <= p.launch) pdl_launch();
        while (copier.strip < min(b.count, p.stages)) {
            copier.next();
            if (copier.strip == 1 && p.norm) copier.norm();
        }
    }
    __syncthreads();
    if (SPLIT > 1) cluster_arrive(), cluster_wait();
    if (warp < WARPS) {
        pdl_wait();
        if (p.norm) {
            if (p.rows * (PARTS / SPLIT) <= WARPS) stage_normed<SPLIT, 1>(b, warp, lane);
            else stage_normed<SPLIT, 4>(b, warp, lane);
            asm volatile("bar.sync 1, %0;" ::"n"(WARPS * 32) : "memory");
        } else {
            barrier_wait(b.tokens_full(), 0);
        }
        multiply<SPLIT, NT>(b, warp, lane);
    } else if (warp < WARPS + FINISHERS) {
        finish<SPLIT, NT>(b, warp - WARPS, lane);
    } else if (copies) {
        if (p.norm == nullptr) {
            pdl_wait();
            copier.tokens();
        }
        while (copier.strip < b.count) copier.next();
        if (p.norm) pdl_wait();
    }
}
#define BODY(SPLIT, NT) gemv_nvfp4<SPLIT, NT>(p)
#define CLUSTER(SPLIT) __cluster_dims__(SPLIT, 1, 1)
#else
#define BODY(SPLIT, NT)
#define CLUSTER(SPLIT)
#endif

#define KERNEL_OF(SPLIT, NT)                                                                                                   \
    KERNEL CLUSTER(SPLIT) __launch_bounds__(THREADS, 2) gemv_nvfp4_##SPLIT##_##NT(const __grid_constant__ Params p) { BODY(SPLIT, NT); }
KERNEL_OF(1, 1)
KERNEL_OF(1, 2)
KERNEL_OF(2, 1)
KERNEL_OF(2, 2)
KERNEL_OF(4, 1)
KERNEL_OF(4, 2)
