// Cosine and sine of every row's angles, once a step: products and layers that rotate read them.
#include "common/common.cuh"

struct Params {
    const int* position;    // [rows]
    const int* live;        // rows to do
    const float* inv_freq;  // [pairs]
    float2* turns;          // [rows, pairs]: cosine and sine, times mscale
    float mscale;
    int rows;  // most live rows
    int pairs;
};

constexpr int THREADS = 256;

KERNEL __launch_bounds__(THREADS) rope_table(const __grid_constant__ Params p) {
    pdl_wait();
    pdl_launch();
    const int at = blockIdx.x * THREADS + threadIdx.x, row = at / p.pairs, pair = at - row * p.pairs;
    if (row >= min(*p.live, p.rows)) return;
    // The angle is rounded to f32 as in the reference; turns are reduced in f64, so that large ones lose nothing.
    const float angle = __fmul_rn(static_cast<float>(p.position[row]), p.inv_freq[pair]);
    const double half_turns = static_cast<double>(angle) * 0.31830988618379067154;
    float sine, cosine;
    sincospif(static_cast<float>(half_turns - 2 * rint(half_turns * 0.5)), &sine, &cosine);
    p.turns[at] = make_float2(cosine * p.mscale, sine * p.mscale);
}
