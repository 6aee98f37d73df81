// Picking from a row of logits by rank or by mass, one block a row, without sorting the vocabulary: collect what lies above a
// threshold and sort that, or narrow the threshold down by histograms first. Every sum is made in one fixed order or of integers.
#pragma once
#include "common/sample.cuh"

// Big and rare: called, so that the common path keeps its registers.
#define CALLED static __device__ __noinline__

constexpr int THREADS = 512, WARPS = THREADS / 32;
constexpr int CAPACITY = 4096;  // candidates that are sorted at once
constexpr int EACH = CAPACITY / THREADS;
constexpr int BINS = 1024;
constexpr int BINS_EACH = BINS / THREADS;
constexpr float DEEPEST = 104.0f;  // e^-104 is 0 in float32
constexpr float BIN_RATE = (BINS - 1) / DEEPEST;
constexpr uint32_t NONE = 0xffffffffu;

// A histogram of counts and of masses relative to each bin's greatest: 26 bits, the sum of their high and of their low halves.
struct Histogram {
    uint32_t count[BINS], high[BINS], low[BINS];
};

struct Shared {
    double mass[THREADS];      // of each part
    float best[THREADS];       // greatest logit of each part
    Histogram coarse;          // by exponent
    union {
        Histogram fine;        // by key, of a range
        uint64_t candidates[CAPACITY];
    };
    double scratch[2][WARPS];
    uint64_t keys[WARPS];
    uint32_t words[WARPS];
    uint32_t collected;
    uint32_t answer;
    double answer_mass, answer_count;
};

// A row at work. `best` is its greatest logit.
struct Row {
    const float* logits;
    Shared& s;
    int vocab, parts;
    float best, inverse, inverse_rest;

    __device__ __forceinline__ float exponent_of(float z) const { return exponent(z, best, inverse, inverse_rest); }
    __device__ __forceinline__ float weight_of(float z) const { return weight(z, best, inverse, inverse_rest); }
};

DEVICE int lane_of() { return threadIdx.x & 31; }
DEVICE int warp_of() { return threadIdx.x >> 5; }

// Over the block, to every thread. Each begins with a barrier, so that scratch may be used again at once.
DEVICE double block_sum(double v, Shared& s) {
    v = warp_sum(v);
    __syncthreads();
    if (lane_of() == 0) s.scratch[0][warp_of()] = v;
    __syncthreads();
    double total = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) total += s.scratch[0][warp];
    return total;
}
DEVICE uint64_t block_max(uint64_t v, Shared& s) {
    v = warp_max(v);
    __syncthreads();
    if (lane_of() == 0) s.keys[warp_of()] = v;
    __syncthreads();
    uint64_t most = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) most = most > s.keys[warp] ? most : s.keys[warp];
    return most;
}
DEVICE uint32_t block_min(uint32_t v, Shared& s) {
    v = __reduce_min_sync(~0u, v);
    __syncthreads();
    if (lane_of() == 0) s.words[warp_of()] = v;
    __syncthreads();
    uint32_t least = NONE;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) least = min(least, s.words[warp]);
    return least;
}
DEVICE double warp_through(double v) {  // inclusive prefix sum
#pragma unroll
    for (int step = 1; step < 32; step <<= 1) {
        const double lower = __shfl_up_sync(~0u, v, step);
        if (lane_of() >= step) v += lower;
    }
    return v;
}
// Sum of the threads before this one; `total` of all.
DEVICE double block_before(double v, double& total, Shared& s) {
    const double through = warp_through(v);
    const double lower = __shfl_up_sync(~0u, through, 1);
    __syncthreads();
    if (lane_of() == 31) s.scratch[0][warp_of()] = through;
    __syncthreads();
    double before = 0;
    total = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) {
        if (warp == warp_of()) before = total;
        total += s.scratch[0][warp];
    }
    return before + (lane_of() ? lower : 0.0);
}

// Calls f(logit, id) for everything in the parts whose greatest key is at least `least`, in one fixed order a thread.
template <class F> DEVICE void for_each(const Row& row, uint32_t least, F f) {
    for (int part = warp_of(); part < row.parts; part += WARPS) {
        if (ordered(row.s.best[part]) < least) continue;
        float v[32];
        load_part(v, row.logits, part, row.vocab);
#pragma unroll
        for (int i = 0; i < 32; ++i) f(v[i], static_cast<uint32_t>(part * PART + part_column(i, lane_of())));
    }
}

