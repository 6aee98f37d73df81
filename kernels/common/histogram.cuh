// Finding the candidate at a rank or at a mass, however many there are: histograms narrow its range of keys down until the range can be
// sorted, or is a single key.
#pragma once
#include "common/select.cuh"

constexpr float DEEPEST = 104.0f;  // e^-104 is 0 in float32
constexpr float BIN_RATE = (BINS - 1) / DEEPEST;

// A candidate, and the mass of it and of all before it.
struct Place {
    uint64_t at;  // 0 is none
    double through;
};

// Falls as the logit rises. 0 is the best one's.
DEVICE uint32_t coarse_bin(float exponent) { return static_cast<uint32_t>(fminf(-exponent * BIN_RATE, BINS - 1)); }
// The exponent at the upper end of a coarse bin.
DEVICE float coarse_top(uint32_t bin) { return -(static_cast<float>(bin) / BIN_RATE); }

DEVICE void add(Histogram& h, uint32_t bin, float relative) {
    const uint32_t units = static_cast<uint32_t>(fminf(relative, 1.0f) * 67108864.0f + 0.5f);
    atomicAdd(&h.count[bin], 1u);
    atomicAdd(&h.high[bin], units >> 13);
    atomicAdd(&h.low[bin], units & 8191u);
}
DEVICE double units(const Histogram& h, uint32_t bin) {
    return (static_cast<double>(h.high[bin]) * 8192.0 + static_cast<double>(h.low[bin])) * (1.0 / 67108864.0);
}
CALLED void clear(Histogram& h) {
    __syncthreads();
    for (int bin = threadIdx.x; bin < BINS; bin += THREADS) h.count[bin] = h.high[bin] = h.low[bin] = 0;
    __syncthreads();
}

// All candidates of bins 0 to `last`.
CALLED void fill_coarse(uint32_t last) {
    Shared& s = shared();
    clear(s.coarse);
    // Parts that may hold some; which logits count is asked of each.
    const float low = s.best + coarse_top(last + 1) / s.line.inverse * 1.0001f;
    const uint32_t listed = list_parts(fmaxf(low, -3.402823466e38f));
    for_each(
        listed,
        [&](float z, uint32_t) {
            const float exponent = exponent_of(z);
            const uint32_t bin = coarse_bin(exponent);
            if (exponent > -DEEPEST && bin <= last) add(s.coarse, bin, expf(exponent - coarse_top(bin)));
        },
        [](uint32_t) {});
    __syncthreads();
}

// The lowest key of coarse bins 0 to `bin`, by bisection: the bin of a key falls as the key rises.
CALLED uint32_t coarse_low(uint32_t bin) {
    uint32_t no = ordered(minus_infinity()), yes = ordered(shared().best);
#pragma unroll 1
    while (yes - no > 1) {
        const uint32_t middle = no + (yes - no) / 2;
        const float exponent = exponent_of(unordered(middle));
        const bool inside = exponent > -DEEPEST && coarse_bin(exponent) <= bin;
        yes = inside ? middle : yes;
        no = inside ? no : middle;
    }
    return yes;
}

// What is looked for: the first candidate whose mass (or rank), with all before it, reaches `target`, or exceeds it if `strict`.
struct Wanted {
    double target;
    bool by_rank, strict;

    __device__ __forceinline__ bool met(double value) const { return strict ? value > target : value >= target; }
};

struct Bin {
    uint32_t index;      // NONE: all are empty
    uint32_t count;      // candidates in it
    double mass, ranks;  // of the bins before it
};

