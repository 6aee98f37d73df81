// Copies what the rows of some sequences see of the cache into contiguous lines of bf16, for the attention of many rows:
// [kv_heads][panels of 64 elements][lines][64], keys and values apart, a line's 16-byte chunks at chunk ^ (line & 7). A sequence's lines start at a
// multiple of 128 and are padded with zeros to one. One block copies 128 lines of one head.
#include <type_traits>

#include "common/attention.cuh"

struct Params {
    Cache cache;
    Tables tables;
    Sequences sequences;
    char* keys;
    char* values;
    int lines;  // of a head, a multiple of 128
};

constexpr int THREADS = 256;

// Two e4m3 codes times their scale, rounded to bf16.
DEVICE uint32_t scaled(uint32_t codes, float scale) {
    const uint32_t bits = e4m3_to_half2(static_cast<uint16_t>(codes));
    const float2 v = __half22float2(*reinterpret_cast<const __half2*>(&bits));
    return pack2<__nv_bfloat16>(v.x * scale, v.y * scale);
}

template <bool FP8, int DIM> DEVICE void kv_gather(const Params& p) {
    pdl_wait();
    pdl_launch();
    const int line = blockIdx.x * LINES, head = blockIdx.y;
    const Place place = find_place<false>(p.sequences, p.cache.window, line);
    if (place.rows == 0) return;
    const int last = place.start + place.rows - 1;
    const int base = first_visible(place.start, p.cache.window) + line - place.line;  // position of this block's first line
    const int* table = table_of(p.tables, place.sequence);
    const int mask = (1 << p.cache.page_shift) - 1;
    // Eight elements a lane, so that lanes write all 128 bytes of a panel's line at once.
    using Piece = std::conditional_t<FP8, uint2, uint4>;
    constexpr int CHUNKS = DIM / 8, STEP = THREADS / CHUNKS, COUNT = LINES / STEP;
    const int chunk = threadIdx.x % CHUNKS;
    const size_t after = values_after_keys(p.cache);
    Piece data[2][COUNT];
    float scale[2][COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        const int position = base + i * STEP + threadIdx.x / CHUNKS;
        data[0][i] = data[1][i] = Piece{};
        scale[0][i] = scale[1][i] = 0;
        if (position <= last) {
            const size_t token = token_of(p.cache, table[position >> p.cache.page_shift], head, position & mask);
#pragma unroll
            for (int kind = 0; kind < 2; ++kind) {
                data[kind][i] = reinterpret_cast<const Piece*>(p.cache.data)[(token + kind * after) * CHUNKS + chunk];
                if constexpr (FP8) scale[kind][i] = p.cache.scales[token + kind * after];
            }
        }
    }
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        const int at = line + i * STEP + threadIdx.x / CHUNKS;
#pragma unroll
        for (int kind = 0; kind < 2; ++kind) {
            const int panel = head * (DIM / 64) + chunk / 8;
            char* to = (kind ? p.values : p.keys) + (static_cast<size_t>(panel) * p.lines + at) * 128;
            const Piece v = data[kind][i];
            uint4 out;
            if constexpr (FP8) {
                const float f = scale[kind][i];
                out = make_uint4(scaled(v.x, f), scaled(v.x >> 16, f), scaled(v.y, f), scaled(v.y >> 16, f));
            } else {
                out = v;
            }
            *reinterpret_cast<uint4*>(to + ((chunk % 8 ^ (at & 7)) << 4)) = out;
        }
    }
}

KERNEL __launch_bounds__(THREADS) kv_gather_e4m3(const __grid_constant__ Params p) { kv_gather<true, 64>(p); }
KERNEL __launch_bounds__(THREADS) kv_gather_bf16(const __grid_constant__ Params p) { kv_gather<false, 64>(p); }
KERNEL __launch_bounds__(THREADS) kv_gather_e4m3_128(const __grid_constant__ Params p) { kv_gather<true, 128>(p); }
KERNEL __launch_bounds__(THREADS) kv_gather_bf16_128(const __grid_constant__ Params p) { kv_gather<false, 128>(p); }
