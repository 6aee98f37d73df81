// What the two products of the small-batch mixture of experts share: the list of work, the ring through which a warp streams
// weights, and the product of one piece of a strip.
//
// Sums run in one order whatever the batch: a piece of PIECE tiles is summed block after block into fresh accumulators, and
// the pieces of a row are added in order. Which warp does which piece is free, so a row's bits do not depend on its neighbours.
#pragma once
#include "common/mxfp4.cuh"

#define METHOD __device__ __forceinline__

constexpr int MOST_THREADS = 512;
constexpr int PIECE = 3;                                   // tiles of a piece
constexpr int STAGE = PIECE * (TILE_CODES + TILE_SCALES);  // bytes of a ring's stage: codes, then scales
constexpr int STAGES = 4;
constexpr int RING = STAGES * STAGE;                       // bytes of a warp's ring

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

DEVICE Work work_at(char* shared, int pairs) {
    Work work;
    work.segments = reinterpret_cast<Segment*>(shared);
    work.pairs = reinterpret_cast<uint16_t*>(shared + pairs * 8);
    work.chosen = reinterpret_cast<uint32_t*>(shared + pairs * 8 + (pairs * 2 + 15) / 16 * 16);
    work.totals = work.chosen + (pairs + 15) / 16 * 4;
    return work;
}

