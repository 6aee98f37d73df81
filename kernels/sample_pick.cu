// Second half of sampling: picks one token of every row from the adjusted logits and what sample_scan found in their parts, and reads
// log-probabilities. Blocks (row, 0) pick, blocks (row, 1) read the most likely alternatives; a block whose row wants nothing of it
// returns at once. A greedy row reads no logits.
#include "common/histogram.cuh"

struct Head {
    uint32_t id;
    uint32_t status;  // 0, NON_FINITE or NOTHING_LEFT
    float logprob;    // of the picked id
    uint32_t spare;
};
enum : uint32_t { NON_FINITE = 1, NOTHING_LEFT = 2 };
struct Alternative {
    uint32_t id;
    float logprob;
};
constexpr int ALTERNATIVES = 20;

static_assert(sizeof(Shared) == 51672, "crates/cuda/src/ops/sample_pick.rs asks for as much");

struct Params {
    const Line* table;           // [1 + rows]; line 0 is the header
    const float* logits;         // [rows, stride]
    const Partial* partials;     // [rows, parts]
    Head* heads;                 // [rows]
    Alternative* alternatives;   // [rows, ALTERNATIVES]
    int* sampled;                // [rows]: the ids again, for the next step to read
    int vocab, stride, parts;
};

// By id, of all candidates (`min_p` 0: the sums of the scan serve) or of those above `min_p`.
CALLED uint32_t draw_by_id(const Row& row, const Line& line) {
    Shared& s = row.s;
    if (line.min_p <= 0) {
        const double total = block_sum(threadIdx.x < row.parts ? s.mass[threadIdx.x] : 0.0, s);
        return pick_by_id(row, line.uniform * total, [&](float z, uint32_t part) {
            const float best = s.best[part];
            if (!(best > minus_infinity())) return 0.0;
            const double scale = exp((static_cast<double>(best) - row.best) * (static_cast<double>(row.inverse) + row.inverse_rest));
            return static_cast<double>(weight(z, best, row.inverse, row.inverse_rest)) * scale;
        });
    }
    const auto kept = [&](float z, uint32_t) {
        const float w = row.weight_of(z);
        return w >= line.min_p ? static_cast<double>(w) : 0.0;
    };
    __syncthreads();
    for (int part = warp_of(); part < row.parts; part += WARPS) {
        double sum = 0;
        if (row.weight_of(s.best[part]) >= line.min_p) {
            float v[32];
            load_part(v, row.logits, part, row.vocab);
#pragma unroll
            for (int i = 0; i < 32; ++i) sum += kept(v[i], part);
        }
        sum = warp_sum(sum);
        if (lane_of() == 0) s.mass[part] = sum;
    }
    __syncthreads();
    const double total = block_sum(threadIdx.x < row.parts ? s.mass[threadIdx.x] : 0.0, s);
    return pick_by_id(row, line.uniform * total, kept);
}

// From candidates that hold every token that may be kept.
DEVICE uint32_t draw_sorted(const Row& row, const Line& line, const Sorted& sorted, uint32_t count, double wanted) {
    Shared& s = row.s;
    uint32_t kept = count;
    if (line.top_p < 1) kept = min(kept, 1 + sorted.first(count, s, [&](float, double through) { return through >= wanted; }));
    if (line.min_p > 0) kept = sorted.first(kept, s, [&](float w, double) { return w < line.min_p; });
    kept = max(kept, 1u);
    const double target = line.uniform * sorted.mass(kept - 1, s);
    const uint32_t at = sorted.first(kept, s, [&](float, double through) { return through > target; });
    return candidate_id(s.candidates[min(at, kept - 1)]);
}

