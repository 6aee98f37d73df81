// The experts' products where activations fit the registers of a block (Hopper): weights stream through one ring of whole strips, a warp
// multiplies the same piece of every strip by tokens that it holds, and other warps add the pieces up. Nothing waits for the whole block.
//
// Sums are those of experts.cuh: a piece block after block, the pieces in order.
#pragma once
#include "common/experts.cuh"
#include "common/swiglu.cuh"

// Where column `col` of a row is in fragment order.
DEVICE int fragment(int col) { return (col & ~31) + ((col >> 1 & 3) << 3) + ((col >> 3 & 3) << 1) + (col & 1); }

#ifdef HOPPER

constexpr int MULTIPLIERS = 16;                         // warps, one for each piece of a strip
constexpr int FINISHERS = 3;                            // warps that add up pieces; the one before them copies
constexpr int ARRIVALS = 32;                            // of a warp at a barrier: each lane answers for what it read and wrote
constexpr int MOST_STAGES = 8;
constexpr int GROUP_PIPE = 16;                          // most tokens of a segment
constexpr int SUMS = GROUP_PIPE / 8 * 32;               // partial sums of a piece, four to a lane and tile of 8 tokens
// Units whose bias is in shared memory. A bias is used at most stages + FINISHERS units after the copier wrote it.
constexpr int BIASES = 16;
constexpr int PIPE_FIXED = BARRIERS + BIASES * 64;      // bytes of shared memory before the sums

// One product: strips of the segments, one after another, of which the block has units begin .. end.
struct Product {
    const char* weights;  // strips of expert 0
    const float* bias;    // 16 floats for each strip, in their order
    const __half* in;     // a pair's activations: row pair / share
    int share;
    int strips;           // of an expert
    int tiles;            // of a strip
    int begin, end;

    METHOD int strip_size() const { return tiles * (TILE_CODES + TILE_SCALES); }
    METHOD const uint4* row_of(int pair) const { return reinterpret_cast<const uint4*>(in + static_cast<size_t>(pair / share) * (tiles * 64)); }

    // The block's share: a strip of more than 8 tokens takes longer. All lanes of a warp take part.
    METHOD void deal(const Work& work, int segments) {
        const int lane = threadIdx.x % 32;
        auto cost_of = [&](int segment) { return segment >= segments ? 0 : work.segments[segment].count > 8 ? 5 : 4; };
        int total = 0;
#pragma unroll 1
        for (int base = 0; base < segments; base += 32) total += __reduce_add_sync(~0u, cost_of(base + lane));
        const int blocks = gridDim.x, from = ::share(total * strips, blockIdx.x), to = ::share(total * strips, blockIdx.x + 1);
        begin = end = segments * strips;
        int before = 0;
#pragma unroll 1
        for (int base = 0; base < segments; base += 32) {
            const int cost = cost_of(base + lane);
            int upto = cost;
#pragma unroll
            for (int distance = 1; distance < 32; distance <<= 1) {
                const int other = __shfl_up_sync(~0u, upto, distance);
                if (lane >= distance) upto += other;
            }
            upto += before;
            const int start = (upto - cost) * strips;
            // The first unit that starts at or after a bound.
            auto unit_at = [&](int bound) { return (base + lane) * strips + (bound - start + cost - 1) / max(cost, 1); };
            const uint32_t begins = __ballot_sync(~0u, from >= start && from < upto * strips);
            const uint32_t ends = __ballot_sync(~0u, to >= start && to < upto * strips);
            if (begins) begin = __shfl_sync(~0u, unit_at(from), __ffs(begins) - 1);
            if (ends) end = __shfl_sync(~0u, unit_at(to), __ffs(ends) - 1);
            before = __shfl_sync(~0u, upto, 31);
        }
    }
};

// What a block's warps share. Several products may pass through it in turn, all of as many pieces.
struct Pipe {
    const Work& work;
    uint32_t barriers;  // of stages: full, empty; of sums: full, empty
    uint32_t ring;      // shared address of `stages` strips
    int stages;
    int stage_bytes;
    int pieces;
    char* biases;       // [BIASES][64]
    float4* sums;       // [FINISHERS][pieces][SUMS]

    METHOD uint32_t full(int stage) const { return barriers + stage * 8; }
    METHOD uint32_t empty(int stage) const { return barriers + (MOST_STAGES + stage) * 8; }
    METHOD uint32_t summed(int finisher) const { return barriers + (2 * MOST_STAGES + finisher) * 8; }
    METHOD uint32_t added(int finisher) const { return barriers + (2 * MOST_STAGES + FINISHERS + finisher) * 8; }
    // Two more, for what a kernel has beside.
    METHOD uint32_t spare(int i) const { return barriers + (2 * MOST_STAGES + 2 * FINISHERS + i) * 8; }

