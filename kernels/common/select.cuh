// Picking from a row of logits by rank or by mass, one block a row, without sorting the vocabulary: collect what lies above a
// threshold and sort that. Every sum is made in one fixed order or of integers. Loops are kept short and rolled: this code runs once a step,
// so what it waits for is mostly its own instructions.
#pragma once
#include "common/sample.cuh"

// Called, so that there is one copy of it.
#define CALLED static __device__ __noinline__

constexpr int THREADS = 512, WARPS = THREADS / 32;
constexpr int CAPACITY = 4096;  // candidates that are sorted at once
constexpr int BINS = 1024;
constexpr uint32_t NONE = 0xffffffffu;

// A histogram of counts and of masses relative to each bin's greatest: 26 bits, the sum of their high and of their low halves.
struct Histogram {
    uint32_t count[BINS], high[BINS], low[BINS];
};

// The block's row and what it knows of it.
struct Shared {
    Line line;
    const float* logits;
    int vocab, parts;
    float best;                // its greatest logit
    alignas(16) float greatest[THREADS];  // of each part; -inf beyond the last
    double mass[THREADS];      // of each part
    uint32_t list[THREADS];    // parts to read
    Histogram coarse;          // by exponent
    union {
        Histogram fine;        // by key, of a range
        uint64_t candidates[CAPACITY];
    };
    double sums[WARPS];
    uint64_t keys[WARPS];
    uint32_t words[WARPS];
    uint32_t collected;
    double answer, answer_rank;
};

extern __shared__ __align__(16) unsigned char shared_memory[];
DEVICE Shared& shared() { return *reinterpret_cast<Shared*>(shared_memory); }

DEVICE int lane_of() { return threadIdx.x & 31; }
DEVICE int warp_of() { return threadIdx.x >> 5; }

DEVICE float exponent_of(float z) {
    const Shared& s = shared();
    return exponent(z, s.best, s.line.inverse, s.line.inverse_rest);
}
DEVICE float weight_of(float z) { return expf(exponent_of(z)); }
CALLED double power(double x) { return exp(x); }
// Weight of the best of a part.
DEVICE double part_scale(float greatest) {
    const Shared& s = shared();
    if (!(greatest > minus_infinity())) return 0;
    return power((static_cast<double>(greatest) - s.best) * (static_cast<double>(s.line.inverse) + s.line.inverse_rest));
}

// Over the block, to every thread. Each begins with a barrier, so that scratch may be used again at once.
CALLED uint64_t block_max(uint64_t v) {
    Shared& s = shared();
    v = warp_max(v);
    __syncthreads();
    if (lane_of() == 0) s.keys[warp_of()] = v;
    __syncthreads();
    return warp_max(s.keys[lane_of() % WARPS]);
}
CALLED uint32_t block_min(uint32_t v) {
    Shared& s = shared();
    v = __reduce_min_sync(~0u, v);
    __syncthreads();
    if (lane_of() == 0) s.words[warp_of()] = v;
    __syncthreads();
    return __reduce_min_sync(~0u, s.words[lane_of() % WARPS]);
}
DEVICE double warp_through(double v) {  // inclusive prefix sum
#pragma unroll
    for (int step = 1; step < 32; step <<= 1) {
        const double lower = __shfl_up_sync(~0u, v, step);
        if (lane_of() >= step) v += lower;
    }
    return v;
}
struct Prefix {
    double before, total;  // of the threads before this one, of all
};
CALLED Prefix block_before(double v) {
    Shared& s = shared();
    const double through = warp_through(v);
    const double lower = __shfl_up_sync(~0u, through, 1);
    __syncthreads();
    if (lane_of() == 31) s.sums[warp_of()] = through;
    __syncthreads();
    Prefix sum = {0, 0};
#pragma unroll 4
    for (int warp = 0; warp < WARPS; ++warp) {
        if (warp == warp_of()) sum.before = sum.total;
        sum.total += s.sums[warp];
    }
    if (lane_of()) sum.before += lower;
    return sum;
}

// Lists the parts whose greatest logit is at least `low`, in order. Ends with a barrier.
CALLED uint32_t list_parts(float low) {
    Shared& s = shared();
    const bool in = threadIdx.x < s.parts && s.greatest[threadIdx.x] >= low;
    const uint32_t mask = __ballot_sync(~0u, in);
    __syncthreads();
    if (lane_of() == 0) s.words[warp_of()] = __popc(mask);
    __syncthreads();
    uint32_t before = 0, total = 0;
#pragma unroll 4
    for (int warp = 0; warp < WARPS; ++warp) {
        if (warp == warp_of()) before = total;
        total += s.words[warp];
    }
    if (in) s.list[before + __popc(mask & ((1u << lane_of()) - 1))] = threadIdx.x;
    __syncthreads();
    return total;
}