// Lists the active experts in order and their pairs in order, `group` tokens a segment. Returns the number of segments. All
// threads take part, at least 128; `capacity` is what `work` was made for, `live` the pairs there are. At most 128 experts.
DEVICE int list_work(const Work& work, const int* choice, int live, int capacity, int experts, int group) {
    const int thread = threadIdx.x, lane = thread % 32, words = (capacity + 3) / 4;
    uint8_t* bytes = reinterpret_cast<uint8_t*>(work.chosen);
    for (int i = thread; i < words * 4; i += blockDim.x) {
        // Read whether live or not, so that both loads are under way at once. An index that no router writes must not lead
        // out of bounds.
        const unsigned expert = min(static_cast<unsigned>(choice[min(i, capacity - 1)]), static_cast<unsigned>(experts - 1));
        bytes[i] = i < live ? static_cast<uint8_t>(expert) : 0xff;
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

// One warp's stream of weights, piece after piece through its ring. The list of work is units of one strip each, segment after
// segment; a warp takes every `unit_step`-th from `unit` on and of each the pieces from `first` on, every `piece_step`-th.
// ONE: it has one piece of each unit at most, so that little changes from one copy to the next.
template <bool ONE> struct Reader {
    const Work& work;
    const char* base;     // strips of expert 0
    size_t expert_bytes;  // from one expert to the next
    int strips;           // units of a segment
    int tiles;            // of a strip
    int pieces;
    int unit_step, first, piece_step;
    uint32_t ring;        // shared address of this lane's first 16 bytes
    int end;              // units
    int unit, segment, strip, piece;
    const char* codes;    // this lane's first 16 bytes of the piece at hand: its codes,
    const char* scales;   // its scales
    int stage;            // offset in the ring of the stage that is read, then filled, next

    METHOD void locate() {
        if (unit >= end) return;
        const char* const from =
            base + work.segments[segment].expert * expert_bytes + strip * strip_bytes(tiles) + threadIdx.x % 32 * 16;
        codes = from + first * (PIECE * TILE_CODES);
        scales = from + tiles * TILE_CODES + first * (PIECE * TILE_SCALES);
    }

    // Places it at a unit and starts the first copies.
    METHOD void start(int begin) {
        unit = first < pieces ? begin : end;
        segment = begin / strips, strip = begin % strips, piece = first, stage = 0;
        locate();
#pragma unroll 1
        for (int i = 0; i < STAGES; ++i) fetch();
    }

    // Fills the stage that was read last, for STAGES pieces later.
    METHOD void fetch() {
        if (unit < end) {
            const uint32_t to = ring + stage;
            const int count = tiles - (ONE ? first : piece) * PIECE;
            copy_async_16(to, codes);
            if (count > 1) copy_async_16(to + TILE_CODES, codes + TILE_CODES);
            if (count > 2) copy_async_16(to + 2 * TILE_CODES, codes + 2 * TILE_CODES);
            if (static_cast<int>(threadIdx.x % 32) < 2 * min(count, PIECE)) copy_async_16(to + PIECE * TILE_CODES, scales);
            if (ONE) {
                ++unit;
                codes += strip_bytes(tiles), scales += strip_bytes(tiles);
                if (++strip == strips) strip = 0, ++segment, locate();
            } else {
                piece += piece_step;
                codes += piece_step * (PIECE * TILE_CODES), scales += piece_step * (PIECE * TILE_SCALES);
                if (piece >= pieces) {
                    piece = first;
                    unit += unit_step;
                    strip += unit_step;
                    while (strip >= strips) strip -= strips, ++segment;
                    locate();
                }
            }
        }
        copy_commit();
        stage = stage == (STAGES - 1) * STAGE ? 0 : stage + STAGE;
    }
};

// The operands of one lane for one piece and NT tiles of 8 tokens: columns 2t, 2t + 1, 2t + 8, ... of each block of 32. Activations
// are stored in that order (fragment order, README.md), so that they are one 16-byte load.
template <int NT> struct Tokens {
    const uint4* at[NT];  // of token (tile * 8 + g), at this lane's chunk of the first block
    uint4 b[NT][PIECE * 2];

    // `row_of(pair)` is the row that a pair multiplies. Lanes beyond the last token repeat it; their products are not used.
    template <class RowOf> METHOD void select(const uint4* rows, int tiles, const Work& work, const Segment& segment, RowOf row_of) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            const int token = min(n * 8 + lane / 4, segment.count - 1);
            const size_t row = row_of(work.pairs[segment.first + token]);
            at[n] = rows + row * (tiles * 8) + lane % 4;
        }
    }

    METHOD void load(int piece, int count) {
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            const uint4* const from = at[n] + piece * (PIECE * 8);
#pragma unroll
            for (int block = 0; block < PIECE * 2; ++block)
                if (block < 2 || block / 2 < count) b[n][block] = from[block * 4];
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

// A warp has the same pieces of every strip, so that it keeps its part of the tokens; partial sums of up to 8 tokens meet in
// shared memory: sums[unit][piece][token][16 rows], 2^-14 of the products.
template <bool ONE, class RowOf> struct Sharer {
    Reader<ONE> reader;
    const uint4* rows;  // fp16 [.., tiles * 64] in fragment order
    const char* ring;   // this warp's
    RowOf row_of;
    int segment, strip;

    METHOD void multiply_piece(const Tokens<1>& held, int count, int tokens, float* out) {
        const int token = threadIdx.x % 4 * 2;
        copy_wait<STAGES - 1>();
        __syncwarp();
        float acc[1][4];
        multiply<1>(ring + reader.stage, count, held, acc);
        if (token < tokens) out[0] = acc[0][0], out[8] = acc[0][2];
        if (token + 1 < tokens) out[16] = acc[0][1], out[24] = acc[0][3];
        __syncwarp();
        reader.fetch();
    }

    // The next `units` units; `most` is the room for tokens in `sums`.
    METHOD void multiply_units(int units, float* sums, int most) {
        const int pieces = reader.pieces, tiles = reader.tiles, first = reader.first;
        if (first >= pieces) return;
        Tokens<1> held;
        float* to = sums + (first * most + threadIdx.x % 4 * 2) * 16 + threadIdx.x % 32 / 4;
        while (units > 0) {
            // What is left of the segment.
            const int run = min(units, reader.strips - strip);
            const Segment now = reader.work.segments[segment];
            held.select(rows, tiles, reader.work, now, row_of);
            const int count = min(PIECE, tiles - first * PIECE);
            if (ONE) held.load(first, count);
#pragma unroll 1
            for (int unit = 0; unit < run; ++unit, to += pieces * most * 16) {
                if (ONE) {
                    multiply_piece(held, count, now.count, to);
                } else {
#pragma unroll 1
                    for (int piece = first; piece < pieces; piece += reader.piece_step) {
                        held.load(piece, min(PIECE, tiles - piece * PIECE));
                        multiply_piece(held, min(PIECE, tiles - piece * PIECE), now.count, to + (piece - first) * most * 16);
                    }
                }
            }
            units -= run;
            strip += run;
            if (strip == reader.strips) strip = 0, ++segment;
        }
    }
};

// The most tokens of a segment among those of units begin .. end.
DEVICE int most_tokens(const Work& work, int begin, int end, int strips) {
    int most = 1;
    for (int segment = begin / strips; segment <= (end - 1) / strips; ++segment)
        most = max(most, static_cast<int>(work.segments[segment].count));
    return most;
}

// A warp computes whole strips, for up to 16 tokens of an expert. `done(segment, strip, tile of 8 tokens, d)` gets 2^-14 of the
// products.
template <class RowOf, class Done> struct Streamer {
    Reader<false> reader;
    const uint4* rows;  // fp16 [.., tiles * 64] in fragment order
    const char* ring;   // this warp's
    RowOf row_of;
    Done done;

    template <int NT> METHOD void strip_of(const Segment& segment, int strip) {
        const int pieces = reader.pieces, tiles = reader.tiles;
        Tokens<NT> tokens;
        tokens.select(rows, tiles, reader.work, segment, row_of);
        float sum[NT][4];
#pragma unroll
        for (int n = 0; n < NT; ++n) sum[n][0] = sum[n][1] = sum[n][2] = sum[n][3] = 0;
#pragma unroll 1
        for (int piece = 0; piece < pieces; ++piece) {
            const int count = min(PIECE, tiles - piece * PIECE);
            tokens.load(piece, count);
            copy_wait<STAGES - 1>();
            __syncwarp();
            float acc[NT][4];
            multiply<NT>(ring + reader.stage, count, tokens, acc);
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) sum[n][i] += acc[n][i];
            __syncwarp();
            reader.fetch();
        }
#pragma unroll
        for (int n = 0; n < NT; ++n) done(segment, strip, n, sum[n]);
    }

    METHOD void run(int begin, int end) {
        int segment = begin / reader.strips, strip = begin % reader.strips;
        for (int unit = begin; unit < end; unit += reader.unit_step, strip += reader.unit_step) {
            while (strip >= reader.strips) strip -= reader.strips, ++segment;
            const Segment now = reader.work.segments[segment];
            if (now.count <= 8) strip_of<1>(now, strip);
            else strip_of<2>(now, strip);
        }
        copy_wait<0>();
    }
};
