// What the two kernels of sampling share: the table of a step, partial results of a row, weights, the order of candidates.
#pragma once
#include "common/common.cuh"

constexpr int PART = 1024;      // columns of a part, which one warp scans
constexpr int MAX_PARTS = 511;  // sums of 26-bit weights over all columns must fit in two 32-bit words of 13 bits each

// Line 0 of a table.
struct Header {
    const uint32_t* lists;  // adjustments of all rows
    uint32_t live;          // rows to sample
    uint32_t spare[13];
};

enum : uint32_t { DRAWN = 1, LOGPROBS = 2, ADJUSTED = 4, MASKED = 8 };

// Line r + 1 of a table: row r.
struct Line {
    double uniform;  // the draw, in [0, 1)
    double top_p;    // 1 is off
    float inverse, inverse_rest;  // 1 / temperature is their sum
    float min_p;
    uint32_t top_k;  // 0 is off
    float repetition, frequency, presence;
    uint32_t flags;
    uint32_t lists;         // where its lists start: `parts + 1` offsets, then the entries, part by part
    uint32_t alternatives;  // log-probabilities wanted besides the picked token's
    uint32_t mask;          // where its mask starts: a bit for each column, 32 words a part; 1 may be picked
    uint32_t spare;
};

// One logit to change.
struct Entry {
    uint32_t id;
    float bias;
    uint32_t marks;  // BANNED, SEEN, and how often the output has it
};
constexpr uint32_t BANNED = 1u << 31, SEEN = 1u << 30, COUNT = SEEN - 1;

enum : uint32_t { TAINTED = 1, FINITE = 2 };

// What a warp finds in its part of a row.
struct Partial {
    float best;      // greatest adjusted logit; its first id
    uint32_t id;
    uint32_t flags;  // TAINTED: a NaN or +inf. FINITE: a logit above -inf before bans
    uint32_t spare;
    double mass;     // sum of weights relative to `best`, at the row's temperature
    double plain;    // the same at temperature 1
};

static_assert(sizeof(Header) == 64 && sizeof(Line) == 64 && sizeof(Entry) == 12 && sizeof(Partial) == 32);

DEVICE float minus_infinity() { return __uint_as_float(0xff800000); }

// (z - best) / temperature, rounded once more than the exact quotient. Never NaN for z <= best, best finite.
DEVICE float exponent(float z, float best, float inverse, float inverse_rest) {
    const float x = fmaxf(z - best, -1e6f);  // nothing below weighs anything, and infinities must not meet
    return fmaf(x, inverse, x * inverse_rest);
}
DEVICE float weight(float z, float best, float inverse, float inverse_rest) {
    return expf(exponent(z, best, inverse, inverse_rest));
}

// Integers in the order of floats; both zeros are one.
DEVICE uint32_t ordered(float z) {
    const uint32_t bits = __float_as_uint(z + 0.0f);
    return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}
DEVICE float unordered(uint32_t key) {
    return __uint_as_float(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu));
}
// Greater is earlier: the greater logit, then the lower id. 0 is no candidate.
DEVICE uint64_t candidate(float z, uint32_t id) { return static_cast<uint64_t>(ordered(z)) << 32 | static_cast<uint32_t>(~id); }
DEVICE uint32_t candidate_id(uint64_t c) { return ~static_cast<uint32_t>(c); }
DEVICE uint32_t candidate_key(uint64_t c) { return static_cast<uint32_t>(c >> 32); }
DEVICE float candidate_logit(uint64_t c) { return unordered(candidate_key(c)); }

// Column, within its part, of value `i` of a lane.
DEVICE constexpr int part_column(int i, int lane) { return (i >> 2) * 128 + lane * 4 + (i & 3); }

// Four logits; -inf beyond the vocabulary. Columns beyond it may hold anything, but must exist up to a multiple of four.
DEVICE float4 load_four(const float* row, int col, int vocab) {
    float4 v = make_float4(minus_infinity(), minus_infinity(), minus_infinity(), minus_infinity());
    if (col < vocab) v = *reinterpret_cast<const float4*>(row + col);
    if (col + 1 >= vocab) v.y = minus_infinity();
    if (col + 2 >= vocab) v.z = minus_infinity();
    if (col + 3 >= vocab) v.w = minus_infinity();
    return v;
}

// A part in the registers of a warp.
DEVICE void load_part(float (&v)[32], const float* row, int part, int vocab) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const float4 four = load_four(row, part * PART + part_column(j * 4, threadIdx.x & 31), vocab);
        v[j * 4] = four.x, v[j * 4 + 1] = four.y, v[j * 4 + 2] = four.z, v[j * 4 + 3] = four.w;
    }
}

DEVICE double warp_sum(double v) {
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) v += __shfl_xor_sync(~0u, v, step);
    return v;
}
DEVICE uint64_t warp_max(uint64_t v) {
    const uint32_t high = __reduce_max_sync(~0u, static_cast<uint32_t>(v >> 32));
    const uint32_t low = __reduce_max_sync(~0u, static_cast<uint32_t>(v >> 32) == high ? static_cast<uint32_t>(v) : 0u);
    return static_cast<uint64_t>(high) << 32 | low;
}
