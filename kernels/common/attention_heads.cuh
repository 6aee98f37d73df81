// From the rows of a QKV product to heads: the norm of query and key heads and their rotation. Every kernel that does it gives the same bits.
//
// DIM / 4 lanes next to one another have a head. Lane l has elements 4l.. of the row, two rotary pairs: dimensions (2l, 2l + DIM / 2) and
// (2l + 1, 2l + 1 + DIM / 2). Once rotated it has dimensions (2l, 2l + 1) and (2l + DIM / 2, 2l + 1 + DIM / 2).
#pragma once
#include "common/common.cuh"

// Weights of the heads' norms, [DIM] in natural order, shared by all heads of a kind; null: there are none.
struct HeadNorms {
    const float* q;
    const float* k;
    float eps;
};

// A lane's weights, in the order of its elements.
template <int DIM> DEVICE float4 norm_weights(const float* weights, int lane) {
    const float2 low = __ldg(reinterpret_cast<const float2*>(weights) + lane), high = __ldg(reinterpret_cast<const float2*>(weights + DIM / 2) + lane);
    return make_float4(low.x, high.x, low.y, high.y);
}

// The head over the root of its mean square, times the weights. All lanes of a warp take part.
template <int DIM> DEVICE float4 norm_head(float4 v, float4 weight, float eps) {
    float sum = __fmaf_rn(v.w, v.w, __fmaf_rn(v.z, v.z, __fmaf_rn(v.y, v.y, __fmul_rn(v.x, v.x))));
#pragma unroll
    for (int step = 1; step < DIM / 4; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
    const float factor = rsqrtf(__fmaf_rn(sum, 1.0f / DIM, eps));
    return make_float4(__fmul_rn(__fmul_rn(v.x, factor), weight.x), __fmul_rn(__fmul_rn(v.y, factor), weight.y), __fmul_rn(__fmul_rn(v.z, factor), weight.z),
                       __fmul_rn(__fmul_rn(v.w, factor), weight.w));
}

// Cosine and sine of a pair, times `mscale`. The angle is rounded to f32 as in the reference; turns are reduced in f64, so that large ones
// lose nothing.
DEVICE float2 turn_of(int position, float inv_freq, float mscale) {
    const double turns = __dmul_rn(__fmul_rn(static_cast<float>(position), inv_freq), 0.15915494309189533577);
    float sine, cosine;
    sincospif(static_cast<float>(2 * (turns - rint(turns))), &sine, &cosine);
    return make_float2(cosine * mscale, sine * mscale);
}

// Rotates a lane's pairs by the turns of pairs 2l and 2l + 1.
DEVICE float4 rotate(float4 v, float2 first, float2 second) {
    return make_float4(__fmaf_rn(v.x, first.x, -__fmul_rn(v.y, first.y)), __fmaf_rn(v.z, second.x, -__fmul_rn(v.w, second.y)),
                       __fmaf_rn(v.y, first.x, __fmul_rn(v.x, first.y)), __fmaf_rn(v.w, second.x, __fmul_rn(v.z, second.y)));
}
