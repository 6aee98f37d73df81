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

static_assert(sizeof(Shared) == 53696, "crates/cuda/src/ops/sample_pick.rs asks for as much");

struct Params {
    const Line* table;           // [1 + rows]; line 0 is the header
    const float* logits;         // [rows, stride]
    const Partial* partials;     // [rows, parts]
    Head* heads;                 // [rows]
    Alternative* alternatives;   // [rows, ALTERNATIVES]
    int* sampled;                // [rows]: the ids again, for the next step to read
    int vocab, stride, parts;
};

// By id, of all candidates (`min_p` 0: the sums of the scan serve) or of those that weigh at least `min_p`.
CALLED uint32_t draw_by_id() {
    Shared& s = shared();
    const float least = s.line.min_p;
    if (least > 0) {
        // The best part weighs 1, so there is one.
        const float low = s.best - (1.0f - logf(least)) / s.line.inverse;
        s.mass[threadIdx.x] = 0;
        const uint32_t listed = list_parts(fmaxf(low, -3.402823466e38f));
        double sum = 0;
        for_each(
            listed,
            [&](float z, uint32_t) {
                const float w = weight_of(z);
                if (w >= least) sum += static_cast<double>(w);
            },
            [&](uint32_t part) {
                sum = warp_sum(sum);
                if (lane_of() == 0) s.mass[part] = sum;
                sum = 0;
            });
        __syncthreads();
    }
    const double total = block_before(s.mass[threadIdx.x]).total;
    return pick_by_id(s.line.uniform * total, {false, 0.0f});
}

// Collects down to `low` and draws, if that holds enough or is `all` there is. `total` is the mass of the row. NONE if it does not.
CALLED uint32_t try_draw(float low, bool all, double total) {
    Shared& s = shared();
    const uint32_t top_k = s.line.top_k;
    uint32_t count = collect(low, s.best);
    if (count == 0 || count > CAPACITY) return NONE;
    if (count < top_k && !all) return NONE;
    sort_candidates(count);
    if (top_k) count = min(count, top_k);
    const Sorted sorted = measure(count);
    double wanted = sorted.total * 2 + 1;  // beyond all
    if (s.line.top_p < 1) {
        wanted = s.line.top_p * (top_k ? sorted.total : total);
        if (!top_k && sorted.total < wanted && !all) return NONE;
    }
    const Found cut = locate(sorted, count, wanted, false, s.line.min_p);
    const Found drawn = locate(sorted, cut.at + 1, s.line.uniform * cut.through, true, 0.0f);
    return candidate_id(s.candidates[drawn.at]);
}

// The `rank`-th greatest (from 1) of the parts' greatest logits: at least `rank` logits lie there or above. The lowest finite one if there
// are not so many.
CALLED float part_threshold(uint32_t rank) {
    const Shared& s = shared();
    const float own = s.greatest[threadIdx.x];
    uint32_t above = 0;
#pragma unroll 2
    for (int part = 0; part < s.parts; part += 4) {
        const float4 other = *reinterpret_cast<const float4*>(s.greatest + part);
        above += (other.x > own) + (other.y > own) + (other.z > own) + (other.w > own);
    }
    return unordered(block_min(own > minus_infinity() && above < rank ? ordered(own) : NONE));
}

// In descending order, of candidates filtered by top-k and top-p.
CALLED uint32_t draw_ranked() {
    Shared& s = shared();
    const double total = block_before(s.mass[threadIdx.x]).total;
    const float lowest = -3.402823466e38f;
    if (s.vocab <= CAPACITY) return try_draw(lowest, true, total);
    // Nuclei are small: a few parts hold them, and less than the k best parts hold the k best.
    if (s.line.top_k <= s.parts) {
        const uint32_t id = try_draw(part_threshold(s.line.top_k ? s.line.top_k : 32), false, total);
        if (id != NONE) return id;
    }
    // Tokens so unlikely that all of the vocabulary together would not have the mass that top-p drops are never in the nucleus.
    float depth = DEEPEST;
    if (!s.line.top_k) depth = fmaxf(0.0f, logf(static_cast<float>(s.vocab / ((1 - s.line.top_p) * total)))) + 0.01f;
    fill_coarse(coarse_bin(-depth));
    const Wanted cut = {s.line.top_k ? s.line.top_k : s.line.top_p * total, s.line.top_k != 0, false};
    const Bin bin = find_coarse(cut);
    if (bin.index == NONE) return NONE;
    if (bin.ranks + bin.count <= CAPACITY) return try_draw(unordered(coarse_low(bin.index)), true, total);

    // More than can be sorted at once: find the cuts one after the other, then what is drawn.
    Place last = {0, total};
    if (s.line.top_k) last = find(cut);
    if (s.line.top_p < 1) {
        const Place nucleus = find({s.line.top_p * last.through, false, false});
        if (nucleus.at > last.at) last = nucleus;
    }
    const float least = s.line.min_p;
    if (least > 0 && (last.at == 0 || weight_of(candidate_logit(last.at)) < least)) {
        double sum = 0;
        const uint32_t listed = list_parts(lowest);
        for_each(
            listed,
            [&](float z, uint32_t) {
                const float w = weight_of(z);
                if (w >= least) sum += static_cast<double>(w);
            },
            [](uint32_t) {});
        last = {candidate(s.best, 0), block_before(sum).total};
        const Place drawn = find({s.line.uniform * last.through, false, true});
        if (weight_of(candidate_logit(drawn.at)) >= least) return candidate_id(drawn.at);
        return candidate_id(find({0.0, false, true}).at);
    }
    const Place drawn = find({s.line.uniform * last.through, false, true});
    // Rounding may leave a sliver beyond the last one.
    return candidate_id(drawn.at > last.at ? drawn.at : last.at);
}

