// Finding the candidate at a rank or at a mass, however many there are: histograms narrow its range of keys down until the range can be
// sorted, or is a single key.
#pragma once
#include "common/select.cuh"

// A candidate, and the mass of it and of all before it.
struct Place {
    uint64_t at;  // 0 is none
    double through;
};

// Falls as the logit rises. 0 is the best one's.
DEVICE uint32_t coarse_bin(float exponent) { return min(static_cast<uint32_t>(-exponent * BIN_RATE), static_cast<uint32_t>(BINS - 1)); }
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
DEVICE void clear(Histogram& h) {
    __syncthreads();
    for (int bin = threadIdx.x; bin < BINS; bin += THREADS) h.count[bin] = h.high[bin] = h.low[bin] = 0;
    __syncthreads();
}

CALLED void fill_coarse(const Row& row) {
    Histogram& h = row.s.coarse;
    clear(h);
    for_each(row, ordered(minus_infinity()) + 1, [&](float z, uint32_t) {
        const float exponent = row.exponent_of(z);
        if (exponent > -DEEPEST) {
            const uint32_t bin = coarse_bin(exponent);
            add(h, bin, expf(exponent - coarse_top(bin)));
        }
    });
    __syncthreads();
}

// Keys [low, high] of a coarse bin, by bisection: the bin of a key falls as the key rises.
CALLED uint32_t coarse_low(const Row& row, uint32_t bin) {
    uint32_t no = ordered(minus_infinity()), yes = ordered(row.best);
    while (yes - no > 1) {
        const uint32_t middle = no + (yes - no) / 2;
        const float exponent = row.exponent_of(unordered(middle));
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

// The bin in which `wanted` is met, given what lies before the histogram; the last that is not empty if none meets it. `scale(bin)` is
// the mass of a whole unit.
template <class F> DEVICE Bin find_bin(const Histogram& h, Shared& s, const Wanted& wanted, double mass, double ranks, F scale) {
    static_assert(BINS_EACH == 2);
    const uint32_t a = threadIdx.x * 2, b = a + 1;
    const double mass_a = units(h, a) * scale(a), mass_b = units(h, b) * scale(b);
    const double count_a = h.count[a], count_b = h.count[b];
    double unused;
    const double mass_before = mass + block_before(mass_a + mass_b, unused, s);
    const double count_before = ranks + block_before(count_a + count_b, unused, s);
    const double base = wanted.by_rank ? count_before : mass_before;
    const double own_a = wanted.by_rank ? count_a : mass_a, own_b = wanted.by_rank ? count_b : mass_b;
    uint32_t first = NONE;
    if (count_b > 0 && wanted.met(base + own_a + own_b)) first = b;
    if (count_a > 0 && wanted.met(base + own_a)) first = a;
    Bin found;
    found.index = block_min(first, s);
    if (found.index == NONE) {
        const uint32_t last = block_min(count_b > 0 ? BINS - 1 - b : count_a > 0 ? BINS - 1 - a : NONE, s);
        if (last == NONE) return {NONE, 0, mass, ranks};
        found.index = BINS - 1 - last;
    }
    if (found.index / 2 == threadIdx.x) {
        s.answer_mass = mass_before + (found.index == b ? mass_a : 0.0);
        s.answer_count = count_before + (found.index == b ? count_a : 0.0);
    }
    __syncthreads();
    found.count = h.count[found.index];
    found.mass = s.answer_mass;
    found.ranks = s.answer_count;
    __syncthreads();
    return found;
}

CALLED Bin find_coarse(const Row& row, const Wanted& wanted) {
    return find_bin(row.s.coarse, row.s, wanted, 0.0, 0.0,
                    [](uint32_t bin) { return exp(static_cast<double>(coarse_top(bin))); });
}

// Among more candidates of one key than can be sorted: by id.
CALLED Place find_tie(const Row& row, const Wanted& wanted, uint32_t key, const Bin& bin) {
    Shared& s = row.s;
    const float z = unordered(key);
    const double each = row.weight_of(z);
    double index;
    if (wanted.by_rank) {
        index = wanted.target - bin.ranks - 1;
    } else if (wanted.strict) {
        index = floor((wanted.target - bin.mass) / each);
    } else {
        index = ceil((wanted.target - bin.mass) / each) - 1;
    }
    index = fmin(fmax(index, 0.0), bin.count - 1.0);
    __syncthreads();
    for (int part = warp_of(); part < row.parts; part += WARPS) {
        double count = 0;
        if (ordered(s.best[part]) >= key) {
            float v[32];
            load_part(v, row.logits, part, row.vocab);
#pragma unroll
            for (int i = 0; i < 32; ++i) count += ordered(v[i]) == key ? 1.0 : 0.0;
        }
        count = warp_sum(count);
        if (lane_of() == 0) s.mass[part] = count;
    }
    __syncthreads();
    const uint32_t id = pick_by_id(row, index, [&](float v, uint32_t) { return ordered(v) == key ? 1.0 : 0.0; });
    return {candidate(z, id), bin.mass + (index + 1) * each};
}

// Finds it. The coarse histogram is filled; the masses of the parts and the candidates are overwritten.
CALLED Place find(const Row& row, const Wanted& wanted) {
    Shared& s = row.s;
    Bin bin = find_coarse(row, wanted);
    if (bin.index == NONE) return {0, 0.0};
    uint32_t low = coarse_low(row, bin.index);
    uint32_t high = bin.index ? coarse_low(row, bin.index - 1) - 1 : ordered(row.best);
    while (bin.count > CAPACITY && low < high) {
        const int shift = max(0, 32 - __clz(high - low) - 10);
        const float top = row.exponent_of(unordered(high));
        clear(s.fine);
        for_each(row, low, [&](float z, uint32_t) {
            const uint32_t key = ordered(z);
            if (key >= low && key <= high) add(s.fine, (high - key) >> shift, expf(row.exponent_of(z) - top));
        });
        __syncthreads();
        const double scale = exp(static_cast<double>(top));
        bin = find_bin(s.fine, s, wanted, bin.mass, bin.ranks, [&](uint32_t) { return scale; });
        if (bin.index == NONE) return {0, 0.0};
        high -= bin.index << shift;
        low = max(low, high - ((1u << shift) - 1));
    }
    if (bin.count > CAPACITY) return find_tie(row, wanted, low, bin);
    const uint32_t count = min(collect(row, low, high), static_cast<uint32_t>(CAPACITY));
    if (count == 0) return {0, 0.0};
    sort_candidates(s, count);
    Sorted sorted;
    sorted.load(row, count);
    uint32_t at;
    if (wanted.by_rank) {
        at = static_cast<uint32_t>(fmin(fmax(wanted.target - bin.ranks - 1, 0.0), count - 1.0));
    } else {
        at = sorted.first(count, s, [&](float, double through) { return wanted.met(bin.mass + through); });
        at = min(at, count - 1);
    }
    const double through = bin.mass + sorted.mass(at, s);
    const uint64_t answer = s.candidates[at];
    __syncthreads();
    return {answer, through};
}