// Collects down to `low` and draws, if that holds enough. `total` is the mass of the row.
CALLED bool try_draw(const Row& row, const Line& line, uint32_t low, bool all, double total, uint32_t& id) {
    uint32_t count = collect(row, low, ordered(row.best));
    if (count == 0 || count > CAPACITY) return false;
    if (line.top_k && count < line.top_k && !all) return false;
    sort_candidates(row.s, count);
    if (line.top_k) count = min(count, line.top_k);
    Sorted sorted;
    sorted.load(row, count);
    const double wanted = line.top_p * (line.top_k ? sorted.total : total);
    if (!line.top_k && sorted.total < wanted && !all) return false;
    id = draw_sorted(row, line, sorted, count, wanted);
    return true;
}

// The key of the `rank`-th greatest of the parts' greatest logits (from 1): at least `rank` logits lie there or above. The lowest finite
// one if there are not so many.
CALLED uint32_t part_key(const Row& row, uint32_t rank) {
    Shared& s = row.s;
    const uint32_t bottom = ordered(minus_infinity());
    const uint32_t own = threadIdx.x < row.parts ? ordered(s.best[threadIdx.x]) : bottom;
    uint32_t above = 0;
    for (int part = 0; part < row.parts; ++part) {
        const uint32_t other = ordered(s.best[part]);
        above += other > own || (other == own && part < static_cast<int>(threadIdx.x));
    }
    return block_min(own > bottom && above < rank ? own : NONE, s);
}

// In descending order, of candidates filtered by top-k and top-p.
CALLED uint32_t draw_ranked(const Row& row, const Line& line, double total) {
    const uint32_t top = ordered(row.best), lowest = ordered(minus_infinity()) + 1;
    const uint32_t parts = row.parts;
    uint32_t id = NONE;
    if (row.vocab <= CAPACITY) {
        try_draw(row, line, lowest, true, total, id);
        return id;
    }
    // Nuclei are small: a few parts hold them. Then most parts, then what a histogram says.
    if (line.top_k <= parts) {
        const uint32_t rank = line.top_k ? line.top_k : min(24u, parts);
        if (try_draw(row, line, part_key(row, rank), false, total, id)) return id;
    }
    if (try_draw(row, line, part_key(row, max(1u, parts * 7 / 8)), false, total, id)) return id;

    fill_coarse(row);
    const Wanted cut = line.top_k ? Wanted{static_cast<double>(line.top_k), true, false} : Wanted{line.top_p * total, false, false};
    const Bin bin = find_coarse(row, cut);
    if (bin.ranks + bin.count <= CAPACITY && try_draw(row, line, coarse_low(row, bin.index), true, total, id)) return id;

    // More than can be sorted at once: find the cuts one after the other, then what is drawn.
    Place last = {0, total};
    if (line.top_k) last = find(row, cut);
    if (line.top_p < 1) {
        const Place nucleus = find(row, {line.top_p * last.through, false, false});
        if (nucleus.at > last.at) last = nucleus;
    }
    if (line.min_p > 0 && (last.at == 0 || row.weight_of(candidate_logit(last.at)) < line.min_p)) {
        double sum = 0;
        for_each(row, lowest, [&](float z, uint32_t) {
            const float w = row.weight_of(z);
            if (w >= line.min_p) sum += static_cast<double>(w);
        });
        last = {candidate(row.best, 0), block_sum(sum, row.s)};
        const Place drawn = find(row, {line.uniform * last.through, false, true});
        if (row.weight_of(candidate_logit(drawn.at)) >= line.min_p) return candidate_id(drawn.at);
        return candidate_id(find(row, {0.0, false, true}).at);
    }
    const Place drawn = find(row, {line.uniform * last.through, false, true});
    // Rounding may leave a sliver beyond the last one.
    return candidate_id(drawn.at > last.at ? drawn.at : last.at);
}

