// What the two products of the small-batch mixture of experts share: the list of work, the rings through which weights stream,
// and the product of one piece of a strip.
//
// Sums run in one order whatever the batch: a piece of PIECE tiles is summed block after block into fresh accumulators, and
// the pieces of a row are added in order. Which warp does which piece is free, so a row's bits do not depend on its neighbours.
//
// On Hopper one thread has the copy engine bring whole slices of strips; elsewhere each warp copies what it will read.
#pragma once
#include "common/expert_list.cuh"
#include "common/mxfp4.cuh"
#include "common/wgmma.cuh"

#define METHOD __device__ __forceinline__

constexpr int MOST_THREADS = 512;
constexpr int PIECE = 3;                                         // tiles of a piece
constexpr int PIECE_BYTES = PIECE * (TILE_CODES + TILE_SCALES);
constexpr int STAGES = 4;
constexpr int BARRIERS = 512;                                    // bytes of shared memory, at its start
constexpr int GROUP_FEW = 8, GROUP_MANY = 16;                    // most tokens of a segment
#ifdef HOPPER
constexpr int PRODUCERS = 1;                                     // warps that copy and do nothing else
#else
constexpr int PRODUCERS = 0;
#endif

// Where one lane finds its part of a piece in shared memory.
struct Piece {
    const char* codes;   // 16 bytes of each tile
    const char* scales;  // 4 bytes of each tile
};

