// Cosine and sine of every row's angles, once a step: products and layers that rotate read them.
#include "common/dense.cuh"

struct Params {
    const int* position;    // [rows]
    const int* live;        // rows to do
    const float* inv_freq;  // [pairs]
    float2* turns;          // [rows, pairs]: cosine and sine, times mscale, in the order of `turn_place`
    float mscale;
    int rows;  // most live rows
    int pairs;  // multiple of 8
};

constexpr int THREADS = 256;

KERNEL __launch_bounds__(THREADS) rope_table(const __grid_constant__ Params p) {
    pdl_wait();
    pdl_launch();
    const int at = blockIdx.x * THREADS + threadIdx.x, row = at / p.pairs, pair = at - row * p.pairs;
    if (row >= min(*p.live, p.rows)) return;
    // The angle is rounded to f32 as in the reference; turns are reduced in f64, so that large ones lose nothing.
    const double turns = __dmul_rn(__fmul_rn(static_cast<float>(p.position[row]), p.inv_freq[pair]), 0.15915494309189533577);
    float sine, cosine;
    sincospif(static_cast<float>(2 * (turns - rint(turns))), &sine, &cosine);
    p.turns[row * p.pairs + turn_place(pair)] = make_float2(cosine * p.mscale, sine * p.mscale);
}