// The bin in which `wanted` is met, given what lies before the histogram; the last that is not empty if none meets it. A whole unit is a
// weight of e^`top`, or in the coarse histogram of the bin's upper end.
CALLED Bin find_bin(const Histogram& h, const Wanted& wanted, double mass, double ranks, bool coarse, double top) {
    static_assert(BINS == 2 * THREADS);
    Shared& s = shared();
    const uint32_t a = threadIdx.x * 2, b = a + 1;
    const double mass_a = units(h, a) * power(coarse ? coarse_top(a) : top), mass_b = units(h, b) * power(coarse ? coarse_top(b) : top);
    const double count_a = h.count[a], count_b = h.count[b];
    const double mass_before = mass + block_before(mass_a + mass_b).before;
    const double count_before = ranks + block_before(count_a + count_b).before;
    const double base = wanted.by_rank ? count_before : mass_before;
    const double own_a = wanted.by_rank ? count_a : mass_a, own_b = wanted.by_rank ? count_b : mass_b;
    uint32_t first = NONE;
    if (count_b > 0 && wanted.met(base + own_a + own_b)) first = b;
    if (count_a > 0 && wanted.met(base + own_a)) first = a;
    Bin found;
    found.index = block_min(first);
    if (found.index == NONE) {
        const uint32_t last = block_min(count_b > 0 ? BINS - 1 - b : count_a > 0 ? BINS - 1 - a : NONE);
        if (last == NONE) return {NONE, 0, mass, ranks};
        found.index = BINS - 1 - last;
    }
    if (found.index / 2 == threadIdx.x) {
        s.answer = mass_before + (found.index == b ? mass_a : 0.0);
        s.answer_rank = count_before + (found.index == b ? count_a : 0.0);
    }
    __syncthreads();
    found.count = h.count[found.index];
    found.mass = s.answer;
    found.ranks = s.answer_rank;
    __syncthreads();
    return found;
}

DEVICE Bin find_coarse(const Wanted& wanted) { return find_bin(shared().coarse, wanted, 0.0, 0.0, true, 0.0); }

// Among more candidates of one key than can be sorted: by id.
CALLED Place find_tie(const Wanted& wanted, uint32_t key, const Bin& bin) {
    Shared& s = shared();
    const float z = unordered(key);
    const double each = weight_of(z);
    double index;
    if (wanted.by_rank) {
        index = wanted.target - bin.ranks - 1;
    } else if (wanted.strict) {
        index = floor((wanted.target - bin.mass) / each);
    } else {
        index = ceil((wanted.target - bin.mass) / each) - 1;
    }
    index = fmin(fmax(index, 0.0), bin.count - 1.0);
    clear(s.fine);
    const uint32_t listed = list_parts(z);
    for_each(
        listed,
        [&](float v, uint32_t part) {
            if (v == z) atomicAdd(&s.fine.count[part], 1u);
        },
        [](uint32_t) {});
    __syncthreads();
    s.mass[threadIdx.x] = s.fine.count[threadIdx.x];
    const uint32_t id = pick_by_id(index, {true, z});
    return {candidate(z, id), bin.mass + (index + 1) * each};
}

// Finds it. The coarse histogram is filled; the masses of the parts and the candidates are overwritten.
CALLED Place find(const Wanted& wanted) {
    Shared& s = shared();
    Bin bin = find_coarse(wanted);
    if (bin.index == NONE) return {0, 0.0};
    uint32_t low = coarse_low(bin.index);
    uint32_t high = bin.index ? coarse_low(bin.index - 1) - 1 : ordered(s.best);
#pragma unroll 1
    while (bin.count > CAPACITY && low < high) {
        const int shift = max(0, 32 - __clz(high - low) - 10);
        const float top = exponent_of(unordered(high));
        clear(s.fine);
        const uint32_t listed = list_parts(unordered(low));
        for_each(
            listed,
            [&](float z, uint32_t) {
                const uint32_t key = ordered(z);
                if (key >= low && key <= high) add(s.fine, (high - key) >> shift, expf(exponent_of(z) - top));
            },
            [](uint32_t) {});
        __syncthreads();
        bin = find_bin(s.fine, wanted, bin.mass, bin.ranks, false, top);
        if (bin.index == NONE) return {0, 0.0};
        high -= bin.index << shift;
        low = max(low, high - ((1u << shift) - 1));
    }
    if (bin.count > CAPACITY) return find_tie(wanted, low, bin);
    // The key between those of the least negative number and of 0 would be -0, which no comparison tells from 0.
    const float top = unordered(high == 0x7fffffffu ? high - 1 : high);
    const uint32_t count = min(collect(unordered(low), top), static_cast<uint32_t>(CAPACITY));
    if (count == 0) return {0, 0.0};
    sort_candidates(count);
    const Sorted sorted = measure(count);
    const uint32_t first = wanted.by_rank ? static_cast<uint32_t>(fmin(fmax(wanted.target - bin.ranks - 1, 0.0), count - 1.0)) + 1 : count;
    const double target = wanted.by_rank ? sorted.total * 2 + 1 : wanted.target - bin.mass;
    const Found found = locate(sorted, first, target, wanted.strict, 0.0f);
    return {s.candidates[found.at], bin.mass + found.through};
}