// The most likely tokens, one after the other: the best of the parts' best, whose part is then read again without it. One warp.
CALLED void read_alternatives(const Row& row, uint64_t* tops, uint32_t wanted, double norm, Alternative* to) {
    for (uint32_t n = 0; n < wanted; ++n) {
        uint64_t best = 0;
        for (int part = lane_of(); part < row.parts; part += 32) best = best > tops[part] ? best : tops[part];
        best = warp_max(best);
        if (best == 0) return;
        const uint32_t id = candidate_id(best);
        if (lane_of() == 0) to[n] = {id, fmaxf(static_cast<float>(candidate_logit(best) - norm), -3.402823466e38f)};
        const int part = id / PART;
        float v[32];
        load_part(v, row.logits, part, row.vocab);
        uint64_t next = 0;
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            const uint32_t other = part * PART + part_column(i, lane_of());
            const uint64_t c = candidate(v[i], other);
            if (other < row.vocab && c < best && c > next) next = c;
        }
        next = warp_max(next);
        __syncwarp();
        if (lane_of() == 0) tops[part] = next;
        __syncwarp();
    }
}

KERNEL __launch_bounds__(THREADS, 2) sample_pick(const __grid_constant__ Params p) {
    extern __shared__ __align__(16) unsigned char memory[];
    Shared& s = *reinterpret_cast<Shared*>(memory);
    pdl_wait();
    pdl_launch();
    const uint32_t r = blockIdx.x;
    if (r >= reinterpret_cast<const Header*>(p.table)->live) return;
    const Line& line = p.table[r + 1];
    const bool picks = blockIdx.y == 0;
    const uint32_t wants = line.flags;
    if (!picks && (!(wants & LOGPROBS) || line.alternatives == 0)) return;

    Partial own = {minus_infinity(), 0, 0, 0, 0.0, 0.0};
    const bool mine = threadIdx.x < p.parts;
    if (mine) own = p.partials[static_cast<size_t>(r) * p.parts + threadIdx.x];
    const uint64_t top = block_max(mine ? candidate(own.best, own.id) : 0, s);
    const float best = candidate_logit(top);
    const bool tainted = __syncthreads_or(own.flags & TAINTED), finite = __syncthreads_or(own.flags & FINITE);
    const uint32_t status = tainted || !finite ? NON_FINITE : best > minus_infinity() ? 0 : NOTHING_LEFT;
    if (status) {
        if (picks && threadIdx.x == 0) {
            p.heads[r] = {0, status, 0.0f, 0};
            p.sampled[r] = 0;
        }
        return;
    }
    double norm = 0;
    if (wants & LOGPROBS) {
        const bool some = own.best > minus_infinity();
        const double sum = some ? own.plain * exp(static_cast<double>(own.best) - best) : 0.0;
        norm = best + log(block_sum(sum, s));
    }
    const Row row = {p.logits + static_cast<size_t>(r) * p.stride, s, p.vocab, p.parts, best, line.inverse, line.inverse_rest};
    if (!picks) {
        uint64_t* tops = s.candidates;
        if (mine) tops[threadIdx.x] = candidate(own.best, own.id);
        __syncthreads();
        const uint32_t wanted = min(line.alternatives, static_cast<uint32_t>(ALTERNATIVES));
        if (warp_of() == 0) read_alternatives(row, tops, wanted, norm, p.alternatives + static_cast<size_t>(r) * ALTERNATIVES);
        return;
    }
    uint32_t id = candidate_id(top);
    if (wants & DRAWN) {
        const double inverse = static_cast<double>(line.inverse) + line.inverse_rest;
        const bool some = own.best > minus_infinity();
        s.best[threadIdx.x] = own.best;
        s.mass[threadIdx.x] = some ? own.mass * exp((static_cast<double>(own.best) - best) * inverse) : 0.0;
        __syncthreads();
        if (line.top_k || line.top_p < 1) {
            const double total = block_sum(s.mass[threadIdx.x], s);
            id = draw_ranked(row, line, total);
        } else {
            id = draw_by_id(row, line);
        }
        if (id >= p.vocab) id = candidate_id(top);
    }
    if (threadIdx.x == 0) {
        const float logprob = wants & LOGPROBS ? fmaxf(static_cast<float>(row.logits[id] - norm), -3.402823466e38f) : 0.0f;
        p.heads[r] = {id, 0, logprob, 0};
        p.sampled[r] = static_cast<int>(id);
    }
}
