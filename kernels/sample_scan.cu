// First half of sampling: adjusts the logits of each row in place (bias, penalties, bans, mask), checks them, and leaves for every
// part of 1,024 columns its greatest logit and, where asked for, its sums of weights. One warp a part, so a row's sums are made in
// the same order whatever else is in the batch. Reads the logits once.
#include "common/sample.cuh"

struct Params {
    const Line* table;   // [1 + rows]; line 0 is the header
    float* logits;       // [rows, stride]
    Partial* partials;   // [rows, parts]
    int vocab, stride, parts;
};

constexpr int THREADS = 256;

// Changes the logits that the row's list names in this part, as the CPU does, rounding for rounding. Flags of the values before.
DEVICE uint32_t adjust(const Line& line, const uint32_t* lists, float* row, int part, int parts) {
    const uint32_t* offsets = lists + line.lists;
    const Entry* entries = reinterpret_cast<const Entry*>(offsets + parts + 1);
    const uint32_t first = offsets[part], last = offsets[part + 1];
    uint32_t flags = 0;
    for (uint32_t at = first + (threadIdx.x & 31); at < last; at += 32) {
        const Entry entry = entries[at];
        float z = row[entry.id];
        if (!(z < __uint_as_float(0x7f800000))) flags |= TAINTED;
        if (z > minus_infinity()) flags |= FINITE;
        z = __fadd_rn(z, entry.bias);
        if (entry.marks & SEEN) z = z > 0 ? __fdiv_rn(z, line.repetition) : __fmul_rn(z, line.repetition);
        const uint32_t count = entry.marks & COUNT;
        if (count) z = __fsub_rn(z, __fadd_rn(__fmul_rn(static_cast<float>(count), line.frequency), line.presence));
        if (entry.marks & BANNED) z = minus_infinity();
        row[entry.id] = z;
    }
    __syncwarp();
    return flags;
}

// Takes the logits out of this part that the row's mask does not have. Flags of the values before. Neighbouring lanes have neighbouring
// columns, a step is one word of the mask.
DEVICE uint32_t apply_mask(const uint32_t* words, float* row, int part, int vocab) {
    const int lane = threadIdx.x & 31;
    const uint32_t own = words[part * (PART / 32) + lane];
    uint32_t flags = 0;
#pragma unroll 4
    for (int k = 0; k < PART / 32; ++k) {
        const uint32_t word = __shfl_sync(~0u, own, k);
        const int col = part * PART + k * 32 + lane;
        if (col >= vocab || (word >> lane & 1)) continue;
        const float z = row[col];
        if (!(z < __uint_as_float(0x7f800000))) flags |= TAINTED;
        if (z > minus_infinity()) flags |= FINITE;
        row[col] = minus_infinity();
    }
    __syncwarp();
    return flags;
}

// Sum of weights relative to `best`: fours in float32, the rest in float64. Reads the part again, from L1: a loop over registers would have to be
// unrolled, and fetching that code takes longer than the sum.
DEVICE double mass(const float* row, int part, int vocab, float best, float inverse, float inverse_rest) {
    double sum = 0;
#pragma unroll 1
    for (int j = 0; j < 8; ++j) {
        const float4 v = load_four(row, part * PART + part_column(j * 4, threadIdx.x & 31), vocab);
        const float a = weight(v.x, best, inverse, inverse_rest), b = weight(v.y, best, inverse, inverse_rest);
        const float c = weight(v.z, best, inverse, inverse_rest), d = weight(v.w, best, inverse, inverse_rest);
        sum += static_cast<double>((a + b) + (c + d));
    }
    return warp_sum(sum);
}

KERNEL __launch_bounds__(THREADS, 4) sample_scan(const __grid_constant__ Params p) {
    pdl_wait();
    pdl_launch();
    const Header& header = *reinterpret_cast<const Header*>(p.table);
    const int lane = threadIdx.x & 31;
    const int items = static_cast<int>(header.live) * p.parts;
    // Neighbouring parts go to different multiprocessors: one row is spread over all of them.
    for (int item = blockIdx.x + gridDim.x * (threadIdx.x >> 5); item < items; item += gridDim.x * (THREADS / 32)) {
        const int r = item / p.parts, part = item - r * p.parts;
        const Line& line = p.table[r + 1];
        float* row = p.logits + static_cast<size_t>(r) * p.stride;
        const uint32_t wants = line.flags;
        uint32_t flags = 0;
        if (wants & ADJUSTED) flags = adjust(line, header.lists, row, part, p.parts);
        if (wants & MASKED) flags |= apply_mask(header.lists + line.mask, row, part, p.vocab);
        float v[32];
        load_part(v, row, part, p.vocab);

        float best = minus_infinity();
        bool fine = true;
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            fine = fine && v[i] < __uint_as_float(0x7f800000);  // neither NaN nor +inf
            best = fmaxf(best, v[i]);
        }
        best = warp_max(best);
        uint32_t at = PART;
#pragma unroll
        for (int i = 31; i >= 0; --i) {
            if (v[i] == best) at = part_column(i, lane);
        }
        at = __reduce_min_sync(~0u, at);
        if (!fine) flags |= TAINTED;
        if (best > minus_infinity()) flags |= FINITE;
        flags = __reduce_or_sync(~0u, flags);

        Partial found = {best, part * PART + (at < PART ? at : 0), flags, 0, 0.0, 0.0};
        if (best > minus_infinity() && (wants & (DRAWN | LOGPROBS))) {
#pragma unroll 1
            for (uint32_t kind = DRAWN; kind <= LOGPROBS; kind += LOGPROBS - DRAWN) {
                if (!(wants & kind)) continue;
                const bool drawn = kind == DRAWN;
                const double sum = mass(row, part, p.vocab, best, drawn ? line.inverse : 1.0f, drawn ? line.inverse_rest : 0.0f);
                (drawn ? found.mass : found.plain) = sum;
            }
        }
        if (lane == 0) p.partials[static_cast<size_t>(r) * p.parts + part] = found;
    }
}