    // One thread, before the block's first barrier and before `barrier_init_fence`.
    METHOD void init() const {
#pragma unroll 1
        for (int stage = 0; stage < stages; ++stage) barrier_init(full(stage), 1), barrier_init(empty(stage), pieces * ARRIVALS);
#pragma unroll 1
        for (int finisher = 0; finisher < FINISHERS; ++finisher) barrier_init(summed(finisher), pieces * ARRIVALS), barrier_init(added(finisher), ARRIVALS);
    }
};

// As `bulk_load`; what was read is the first to leave L2.
DEVICE void bulk_load_once(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
    asm volatile(
        "{ .reg .b64 once; createpolicy.fractional.L2::evict_first.b64 once, 1.0;\n\t"
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], once; }" ::"r"(to),
        "l"(from), "r"(bytes), "r"(barrier)
        : "memory");
}

// The thread that brings the strips.
struct Copier {
    const Pipe& pipe;
    int stage = 0, turn = 0;  // stage, unit that is next
    uint32_t parity = 1;

    METHOD void run(const Product& product) {
        const uint32_t bytes = product.strip_size();
        int segment = product.begin / product.strips, strip = product.begin % product.strips;
#pragma unroll 1
        for (int unit = product.begin; unit < product.end; ++unit) {
            const size_t at = static_cast<size_t>(pipe.work.segments[segment].expert) * product.strips + strip;
            barrier_wait(pipe.empty(stage), parity);
            barrier_expect(pipe.full(stage), bytes + 64);
            bulk_load_once(pipe.ring + stage * pipe.stage_bytes, product.weights + at * bytes, bytes, pipe.full(stage));
            bulk_load(shared_address(pipe.biases + turn++ % BIASES * 64), product.bias + at * 16, 64, pipe.full(stage));
            if (++stage == pipe.stages) stage = 0, parity ^= 1;
            if (++strip == product.strips) strip = 0, ++segment;
        }
    }
};

DEVICE uint4 load_shared_16(uint32_t at) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
    return v;
}
DEVICE uint32_t load_shared_4(uint32_t at) {
    uint32_t v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
    return v;
}
DEVICE void store_shared_16(uint32_t at, const float (&v)[4]) {
    asm volatile("st.shared.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(at), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]) : "memory");
}

// acc += 2^-14 * (a lane's codes and scales of a tile x its operands of NT tiles of 8 tokens).
template <int NT> DEVICE void multiply_words(uint4 codes, uint32_t word, const uint4 (&b)[NT][PIECE * 2], int tile, float (&acc)[NT][4]) {
    float scales[4];
    e8m0(word, scales);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        uint32_t low[4], high[4];
        fp4_to_fp16(half ? codes.z : codes.x, low);
        fp4_to_fp16(half ? codes.w : codes.y, high);
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            const uint4 v = b[n][tile * 2 + half];
            float d[4];
            mma_fp16_fresh(d, low[0], high[0], low[1], high[1], v.x, v.y);
            mma_fp16(d, low[2], high[2], low[3], high[3], v.z, v.w);
            acc[n][0] = fmaf(scales[half * 2], d[0], acc[n][0]);
            acc[n][1] = fmaf(scales[half * 2], d[1], acc[n][1]);
            acc[n][2] = fmaf(scales[half * 2 + 1], d[2], acc[n][2]);
            acc[n][3] = fmaf(scales[half * 2 + 1], d[3], acc[n][3]);
        }
    }
}

// A warp that multiplies: piece `warp` of every strip.
struct Multiplier {
    const Pipe& pipe;
    int stage = 0, finisher = 0;
    uint32_t parity = 0, added_parity = 1;

    // FULL: the piece has PIECE tiles.
    template <int NT, bool FULL> METHOD void run(const Product& product, const Segment& now, int units) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        const int count = FULL ? PIECE : product.tiles - warp * PIECE;
        uint4 b[NT][PIECE * 2];
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            // Lanes beyond the last token repeat it; their products are not used.
            const int token = min(n * 8 + lane / 4, now.count - 1);
            const uint4* const from = product.row_of(pipe.work.pairs[now.first + token]) + warp * (PIECE * 8) + lane % 4;
#pragma unroll
            for (int block = 0; block < PIECE * 2; ++block)
                b[n][block] = block < 2 || block / 2 < count ? from[block * 4] : make_uint4(0, 0, 0, 0);
        }
        const uint32_t bytes = pipe.stage_bytes, sums_bytes = pipe.pieces * SUMS * 16;
        const uint32_t first_codes = pipe.ring + warp * (PIECE * TILE_CODES) + lane * 16;
        const uint32_t to_scales = pipe.ring + product.tiles * TILE_CODES + warp * (PIECE * TILE_SCALES) + lane / 4 * 4 - first_codes;
        const uint32_t first_out = shared_address(pipe.sums + warp * SUMS + lane);
        uint32_t codes_at = first_codes + stage * bytes, out = first_out + finisher * sums_bytes;
