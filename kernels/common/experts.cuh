// What the two products of the small-batch mixture of experts share: the list of work, the ring through which a warp streams
// weights, and the product of one piece of a strip.
//
// Sums run in one order whatever the batch: a piece of PIECE tiles is summed block after block into fresh accumulators, and
// the pieces of a row are added in order. Which warp does which piece is free, so a row's bits do not depend on its neighbours.
#pragma once
#include "common/mxfp4.cuh"

#define METHOD __device__ __forceinline__

constexpr int WARPS = 16;
constexpr int THREADS = WARPS * 32;
constexpr int PIECE = 3;                                       // tiles of a piece
constexpr int STAGE = PIECE * (TILE_CODES + TILE_SCALES);      // bytes of a ring's stage: codes, then scales
constexpr int STAGES = 3;
constexpr int RING = WARPS * STAGES * STAGE;                   // bytes of shared memory

// One expert and up to `group` of the tokens that chose it.
struct __align__(8) Segment {
    uint16_t expert, first, count, unused;  // tokens are pairs[first .. first + count]
};

// Work of a step, in shared memory; sizes for `pairs` (row, slot) pairs. A pair is row * top_k + slot.
struct Work {
    Segment* segments;   // [pairs]
    uint16_t* pairs;     // [pairs], by expert, then row
    uint32_t* chosen;    // [pairs / 4 rounded up]: the experts' bytes
    uint32_t* totals;    // [8]
};

DEVICE constexpr int work_bytes(int pairs) { return pairs * 8 + (pairs * 2 + 15) / 16 * 16 + (pairs + 15) / 16 * 16 + 32; }

DEVICE Work work_at(char* shared, int pairs) {
    Work work;
    work.segments = reinterpret_cast<Segment*>(shared);
    work.pairs = reinterpret_cast<uint16_t*>(shared + pairs * 8);
    work.chosen = reinterpret_cast<uint32_t*>(shared + pairs * 8 + (pairs * 2 + 15) / 16 * 16);
    work.totals = work.chosen + (pairs + 15) / 16 * 4;
    return work;
}

// Lists the active experts in order and their pairs in order, `group` tokens a segment. Returns the number of segments. All
// threads take part; `capacity` is what `work` was made for, `live` the pairs there are. At most 128 experts.
DEVICE int list_work(const Work& work, const int* choice, int live, int capacity, int experts, int group) {
    const int thread = threadIdx.x, lane = thread % 32, words = (capacity + 3) / 4;
    uint8_t* bytes = reinterpret_cast<uint8_t*>(work.chosen);
    for (int i = thread; i < words * 4; i += THREADS) {
        // An index that no router writes must not lead out of bounds.
        bytes[i] = i < live ? static_cast<uint8_t>(min(static_cast<unsigned>(choice[i]), static_cast<unsigned>(experts - 1))) : 0xff;
    }
    __syncthreads();
    uint32_t mine = 0, sum = 0;
    if (thread < 128) {
        for (int word = 0; word < words; ++word)
            mine += __popc(__vcmpeq4(work.chosen[word], thread * 0x01010101u)) >> 3;
        // Low half: pairs before this expert; high half: segments before it.
        const uint32_t own = mine | (mine + group - 1) / group << 16;
        sum = own;
#pragma unroll
        for (int step = 1; step < 32; step <<= 1) {
            const uint32_t other = __shfl_up_sync(~0u, sum, step);
            if (lane >= step) sum += other;
        }
        if (lane == 31) work.totals[thread / 32] = sum;
        sum -= own;
    }
    __syncthreads();
    if (mine > 0) {
        for (int warp = 0; warp < thread / 32; ++warp) sum += work.totals[warp];
        const int first = sum & 0xffff;
        int at = first;
        for (int i = 0; i < live; ++i)
            if (bytes[i] == thread) work.pairs[at++] = static_cast<uint16_t>(i);
        Segment* segment = work.segments + (sum >> 16);
        for (int done = 0; done < static_cast<int>(mine); done += group, ++segment) {
            segment->expert = static_cast<uint16_t>(thread);
            segment->first = static_cast<uint16_t>(first + done);
            segment->count = static_cast<uint16_t>(min(static_cast<int>(mine) - done, group));
        }
    }
    __syncthreads();
    return (work.totals[0] + work.totals[1] + work.totals[2] + work.totals[3]) >> 16;
}