DEVICE Alternative alternative(uint64_t c, double norm) {
    return {candidate_id(c), fmaxf(static_cast<float>(candidate_logit(c) - norm), -3.402823466e38f)};
}

// The most likely tokens. `own` is the best candidate of this thread's part.
CALLED void read_alternatives(uint32_t wanted, double norm, uint64_t own, Alternative* to) {
    Shared& s = shared();
    const uint32_t count = wanted <= s.parts ? collect(part_threshold(wanted), s.best) : 0;
    if (count >= wanted && count <= CAPACITY) {
        sort_candidates(count);
        if (threadIdx.x < wanted) to[threadIdx.x] = alternative(s.candidates[threadIdx.x], norm);
        return;
    }
    // Few parts, or few finite logits: one after the other. The best of the parts' best; then its part is read again without it.
    __syncthreads();
    uint64_t* tops = s.candidates;
    tops[threadIdx.x] = own;
    __syncthreads();
    if (warp_of() != 0) return;
#pragma unroll 1
    for (uint32_t n = 0; n < wanted; ++n) {
        uint64_t best = 0;
        for (int part = lane_of(); part < s.parts; part += 32) best = best > tops[part] ? best : tops[part];
        best = warp_max(best);
        if (best == 0) return;
        if (lane_of() == 0) to[n] = alternative(best, norm);
        const int part = candidate_id(best) / PART;
        uint64_t next = 0;
#pragma unroll 4
        for (int col = part * PART + lane_of(); col < min(s.vocab, part * PART + PART); col += 32) {
            const uint64_t c = candidate(s.logits[col], col);
            if (c < best && c > next) next = c;
        }
        next = warp_max(next);
        __syncwarp();
        if (lane_of() == 0) tops[part] = next;
        __syncwarp();
    }
}

KERNEL __launch_bounds__(THREADS, 2) sample_pick(const __grid_constant__ Params p) {
    Shared& s = shared();
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
    const uint64_t first = mine ? candidate(own.best, own.id) : 0;
    const uint64_t top = block_max(first);
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
    uint32_t id = candidate_id(top);
    double norm = 0;
    const float* logits = p.logits + static_cast<size_t>(r) * p.stride;
    if (wants & (DRAWN | LOGPROBS)) {
        const bool some = own.best > minus_infinity();
        s.greatest[threadIdx.x] = own.best;
        if (threadIdx.x == 0) {
            s.line = line;
            s.logits = logits;
            s.vocab = p.vocab;
            s.parts = p.parts;
            s.best = best;
        }
        if (wants & LOGPROBS) {
            const double sum = some ? own.plain * power(static_cast<double>(own.best) - best) : 0.0;
            norm = best + log(block_before(sum).total);
        }
        __syncthreads();
        if (!picks) {
            const uint32_t wanted = min(line.alternatives, static_cast<uint32_t>(ALTERNATIVES));
            read_alternatives(wanted, norm, first, p.alternatives + static_cast<size_t>(r) * ALTERNATIVES);
            return;
        }
        if (wants & DRAWN) {
            s.mass[threadIdx.x] = some ? own.mass * part_scale(own.best) : 0.0;
            id = line.top_k || line.top_p < 1 ? draw_ranked() : draw_by_id();
            if (id >= p.vocab) id = candidate_id(top);
        }
    }
    if (threadIdx.x == 0) {
        const float logprob = wants & LOGPROBS ? fmaxf(static_cast<float>(logits[id] - norm), -3.402823466e38f) : 0.0f;
        p.heads[r] = {id, 0, logprob, 0};
        p.sampled[r] = static_cast<int>(id);
    }
}