#pragma unroll 1
        for (; units > 0; --units) {
            barrier_wait(pipe.full(stage), parity);
            uint4 codes[PIECE];
            uint32_t scales[PIECE];
            // A last piece that is short repeats a tile, times zero.
#pragma unroll
            for (int tile = 0; tile < PIECE; ++tile) {
                const int at = FULL || tile < count ? tile : 0;
                codes[tile] = load_shared_16(codes_at + at * TILE_CODES);
                scales[tile] = load_shared_4(codes_at + to_scales + at * TILE_SCALES);
            }
            __syncwarp();
            barrier_arrive(pipe.empty(stage));
            codes_at += bytes;
            if (++stage == pipe.stages) stage = 0, parity ^= 1, codes_at = first_codes;
            // Waited for here, not where it is needed, so that the compiler leaves the loads above in one place.
            barrier_wait(pipe.added(finisher), added_parity);
            float acc[NT][4];
#pragma unroll
            for (int n = 0; n < NT; ++n) acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0;
#pragma unroll
            for (int tile = 0; tile < PIECE; ++tile) multiply_words<NT>(codes[tile], scales[tile], b, tile, acc);
#pragma unroll
            for (int n = 0; n < NT; ++n) store_shared_16(out + n * 512, acc[n]);
            __syncwarp();
            barrier_arrive(pipe.summed(finisher));
            out += sums_bytes;
            if (++finisher == FINISHERS) finisher = 0, added_parity ^= 1, out = first_out;
        }
    }

    METHOD void run(const Product& product) {
        const int left = product.tiles - static_cast<int>(threadIdx.x / 32) * PIECE;
        if (left <= 0) return;
#pragma unroll 1
        for (int unit = product.begin, segment = unit / product.strips; unit < product.end; ++segment) {
            const Segment now = pipe.work.segments[segment];
            const int next = min(product.end, (segment + 1) * product.strips), units = next - unit;
            if (left < PIECE) run<2, false>(product, now, units);
            else if (now.count <= 8) run<1, true>(product, now, units);
            else run<2, true>(product, now, units);
            unit = next;
        }
    }
};

// A warp that adds: every FINISHERS-th unit.
struct Finisher {
    const Pipe& pipe;
    int turn;            // the unit that is next, of all products
    int before = 0;      // units of the products before
    uint32_t parity = 0;

    // `done(segment, strip, tile of 8 tokens, d, bias)`: `d` is 2^-14 of the products, lanes as the D of an m16n8k16.
    template <class Done> METHOD void run(const Product& product, Done done) {
        const int finisher = threadIdx.x / 32 - MULTIPLIERS - 1, lane = threadIdx.x % 32, pieces = pipe.pieces;
        const float4* const in = pipe.sums + finisher * pieces * SUMS + lane;
        int unit = product.begin + turn - before, segment = unit / product.strips, strip = unit % product.strips;
#pragma unroll 1
        for (; unit < product.end; unit += FINISHERS) {
            const Segment now = pipe.work.segments[segment];
            barrier_wait(pipe.summed(finisher), parity);
            parity ^= 1;
            const float* const bias = reinterpret_cast<const float*>(pipe.biases + turn % BIASES * 64);
#pragma unroll 1
            for (int n = 0; n * 8 < now.count; ++n) {
                float sum[4] = {0, 0, 0, 0};
#pragma unroll 5
                for (int piece = 0; piece < pieces; ++piece) {
                    const float4 v = in[piece * SUMS + n * 32];
                    sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
                }
                done(now, strip, n, sum, bias);
            }
            __syncwarp();
            barrier_arrive(pipe.added(finisher));
            turn += FINISHERS, strip += FINISHERS;
            while (strip >= product.strips) strip -= product.strips, ++segment;
        }
        before += product.end - product.begin;
    }
};

// The registers of 640 threads by role; each in its own branch, which the compiler's count of registers follows.
DEVICE void registers_of_multipliers() { registers_grow<104>(); }
DEVICE void registers_of_others() { registers_shrink<64>(); }

#endif
