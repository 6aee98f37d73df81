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
    const int thread = threadIdx.x, lane = thread % 32, words = (capacity + 3) / 4;
    uint8_t* bytes = reinterpret_cast<uint8_t*>(work.chosen);
#pragma unroll 1
    for (int i = thread; i < words * 4; i += blockDim.x) {
        // As above.
        const unsigned expert = min(static_cast<unsigned>(choice[min(i, capacity - 1)]), static_cast<unsigned>(experts - 1));
        bytes[i] = i < live ? static_cast<uint8_t>(expert) : 0xff;
    }
    __syncthreads();
    uint32_t mine = 0, sum = 0;
    if (thread < 128) {
#pragma unroll 4
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
#pragma unroll 4
        for (int i = 0; i < live; ++i)
            if (bytes[i] == thread) work.pairs[at++] = static_cast<uint16_t>(i);
        Segment* segment = work.segments + (sum >> 16);
#pragma unroll 1
        for (int done = 0; done < static_cast<int>(mine); done += group, ++segment)
            *segment = {static_cast<uint16_t>(thread), static_cast<uint16_t>(first + done),
                        static_cast<uint16_t>(min(static_cast<int>(mine) - done, group)), 0};
    }
    __syncthreads();
    return (work.totals[0] + work.totals[1] + work.totals[2] + work.totals[3]) >> 16;
}
