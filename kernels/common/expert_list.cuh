// The list of work of a small batch: which experts are active, and whose rows each multiplies.
#pragma once
#include "common/common.cuh"

// One expert and up to `group` of the tokens that chose it.
struct __align__(8) Segment {
    uint16_t expert, first, count, unused;  // tokens are pairs[first .. first + count]
};

// Work of a step, in shared memory; sizes for `pairs` (row, slot) pairs. A pair is row * top_k + slot.
struct Work {
    Segment* segments;   // [pairs]
    uint16_t* pairs;     // [pairs], by expert, then row
    uint32_t* totals;    // [4], of 32 experts each
    uint16_t* firsts;    // [128]: an expert's place in `pairs` (more than 32 pairs)
    uint16_t* places;    // [pairs / 32 rounded up][128]: where the pairs of 32 that chose an expert begin among that expert's (the same)
};

DEVICE Work work_at(char* shared, int pairs) {
    Work work;
    work.segments = reinterpret_cast<Segment*>(shared);
    work.pairs = reinterpret_cast<uint16_t*>(shared + pairs * 8);
    work.totals = reinterpret_cast<uint32_t*>(shared + pairs * 8 + (pairs * 2 + 15) / 16 * 16);
    work.firsts = reinterpret_cast<uint16_t*>(work.totals + 4);
    work.places = work.firsts + 128;
    return work;
}

// The same for at most 32 pairs, by one warp, with one barrier: on the way of one row's answer.
DEVICE int list_few(const Work& work, const int* choice, int live, int capacity, int experts, int group) {
    const int lane = threadIdx.x;
    if (threadIdx.x < 32) {
        // Read whether live or not, so that both loads are under way at once. An index that no router writes must not lead
        // out of bounds.
        const unsigned chosen = choice[min(lane, capacity - 1)];
        const int expert = lane < live ? min(chosen, static_cast<unsigned>(experts - 1)) : experts;
        const uint32_t same = __match_any_sync(~0u, expert);
        const int rank = __popc(same & ((1u << lane) - 1));
        const bool leads = lane < live && rank % group == 0;
        const uint32_t leaders = __ballot_sync(~0u, leads);
        int first = rank, before = 0;
#pragma unroll 1
        for (int i = 0; i < live; ++i) {
            const int other = __shfl_sync(~0u, expert, i);
            first += other < expert;
            before += (leaders >> i & 1) && (other < expert || (other == expert && i < lane));
        }
        if (lane < live) work.pairs[first] = static_cast<uint16_t>(lane);
        if (leads)
            work.segments[before] = {static_cast<uint16_t>(expert), static_cast<uint16_t>(first),
                                     static_cast<uint16_t>(min(group, __popc(same) - rank)), 0};
        if (lane == 0) work.totals[0] = __popc(leaders);
    }
    __syncthreads();
    return work.totals[0];
}

// Lists the active experts in order and their pairs in order, `group` tokens a segment. Returns the number of segments. All
// threads take part, at least 128; `capacity` is what `work` was made for, `live` the pairs there are. At most 128 experts.
DEVICE int list_work(const Work& work, const int* choice, int live, int capacity, int experts, int group) {
    if (capacity <= 32) return list_few(work, choice, live, capacity, experts, group);
    const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, step = blockDim.x / 32 * 32, chunks = (capacity + 31) / 32;
    // As above. Beyond the live pairs: no expert.
    auto expert_of = [&](int pair) {
        const unsigned chosen = choice[min(pair, capacity - 1)];
        return pair < live ? static_cast<int>(min(chosen, static_cast<unsigned>(experts - 1))) : 128;
    };
    // A thread keeps its first pair.
    const int own = thread < chunks * 32 ? expert_of(thread) : 128;
    for (int i = thread; i < chunks * 64; i += blockDim.x) reinterpret_cast<uint32_t*>(work.places)[i] = 0;
    __syncthreads();
    const uint32_t same = __match_any_sync(~0u, own), before = (1u << lane) - 1;
    if (own < 128 && !(same & before)) work.places[warp * 128 + own] = static_cast<uint16_t>(__popc(same));
#pragma unroll 1
    for (int base = warp * 32 + step; base < chunks * 32; base += step) {
        const int expert = expert_of(base + lane);
        const uint32_t equal = __match_any_sync(~0u, expert);
        if (expert < 128 && !(equal & before)) work.places[base / 32 * 128 + expert] = static_cast<uint16_t>(__popc(equal));
    }
    __syncthreads();
    uint32_t mine = 0, sum = 0;
    if (thread < 128) {
#pragma unroll 4
        for (int chunk = 0; chunk < chunks; ++chunk) {
            const int count = work.places[chunk * 128 + thread];
            work.places[chunk * 128 + thread] = static_cast<uint16_t>(mine);
            mine += count;
        }
        // Low half: pairs before this expert; high half: segments before it.
        const uint32_t both = mine | (mine + group - 1) / group << 16;
        sum = both;
#pragma unroll
        for (int distance = 1; distance < 32; distance <<= 1) {
            const uint32_t other = __shfl_up_sync(~0u, sum, distance);
            if (lane >= distance) sum += other;
        }
        if (lane == 31) work.totals[warp] = sum;
        sum -= both;
    }
    __syncthreads();
    if (mine > 0) {
        for (int i = 0; i < warp; ++i) sum += work.totals[i];
        const int first = sum & 0xffff;
        work.firsts[thread] = static_cast<uint16_t>(first);
        Segment* segment = work.segments + (sum >> 16);
#pragma unroll 1
        for (int done = 0; done < static_cast<int>(mine); done += group, ++segment)
            *segment = {static_cast<uint16_t>(thread), static_cast<uint16_t>(first + done),
                        static_cast<uint16_t>(min(static_cast<int>(mine) - done, group)), 0};
    }
    __syncthreads();
    auto place = [&](int pair, int expert, uint32_t equal) {
        if (expert < 128) work.pairs[work.firsts[expert] + work.places[pair / 32 * 128 + expert] + __popc(equal & before)] = static_cast<uint16_t>(pair);
    };
    place(thread, own, same);
#pragma unroll 1
    for (int base = warp * 32 + step; base < chunks * 32; base += step) {
        const int expert = expert_of(base + lane);
        place(base + lane, expert, __match_any_sync(~0u, expert));
    }
    __syncthreads();
    return (work.totals[0] + work.totals[1] + work.totals[2] + work.totals[3]) >> 16;
}
