// Rows of the embedding table as float32, padded with zeros to `cols`. One block a row.
#include "common/common.cuh"

struct Params {
    const __nv_bfloat16* table;  // [vocab, hidden], row-major or panels
    const int* tokens;           // [rows]
    const int* feed;             // [rows]: >= 0 names the element of `sampled` to take instead; null is none
    const int* sampled;
    const int* live;  // rows to do; later ones are left alone
    float* x;         // [rows, cols]
    int vocab, hidden, cols;
    int capacity;  // rows that panels are laid out for; 0: row-major
};

constexpr int THREADS = 384;

KERNEL __launch_bounds__(THREADS) embed(const __grid_constant__ Params p) {
    pdl_wait();
    pdl_launch();
    const int row = blockIdx.x;
    if (row >= __ldcg(p.live)) return;
    const int feed = p.feed ? __ldcg(p.feed + row) : -1;
    const int token = feed >= 0 ? __ldcg(p.sampled + feed) : __ldcg(p.tokens + row);
    // An id outside the table must not read outside it: such a row is zero.
    const bool known = static_cast<unsigned>(token) < static_cast<unsigned>(p.vocab);
    const int at = known ? token : 0;
    const __nv_bfloat16* from = p.table + static_cast<size_t>(at) * p.hidden;
    float* to = p.x + static_cast<size_t>(row) * p.cols;
    const int vectors = p.hidden % 8 == 0 && known ? p.hidden / 8 : 0;
    for (int i = threadIdx.x; i < vectors; i += THREADS) {
        const size_t line = static_cast<size_t>(i / 8) * p.capacity + at;
        const __nv_bfloat16* chunk = p.capacity ? p.table + line * 64 + ((i ^ at) & 7) * 8 : from + i * 8;
        const uint4 bits = load_streaming(chunk);
        const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
        float v[8];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            v[2 * k] = __uint_as_float(words[k] << 16);
            v[2 * k + 1] = __uint_as_float(words[k] & 0xffff0000u);
        }
        *reinterpret_cast<float4*>(to + i * 8) = make_float4(v[0], v[1], v[2], v[3]);
        *reinterpret_cast<float4*>(to + i * 8 + 4) = make_float4(v[4], v[5], v[6], v[7]);
    }
    for (int col = vectors * 8 + threadIdx.x; col < p.cols; col += THREADS)
        to[col] = known && col < p.hidden ? __bfloat162float(from[col]) : 0.0f;
}