// Calls f(logit, part) for all of the first `listed` parts of the list, a part a warp, in one fixed order a thread; at the end of a part
// done(part). Four loads are under way.
template <class F, class G> DEVICE void for_each(uint32_t listed, F f, G done) {
    const Shared& s = shared();
    const auto load = [&](uint32_t n) {
        const uint32_t at = warp_of() + (n >> 3) * WARPS;
        return load_four(s.logits, at < listed ? s.list[at] * PART + (n & 7) * 128 + lane_of() * 4 : s.vocab, s.vocab);
    };
    float4 a = load(0), b = load(1), c = load(2), d = load(3);
#pragma unroll 1
    for (uint32_t n = 0; warp_of() + (n >> 3) * WARPS < listed; ++n) {
        const float4 v = a;
        a = b, b = c, c = d, d = load(n + 4);
        const uint32_t part = s.list[warp_of() + (n >> 3) * WARPS];
        f(v.x, part), f(v.y, part), f(v.z, part), f(v.w, part);
        if ((n & 7) == 7) done(part);
    }
}

// What a logit weighs where tokens are taken in the order of their ids: relative to the row's best, or 0 below min-p; with a `tie`, 1 if
// it is that and 0 else.
struct ById {
    bool ties;
    float tie;
};

// The first id at which the running sum of weights exceeds `target`; s.mass holds the sum of each part. The last id with a weight where
// rounding leaves a sliver; NONE where nothing has a weight.
CALLED uint32_t pick_by_id(double target, ById by) {
    Shared& s = shared();
    const double own = threadIdx.x < s.parts ? s.mass[threadIdx.x] : 0.0;
    const double before = block_before(own).before;
    uint32_t part = block_min(own > 0 && before + own > target ? threadIdx.x : NONE);
    if (part == NONE) {
        part = block_min(own > 0 ? THREADS - 1 - threadIdx.x : NONE);
        if (part == NONE) return NONE;
        part = THREADS - 1 - part;
    }
    if (threadIdx.x == part) s.answer = target - before;
    __syncthreads();
    const double left = s.answer;
    const bool plain = !by.ties && s.line.min_p <= 0;
    const float reference = plain ? s.greatest[part] : s.best;
    const double scale = plain ? part_scale(reference) : 1.0;
    const uint32_t first = part * PART + threadIdx.x * 4;
    const float4 four = load_four(s.logits, threadIdx.x * 4 < PART ? first : s.vocab, s.vocab);
    double sum = 0;
    uint32_t found = NONE, last = NONE;
    // Twice: what lies before this thread is known after the first time.
    double start = 0;
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {
        double through = start;
#pragma unroll 1
        for (int at = 0; at < 4; ++at) {
            const float z = at == 0 ? four.x : at == 1 ? four.y : at == 2 ? four.z : four.w;
            float w = by.ties ? (z == by.tie ? 1.0f : 0.0f) : weight(z, reference, s.line.inverse, s.line.inverse_rest);
            if (!by.ties && w < s.line.min_p) w = 0;
            through += static_cast<double>(w) * scale;
            if (w > 0) {
                last = first + at;
                if (pass == 1 && found == NONE && through > left) found = first + at;
            }
        }
        if (pass == 0) {
            sum = through;
            start = block_before(sum).before;
        }
    }
    found = block_min(found);
    if (found != NONE) return found;
    return ~block_min(last == NONE ? NONE : ~last);
}