// The weights: strips of all experts.
struct Strips {
    const char* base;
    int strips;  // of an expert
    int tiles;   // of a strip

    METHOD int pieces() const { return (tiles + PIECE - 1) / PIECE; }
};

// Copies piece `piece` of a strip to a stage. The caller commits.
DEVICE void fetch(const Strips& weights, int expert, int strip, int piece, uint32_t stage) {
    const int lane = threadIdx.x % 32, count = min(PIECE, weights.tiles - piece * PIECE);
    const char* from = weights.base + (static_cast<size_t>(expert) * weights.strips + strip) * strip_bytes(weights.tiles);
    const char* codes = from + piece * (PIECE * TILE_CODES) + lane * 16;
    const char* scales = from + weights.tiles * TILE_CODES + piece * (PIECE * TILE_SCALES) + lane * 16;
#pragma unroll
    for (int tile = 0; tile < PIECE; ++tile)
        if (tile < count) copy_async_16(stage + tile * TILE_CODES + lane * 16, codes + tile * TILE_CODES);
    if (lane < count * 2) copy_async_16(stage + PIECE * TILE_CODES + lane * 16, scales);
}

// The operands of one lane for one piece and NT tiles of 8 tokens: columns 2t, 2t + 1, 2t + 8, ... of each block of 32. Activations
// are stored in that order (fragment order, README.md), so that they are one 16-byte load.
template <int NT> struct Tokens {
    const uint4* at[NT];  // of token (tile * 8 + g), at this lane's chunk of the first block; null is no token
    uint4 b[NT][PIECE * 2];

    METHOD void load(int piece, int tiles) {
#pragma unroll
        for (int block = 0; block < PIECE * 2; ++block) {
            const bool there = piece * PIECE + block / 2 < tiles;
#pragma unroll
            for (int n = 0; n < NT; ++n) {
                b[n][block] = make_uint4(0, 0, 0, 0);
                if (there && at[n] != nullptr) b[n][block] = at[n][(piece * PIECE * 2 + block) * 4];
            }
        }
    }
};

// One tile of a piece: acc += 2^-14 * (16 rows x 64 columns x NT * 8 tokens).
template <int NT>
DEVICE void multiply_tile(const char* stage, int tile, const uint4 (&b)[NT][PIECE * 2], float (&acc)[NT][4]) {
    const int lane = threadIdx.x % 32;
    const uint4 codes = *reinterpret_cast<const uint4*>(stage + tile * TILE_CODES + lane * 16);
    const uint32_t scales =
        *reinterpret_cast<const uint32_t*>(stage + PIECE * TILE_CODES + tile * TILE_SCALES + lane / 4 * 4);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        uint32_t low[4], high[4];
        fp4_to_fp16(half ? codes.z : codes.x, low);
        fp4_to_fp16(half ? codes.w : codes.y, high);
        const float low_scale = half ? e8m0<2>(scales) : e8m0<0>(scales);
        const float high_scale = half ? e8m0<3>(scales) : e8m0<1>(scales);
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            const uint4 v = b[n][tile * 2 + half];
            float d[4];
            mma_fp16_fresh(d, low[0], high[0], low[1], high[1], v.x, v.y);
            mma_fp16(d, low[2], high[2], low[3], high[3], v.z, v.w);
            acc[n][0] = fmaf(low_scale, d[0], acc[n][0]);
            acc[n][1] = fmaf(low_scale, d[1], acc[n][1]);
            acc[n][2] = fmaf(high_scale, d[2], acc[n][2]);
            acc[n][3] = fmaf(high_scale, d[3], acc[n][3]);
        }
    }
}