// The first id, by id, at which the running sum of f(logit, part) exceeds `target`; s.mass holds the sum of each part. The last
// id with a weight where rounding leaves a sliver; NONE where nothing has a weight.
template <class F> DEVICE uint32_t pick_by_id(const Row& row, double target, F f) {
    Shared& s = row.s;
    double total;
    const double own = threadIdx.x < row.parts ? s.mass[threadIdx.x] : 0.0;
    const double before = block_before(own, total, s);
    uint32_t part = block_min(own > 0 && before + own > target ? threadIdx.x : NONE, s);
    if (part == NONE) {
        const uint32_t last = block_min(own > 0 ? THREADS - 1 - threadIdx.x : NONE, s);
        if (last == NONE) return NONE;
        part = THREADS - 1 - last;
    }
    if (threadIdx.x == part) s.answer_mass = target - before;
    __syncthreads();
    if (warp_of() == 0) {
        float v[32];
        load_part(v, row.logits, part, row.vocab);
        double left = s.answer_mass;
        uint32_t found = NONE, last = 0;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            double w[4];
            double sum = 0;
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                w[c] = f(v[j * 4 + c], part);
                if (w[c] > 0) last = part_column(j * 4 + c, lane_of()) + 1;
                sum += w[c];
            }
            const double through = warp_through(sum);
            double at = through - sum;
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                at += w[c];
                if (found == NONE && w[c] > 0 && at > left) found = part_column(j * 4 + c, lane_of());
            }
            left -= __shfl_sync(~0u, through, 31);
        }
        found = __reduce_min_sync(~0u, found);
        last = __reduce_max_sync(~0u, last);
        if (lane_of() == 0) s.answer = part * PART + (found != NONE ? found : last - 1);
    }
    __syncthreads();
    return s.answer;
}

// Collects the candidates with keys in [low, high]; all are counted, CAPACITY are stored.
CALLED uint32_t collect(const Row& row, uint32_t low, uint32_t high) {
    Shared& s = row.s;
    __syncthreads();
    if (threadIdx.x == 0) s.collected = 0;
    __syncthreads();
    for (int part = warp_of(); part < row.parts; part += WARPS) {
        if (ordered(s.best[part]) < low) continue;
        float v[32];
        load_part(v, row.logits, part, row.vocab);
        uint32_t count = 0;
#pragma unroll
        for (int i = 0; i < 32; ++i) count += ordered(v[i]) >= low && ordered(v[i]) <= high;
        uint32_t through = count;
#pragma unroll
        for (int step = 1; step < 32; step <<= 1) {
            const uint32_t lower = __shfl_up_sync(~0u, through, step);
            if (lane_of() >= step) through += lower;
        }
        uint32_t at = 0;
        // The order of arrival is lost in the sort: candidates are all different.
        if (lane_of() == 31) at = atomicAdd(&s.collected, through);
        at = __shfl_sync(~0u, at, 31) + through - count;
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            if (ordered(v[i]) >= low && ordered(v[i]) <= high) {
                if (at < CAPACITY) s.candidates[at] = candidate(v[i], part * PART + part_column(i, lane_of()));
                ++at;
            }
        }
    }
    __syncthreads();
    return s.collected;
}

// Best first. `count` <= CAPACITY.
CALLED void sort_candidates(Shared& s, uint32_t count) {
    uint32_t size = 2;
    while (size < count) size *= 2;
    for (uint32_t at = count + threadIdx.x; at < size; at += THREADS) s.candidates[at] = 0;
    for (uint32_t run = 2; run <= size; run *= 2) {
        for (uint32_t step = run / 2; step > 0; step /= 2) {
            __syncthreads();
            for (uint32_t pair = threadIdx.x; pair < size / 2; pair += THREADS) {
                const uint32_t a = (pair / step) * 2 * step + pair % step, b = a + step;
                const uint64_t x = s.candidates[a], y = s.candidates[b];
                if ((x < y) == ((a & run) == 0)) {
                    s.candidates[a] = y;
                    s.candidates[b] = x;
                }
            }
        }
    }
    __syncthreads();
}

// The sorted candidates in the registers of the block, EACH neighbours a thread, with the mass through each.
struct Sorted {
    float weights[EACH];
    double through[EACH];
    double total;

    // `count` candidates have a weight.
    __device__ __forceinline__ void load(const Row& row, uint32_t count) {
        double sum = 0;
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const uint32_t at = threadIdx.x * EACH + i;
            weights[i] = at < count ? row.weight_of(candidate_logit(row.s.candidates[at])) : 0.0f;
            sum += static_cast<double>(weights[i]);
            through[i] = sum;
        }
        const double before = block_before(sum, total, row.s);
#pragma unroll
        for (int i = 0; i < EACH; ++i) through[i] += before;
    }
    // The first of `count` for which test(weight, mass through it) holds, else `count`.
    template <class F> __device__ __forceinline__ uint32_t first(uint32_t count, Shared& s, F test) const {
        uint32_t at = count;
#pragma unroll
        for (int i = EACH - 1; i >= 0; --i) {
            const uint32_t index = threadIdx.x * EACH + i;
            if (index < count && test(weights[i], through[i])) at = index;
        }
        return block_min(at, s);
    }
    // Mass through candidate `at`.
    __device__ __forceinline__ double mass(uint32_t at, Shared& s) const {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            if (threadIdx.x * EACH + i == at) s.answer_mass = through[i];
        }
        __syncthreads();
        return s.answer_mass;
    }
};