// The operands of one lane for one piece and NT tiles of 8 tokens: columns 2t, 2t + 1, 2t + 8, ... of each block of 32. Activations
// are stored in that order (fragment order, README.md), so that they are one 16-byte load.
template <int NT> struct Tokens {
    const uint4* at[NT];  // of token (tile * 8 + g), at this lane's chunk of the first block
    uint4 b[NT][PIECE * 2];

    // `row_of(token)` points to a token's row. Lanes beyond the last token repeat it; their products are not used.
    template <class RowOf> METHOD void select(int count, RowOf row_of) {
#pragma unroll
        for (int n = 0; n < NT; ++n)
            at[n] = row_of(min(n * 8 + static_cast<int>(threadIdx.x % 32 / 4), count - 1)) + threadIdx.x % 4;
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
DEVICE void multiply_tile(const Piece& piece, int tile, const uint4 (&b)[NT][PIECE * 2], float (&acc)[NT][4]) {
    const uint4 codes = *reinterpret_cast<const uint4*>(piece.codes + tile * TILE_CODES);
    float scales[4];
    e8m0(*reinterpret_cast<const uint32_t*>(piece.scales + tile * TILE_SCALES), scales);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        uint32_t low[4], high[4];
        fp4_to_fp16(half ? codes.z : codes.x, low);
        fp4_to_fp16(half ? codes.w : codes.y, high);
        const float low_scale = scales[half * 2], high_scale = scales[half * 2 + 1];
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
DEVICE void multiply(const Piece& piece, int count, const Tokens<NT>& tokens, float (&acc)[NT][4]) {
#pragma unroll
    for (int n = 0; n < NT; ++n) acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0;
    if (count == PIECE) {
#pragma unroll
        for (int tile = 0; tile < PIECE; ++tile) multiply_tile<NT>(piece, tile, tokens.b, acc);
    } else {
#pragma unroll
        for (int tile = 0; tile < PIECE - 1; ++tile)
            if (tile < count) multiply_tile<NT>(piece, tile, tokens.b, acc);
    }
}

// The strips that a block works through: of each segment some (gate/up), or of each of its strips all segments (down).
struct Strips {
    const Work& work;
    const char* base;     // strips of expert 0
    size_t expert_bytes;  // from one expert to the next
    int strips;           // of an expert
    int tiles;            // of a strip
    int segments;         // down: segments of a strip

    METHOD const char* at(int segment, int strip) const {
        return base + work.segments[segment].expert * expert_bytes + strip * strip_bytes(tiles);
    }
};

// Few rows: all warps share a ring whose stage is a slice of a strip, one piece for each of `warps` warps. DOWN: segments are
// walked first, and the next strip is gridDim.x further; else strips first.
template <bool DOWN> struct Slices {
    const Strips& from;
    uint32_t barriers, ring;  // shared addresses
    int warps, slices;
    int left;                 // units
    int segment, strip, slice = 0, stage = 0;
    uint32_t parity = 0;

    METHOD int stage_bytes() const { return warps * PIECE_BYTES; }

    // Copies the next slice, or, without a copy engine, this warp's piece of it, to the next stage.
    METHOD void fill() {
        if (left > 0) {
            const char* const strip_at = from.at(segment, strip);
            const uint32_t to = ring + stage * stage_bytes();
#ifdef HOPPER
            const int first = slice * warps * PIECE, count = min(warps * PIECE, from.tiles - first);
            const uint32_t full = barriers + stage * 8;
            barrier_wait(full + STAGES * 8, parity ^ 1);
            barrier_expect(full, count * (TILE_CODES + TILE_SCALES));
            bulk_load(to, strip_at + first * TILE_CODES, count * TILE_CODES, full);
            bulk_load(to + warps * PIECE * TILE_CODES, strip_at + from.tiles * TILE_CODES + first * TILE_SCALES, count * TILE_SCALES, full);
#else
            const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
            const int first = (slice * warps + warp) * PIECE, count = min(PIECE, from.tiles - first);
            for (int tile = 0; tile < count; ++tile)
                copy_async_16(to + (warp * PIECE + tile) * TILE_CODES + lane * 16, strip_at + (first + tile) * TILE_CODES + lane * 16);
            if (lane < count * 2)
                copy_async_16(to + warps * PIECE * TILE_CODES + warp * PIECE * TILE_SCALES + lane * 16,
                              strip_at + from.tiles * TILE_CODES + first * TILE_SCALES + lane * 16);
#endif
            if (++slice == slices) {
                slice = 0, --left;
                if (DOWN) {
                    if (++segment == from.segments) segment = 0, strip += gridDim.x;
                } else if (++strip == from.strips) {
                    strip = 0, ++segment;
                }
            }
        }
#ifndef HOPPER
        copy_commit();
#endif
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

// Before the block's first barrier.
DEVICE void init_barriers(uint32_t barriers, int warps) {
#ifdef HOPPER
    if (threadIdx.x != 0) return;
    for (int stage = 0; stage < STAGES; ++stage) {
        barrier_init(barriers + stage * 8, 1);
        barrier_init(barriers + (STAGES + stage) * 8, warps * 32);
    }
    barrier_init_fence();
#endif
}

// Starts the copies of `items` slices. The warp that copies does them all; false to it: it has no other work.
template <bool DOWN> DEVICE bool feed(Slices<DOWN>& slices, int items) {
#ifdef HOPPER
    if (static_cast<int>(threadIdx.x / 32) < slices.warps) return true;
    if (threadIdx.x % 32 == 0)
#pragma unroll 1
        for (int i = 0; i < items; ++i) slices.fill();
    return false;
#else
#pragma unroll 1
    for (int stage = 0; stage < STAGES; ++stage) slices.fill();
    return true;
#endif
}

// No copy outlives the block.
DEVICE void drain() {
#ifndef HOPPER
    copy_wait<0>();
#endif
}

// A barrier of the warps that compute.
DEVICE void sync_computing(int warps) { asm volatile("bar.sync 1, %0;" ::"r"(warps * 32) : "memory"); }

// What a computing warp holds of the above. Partial sums of up to 8 tokens meet in shared memory:
// sums[unit][piece][token][16 rows], 2^-14 of the products. ONE: a strip is one slice.
template <bool DOWN, bool ONE, class RowOf> struct Sharer {
    const Strips& from;
    Slices<DOWN>& fill;  // used without a copy engine
    const char* shared_ring;
    uint32_t barriers;
    int warps, slices;
    RowOf row_of;        // of a pair
    int segment, strip;
    int stage = 0;
    uint32_t parity = 0;

    METHOD void multiply_slice(const Tokens<1>& held, int count, int tokens, float* out) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, token = lane % 4 * 2;
#ifdef HOPPER
        barrier_wait(barriers + stage * 8, parity);
#else
        copy_wait<STAGES - 1>();
        __syncwarp();
#endif
        if (count > 0) {
            const char* const at = shared_ring + stage * (warps * PIECE_BYTES);
            const Piece piece{at + warp * (PIECE * TILE_CODES) + lane * 16,
                              at + warps * (PIECE * TILE_CODES) + warp * (PIECE * TILE_SCALES) + lane / 4 * 4};
            float acc[1][4];
            multiply<1>(piece, count, held, acc);
            if (token < tokens) out[0] = acc[0][0], out[8] = acc[0][2];
            if (token + 1 < tokens) out[16] = acc[0][1], out[24] = acc[0][3];
        }
#ifdef HOPPER
        barrier_arrive(barriers + (STAGES + stage) * 8);  // each lane for what it read
#else
        __syncwarp();
        fill.fill();
#endif
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }

    // The next `units` units; `most` is the room for tokens in `sums`.
    METHOD void multiply_units(int units, float* sums, int most) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, tiles = from.tiles, pieces = (tiles + PIECE - 1) / PIECE;
        Tokens<1> held;
        float* to = sums + (warp * most + lane % 4 * 2) * 16 + lane / 4;
        while (units > 0) {
            // What is left of the segment.
            const int run = DOWN ? 1 : min(units, from.strips - strip);
            const Segment now = from.work.segments[segment];
            held.select(now.count, [&](int token) { return row_of(from.work.pairs[now.first + token]); });
            const int count = min(PIECE, tiles - warp * PIECE);
            if (ONE && count > 0) held.load(warp, count);
#pragma unroll 1
            for (int unit = 0; unit < run; ++unit, to += pieces * most * 16) {
                if (ONE) {
                    multiply_slice(held, count, now.count, to);
                } else {
#pragma unroll 1
                    for (int slice = 0; slice < slices; ++slice) {
                        const int piece = slice * warps + warp, tiles_left = min(PIECE, tiles - piece * PIECE);
                        if (tiles_left > 0) held.load(piece, tiles_left);
                        multiply_slice(held, tiles_left, now.count, to + slice * warps * most * 16);
                    }
                }
            }
            units -= run;
            if (DOWN) {
                if (++segment == from.segments) segment = 0, strip += gridDim.x;
            } else {
                strip += run;
                if (strip == from.strips) strip = 0, ++segment;
            }
        }
    }
};

// The units of block `block`: begin, and the first of the next block. At most 2^31 / blocks units.
DEVICE int share(int units, int block) {
    const int blocks = gridDim.x, each = units / blocks;
    return each * block + min(block, units - each * blocks);
}

// The sum of `pieces` partial sums, in order.
DEVICE float sum_pieces(const float* at, int pieces, int step) {
    float sum = 0;
#pragma unroll 5
    for (int piece = 0; piece < pieces; ++piece, at += step) sum += at[0];
    return sum;
}

// The most tokens of a segment among those of units begin .. end.
DEVICE int most_tokens(const Work& work, int begin, int end, int strips) {
    int most = 1;
#pragma unroll 1
    for (int segment = begin / strips; segment <= (end - 1) / strips; ++segment)
        most = max(most, static_cast<int>(work.segments[segment].count));
    return most;
}

// Many rows: of each warp, its stages; after all of these one for the tokens. Before the block's first barrier.
DEVICE void init_own_barriers(uint32_t barriers, int warps) {
#ifdef HOPPER
    if (threadIdx.x != 0) return;
#pragma unroll 1
    for (int i = 0; i < warps * STAGES; ++i) barrier_init(barriers + i * 8, 1);
    barrier_init(barriers + BARRIERS, 1);
    barrier_init_fence();
#endif
}

// Many rows: a warp computes whole strips of a list of units, one for each strip of each segment, through its own ring.
// STAGED: tokens come to shared memory first, of as many segments as have GROUP_MANY tokens or fewer. `done(segment, strip, tile of
// 8 tokens, d)` gets 2^-14 of the products.
template <bool STAGED, class RowOf, class Done> struct Streamer {
    const Strips& from;
    uint32_t barriers;      // of this warp; of the staged tokens: staged_barrier
    uint32_t staged_barrier;
    char* ring;             // this warp's
    uint4* staged;          // GROUP_MANY rows of row_chunks() chunks
    int warps;
    RowOf row_of;           // of a pair
    Done done;
    // The fetch that is next, and the stage it fills, which is the one that is read next.
    int end = 0, unit = 0, segment = 0, strip = 0, piece = 0, stage = 0;
    uint32_t parity = 0;
    const char *codes = nullptr, *scales = nullptr;

    // 64 bytes more than a row: two rows' chunks of one block are in different banks.
    METHOD int row_chunks() const { return from.tiles * 8 + 4; }

    METHOD void locate() {
        if (unit >= end) return;
        codes = from.at(segment, strip);
        scales = codes + from.tiles * TILE_CODES;
    }

    METHOD void fetch() {
        if (unit < end) {
            const uint32_t to = shared_address(ring) + stage * PIECE_BYTES;
            const int count = min(PIECE, from.tiles - piece * PIECE), lane = threadIdx.x % 32;
#ifdef HOPPER
            if (lane == 0) {
                barrier_expect(barriers + stage * 8, count * (TILE_CODES + TILE_SCALES));
                bulk_load(to, codes, count * TILE_CODES, barriers + stage * 8);
                bulk_load(to + PIECE * TILE_CODES, scales, count * TILE_SCALES, barriers + stage * 8);
            }
#else
            for (int tile = 0; tile < count; ++tile) copy_async_16(to + tile * TILE_CODES + lane * 16, codes + tile * TILE_CODES + lane * 16);
            if (lane < count * 2) copy_async_16(to + PIECE * TILE_CODES + lane * 16, scales + lane * 16);
#endif
            codes += PIECE * TILE_CODES, scales += PIECE * TILE_SCALES;
            if (++piece * PIECE >= from.tiles) {
                piece = 0;
                unit += warps, strip += warps;
                while (strip >= from.strips) strip -= from.strips, ++segment;
                locate();
            }
        }
#ifndef HOPPER
        copy_commit();
#endif
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }

    // Starts the first copies. Units begin .. end are the block's.
    METHOD void start(int begin, int last) {
        end = last, unit = begin + threadIdx.x / 32;
        segment = unit / from.strips, strip = unit % from.strips;
        locate();
#pragma unroll 1
        for (int i = 0; i < STAGES; ++i) fetch();
        parity = 0;
    }

    template <int NT> METHOD void multiply_strip(const Segment& now, int at, int first) {
        const int tiles = from.tiles, lane = threadIdx.x % 32;
        Tokens<NT> tokens;
        if (STAGED) tokens.select(now.count, [&](int token) { return staged + (now.first - first + token) * row_chunks(); });
        else tokens.select(now.count, [&](int token) { return row_of(from.work.pairs[now.first + token]); });
        float sum[NT][4];
#pragma unroll
        for (int n = 0; n < NT; ++n) sum[n][0] = sum[n][1] = sum[n][2] = sum[n][3] = 0;
#pragma unroll 1
        for (int piece = 0; piece * PIECE < tiles; ++piece) {
            const int count = min(PIECE, tiles - piece * PIECE);
            tokens.load(piece, count);
#ifdef HOPPER
            barrier_wait(barriers + stage * 8, parity);
#else
            copy_wait<STAGES - 1>();
            __syncwarp();
#endif
            const char* const in = ring + stage * PIECE_BYTES;
            float acc[NT][4];
            multiply<NT>({in + lane * 16, in + PIECE * TILE_CODES + lane / 4 * 4}, count, tokens, acc);
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) sum[n][i] += acc[n][i];
            __syncwarp();
            fetch();
        }
#pragma unroll
        for (int n = 0; n < NT; ++n) done(now, at, n, sum[n]);
    }

    // Brings pairs first .. last to shared memory. All threads.
    METHOD void stage_tokens(int first, int last, uint32_t turn) {
        const int chunks = from.tiles * 8;
        __syncthreads();
#ifdef HOPPER
        if (static_cast<int>(threadIdx.x) < last - first) {
            proxy_fence();
            if (threadIdx.x == 0) barrier_expect(staged_barrier, (last - first) * chunks * 16);
            __syncwarp(__activemask());
            bulk_load(shared_address(staged + threadIdx.x * row_chunks()), row_of(from.work.pairs[first + threadIdx.x]), chunks * 16,
                      staged_barrier);
        }
        barrier_wait(staged_barrier, turn);
#else
        for (int pair = first; pair < last; ++pair) {
            const uint4* const row = row_of(from.work.pairs[pair]);
            for (int i = threadIdx.x; i < chunks; i += blockDim.x) staged[(pair - first) * row_chunks() + i] = row[i];
        }
        __syncthreads();
#endif
    }

    METHOD void run(int begin, int last) {
        int mine = begin + threadIdx.x / 32;
        uint32_t turn = 0;
        for (int next = begin / from.strips; next * from.strips < last;) {
            // The segments of a turn.
            const int first = from.work.segments[next].first;
            int top = first + from.work.segments[next].count;
            for (++next; next * from.strips < last; ++next) {
                const Segment more = from.work.segments[next];
                if (STAGED && more.first + more.count - first > GROUP_MANY) break;
                top = more.first + more.count;
            }
            if (STAGED) stage_tokens(first, top, turn), turn ^= 1;
            for (; mine < min(last, next * from.strips); mine += warps) {
                const int at = mine / from.strips;
                const Segment now = from.work.segments[at];
                if (now.count <= 8) multiply_strip<1>(now, mine - at * from.strips, first);
                else multiply_strip<2>(now, mine - at * from.strips, first);
            }
        }
        drain();
    }
};