// acc = 2^-14 * (a strip's piece of `count` tiles x tokens), lanes as the D of an m16n8k16.
template <int NT>
DEVICE void multiply(const char* stage, int count, const Tokens<NT>& tokens, float (&acc)[NT][4]) {
#pragma unroll
    for (int n = 0; n < NT; ++n) acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0;
    if (count == PIECE) {
#pragma unroll
        for (int tile = 0; tile < PIECE; ++tile) multiply_tile<NT>(stage, tile, tokens.b, acc);
    } else {
#pragma unroll
        for (int tile = 0; tile < PIECE - 1; ++tile)
            if (tile < count) multiply_tile<NT>(stage, tile, tokens.b, acc);
    }
}

// A place in the list of (segment, strip, piece), in that order, of which a warp takes some.
struct Cursor {
    int unit, segment, strip, piece;  // unit counts (segment, strip)

    METHOD void step(int by, int pieces, int strips) {
        piece += by;
        while (piece >= pieces) {
            piece -= pieces;
            ++unit;
            if (++strip == strips) strip = 0, ++segment;
        }
    }
};

// A warp computes whole strips: units begin + warp, begin + warp + WARPS, ... < end. `row_of(pair)` is the row of `tokens` that
// a pair multiplies; `done(segment, strip, tile of 8 tokens, d)` gets 2^-14 of the products.
template <class RowOf, class Done>
struct Streamer {
    const Strips& weights;
    const Work& work;
    const uint4* tokens;  // fp16 [.., tiles * 64] in fragment order
    char* ring;           // this warp's
    RowOf row_of;
    Done done;

    METHOD void fetch_at(const Cursor& at, int end, int stage) {
        if (at.unit < end)
            fetch(weights, work.segments[at.segment].expert, at.strip, at.piece, shared_address(ring) + stage * STAGE);
        copy_commit();
    }

    // One piece a step: the stage just read is filled for STAGES pieces later.
    METHOD void next(Cursor& at) {
        if (++at.piece < weights.pieces()) return;
        at.piece = 0;
        at.unit += WARPS;
        at.strip += WARPS;
        while (at.strip >= weights.strips) at.strip -= weights.strips, ++at.segment;
    }

    template <int NT> METHOD void strip_of(const Cursor& now, const Segment& segment, Cursor& ahead, int end, int& stage) {
        const int lane = threadIdx.x % 32, pieces = weights.pieces();
        Tokens<NT> t;
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            const int token = n * 8 + lane / 4;
            t.at[n] = nullptr;
            if (token < segment.count) {
                const size_t row = row_of(work.pairs[segment.first + token]);
                t.at[n] = tokens + row * (weights.tiles * 8) + lane % 4;
            }
        }
        float sum[NT][4];
#pragma unroll
        for (int n = 0; n < NT; ++n) sum[n][0] = sum[n][1] = sum[n][2] = sum[n][3] = 0;
        for (int piece = 0; piece < pieces; ++piece) {
            t.load(piece, weights.tiles);
            copy_wait<STAGES - 1>();
            __syncwarp();
            float acc[NT][4];
            multiply<NT>(ring + stage * STAGE, min(PIECE, weights.tiles - piece * PIECE), t, acc);
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) sum[n][i] += acc[n][i];
            __syncwarp();
            fetch_at(ahead, end, stage);
            next(ahead);
            stage = stage == STAGES - 1 ? 0 : stage + 1;
        }
#pragma unroll
        for (int n = 0; n < NT; ++n) done(segment, now.strip, n, sum[n]);
    }

    // `wait` runs between the first fetches and the first use of tokens.
    template <class Wait> METHOD void run(int begin, int end, Wait wait) {
        const int first = begin + threadIdx.x / 32;
        Cursor now{first, first / weights.strips, first % weights.strips, 0}, ahead = now;
        for (int stage = 0; stage < STAGES; ++stage) {
            fetch_at(ahead, end, stage);
            next(ahead);
        }
        wait();
        for (int stage = 0; now.unit < end;) {
            const Segment segment = work.segments[now.segment];
            if (segment.count <= 8) strip_of<1>(now, segment, ahead, end, stage);
            else strip_of<2>(now, segment, ahead, end, stage);
            now.piece = weights.pieces() - 1;
            next(now);
        }
        copy_wait<0>();
    }
};