// Collects the candidates with logits in [low, high], both finite; all are counted, CAPACITY are stored.
CALLED uint32_t collect(float low, float high) {
    Shared& s = shared();
    if (threadIdx.x == 0) s.collected = 0;
    const uint32_t listed = list_parts(low);
#pragma unroll 1
    for (uint32_t at = warp_of(); at < listed; at += WARPS) {
        const int first = s.list[at] * PART + lane_of() * 4;
        uint32_t mask = 0;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            if (first + j * 128 < s.vocab) {
                const float4 v = *reinterpret_cast<const float4*>(s.logits + first + j * 128);
                if (v.x >= low && v.x <= high) mask |= 1u << (j * 4);
                if (v.y >= low && v.y <= high) mask |= 2u << (j * 4);
                if (v.z >= low && v.z <= high) mask |= 4u << (j * 4);
                if (v.w >= low && v.w <= high) mask |= 8u << (j * 4);
            }
        }
        if (s.list[at] * PART + PART > s.vocab) {  // columns beyond the vocabulary hold anything
            for (uint32_t left = mask; left; left &= left - 1) {
                const int i = __ffs(left) - 1;
                if (first + (i >> 2) * 128 + (i & 3) >= s.vocab) mask &= ~(1u << i);
            }
        }
        uint32_t through = __popc(mask);
#pragma unroll
        for (int step = 1; step < 32; step <<= 1) {
            const uint32_t lower = __shfl_up_sync(~0u, through, step);
            if (lane_of() >= step) through += lower;
        }
        uint32_t to = 0;
        // The order of arrival is lost in the sort: candidates are all different.
        if (lane_of() == 31) to = atomicAdd(&s.collected, through);
        to = __shfl_sync(~0u, to, 31) + through - __popc(mask);
#pragma unroll 1
        for (; mask; mask &= mask - 1, ++to) {
            const int i = __ffs(mask) - 1;
            const int col = first + (i >> 2) * 128 + (i & 3);
            if (to < CAPACITY) s.candidates[to] = candidate(s.logits[col], col);
        }
    }
    __syncthreads();
    return s.collected;
}

// Best first. `count` <= CAPACITY.
CALLED void sort_candidates(uint32_t count) {
    Shared& s = shared();
    if (count <= 128) {  // each finds its own place
        const uint64_t own = threadIdx.x < count ? s.candidates[threadIdx.x] : 0;
        uint32_t place = 0;
        if (threadIdx.x < count) {
#pragma unroll 4
            for (uint32_t at = 0; at < count; ++at) place += s.candidates[at] > own;
        }
        __syncthreads();
        if (threadIdx.x < count) s.candidates[place] = own;
        __syncthreads();
        return;
    }
    uint32_t size = 256;
    while (size < count) size *= 2;
    for (uint32_t at = count + threadIdx.x; at < size; at += THREADS) s.candidates[at] = 0;
#pragma unroll 1
    for (uint32_t run = 2; run <= size; run *= 2) {
#pragma unroll 1
        for (uint32_t step = run / 2; step > 0; step /= 2) {
            __syncthreads();
#pragma unroll 1
            for (uint32_t pair = threadIdx.x; pair < size / 2; pair += THREADS) {
                const uint32_t a = pair * 2 - (pair & (step - 1)), b = a + step;
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

// Sorted candidates as a thread sees them: its own run of them, and the masses before its own and of all.
struct Sorted {
    uint32_t first, end;
    double before, total;
};
CALLED Sorted measure(uint32_t count) {
    const Shared& s = shared();
    const uint32_t each = (count + THREADS - 1) / THREADS;
    const uint32_t first = min(threadIdx.x * each, count), end = min(first + each, count);
    double sum = 0;
#pragma unroll 1
    for (uint32_t at = first; at < end; ++at) sum += static_cast<double>(weight_of(candidate_logit(s.candidates[at])));
    const Prefix prefix = block_before(sum);
    return {first, end, prefix.before, prefix.total};
}

// A candidate's index, and the mass of it and of all before it.
struct Found {
    uint32_t at;
    double through;
};
// The first of `count` > 0 whose mass, with all before it, reaches `target`, or exceeds it if `strict`; the last where none does. It and all
// before it weigh at least `least` if the first does: what comes later is dropped.
CALLED Found locate(const Sorted& sorted, uint32_t count, double target, bool strict, float least) {
    Shared& s = shared();
    uint32_t found = NONE, last = NONE;
    double through = sorted.before, found_through = 0, last_through = 0;
#pragma unroll 1
    for (uint32_t at = sorted.first; at < min(sorted.end, count); ++at) {
        const float w = weight_of(candidate_logit(s.candidates[at]));
        through += static_cast<double>(w);
        if (w < least && at > 0) break;
        last = at, last_through = through;
        if (found == NONE && (strict ? through > target : through >= target)) found = at, found_through = through;
    }
    const uint32_t met = block_min(found);
    const uint32_t at = met != NONE ? met : ~block_min(last == NONE ? NONE : ~last);
    if (met != NONE ? found == at : last == at) s.answer = met != NONE ? found_through : last_through;
    __syncthreads();
    const Found answer = {at, s.answer};
    __syncthreads();
    return answer;
}
