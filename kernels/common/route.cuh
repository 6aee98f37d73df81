// The router's parameters, the choice among logits, and arithmetic (route.cu).
#pragma once
#include "common/common.cuh"

struct Params {
    const float* x;         // [rows, hidden]
    const float* norm;      // [hidden]
    const uint16_t* router; // bf16 [experts, hidden]
    const float* bias;      // [experts]
    const int* live;        // rows to do; later ones are left alone
    int* choice;            // [rows, top_k]
    float* weight;          // [rows, top_k]
    __half* h;              // [rows, hidden] in fragment order (README.md), of `route_spread` and `route_one`
    float* scale;           // [rows]: 1 / sqrt(mean(x^2) + eps), of `route_many` and `route_split`
    int rows;               // of x, at least the live ones
    int hidden;             // multiple of 64
    int experts;            // at most 128
    int top_k;
    float eps;
};

constexpr int MOST_EXPERTS = 128;

// The two numbers of a bf16 pair.
DEVICE float low(uint32_t pair) { return __uint_as_float(pair << 16); }
DEVICE float high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
DEVICE float4 times(const float4& a, const float4& b) { return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w); }
DEVICE float4 times(const float4& a, float b) { return make_float4(a.x * b, a.y * b, a.z * b, a.w * b); }
DEVICE float squares(float sum, const float4& a) {
    return fmaf(a.x, a.x, fmaf(a.y, a.y, fmaf(a.z, a.z, fmaf(a.w, a.w, sum))));
}

// Greater for a greater float, greatest for NaN; -0 is below +0.
DEVICE uint32_t order(float value) {
    const uint32_t bits = __float_as_uint(value);
    if (isnan(value)) return ~0u;
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// One warp: the greatest of `logits`, and their softmax. EACH * 32 experts at most.
template <int EACH> DEVICE void choose_among(const Params& p, const float* logits, int row) {
    const int lane = threadIdx.x % 32;
    uint32_t keys[EACH];  // 0, below any float's, where there is none or it is taken
#pragma unroll
    for (int i = 0; i < EACH; ++i) keys[i] = i * 32 + lane < p.experts ? order(logits[i * 32 + lane]) : 0;
    int mine = 0;
    for (int slot = 0; slot < p.top_k; ++slot) {
        uint32_t best = keys[0], at = EACH * 32;
#pragma unroll
        for (int i = 1; i < EACH; ++i) best = max(best, keys[i]);
        best = __reduce_max_sync(~0u, best);
#pragma unroll
        for (int i = EACH - 1; i >= 0; --i)
            if (keys[i] == best) at = i * 32 + lane;
        at = __reduce_min_sync(~0u, at);
#pragma unroll
        for (int i = 0; i < EACH; ++i)
            if (at == i * 32 + lane) keys[i] = 0;
        if (slot == lane) mine = at;
    }
    const float logit = logits[mine], first = __shfl_sync(~0u, logit, 0), power = expf(logit - first);
    float sum = 0;
    for (int slot = 0; slot < p.top_k; ++slot) sum += __shfl_sync(~0u, power, slot);
    if (lane >= p.top_k) return;
    p.choice[row * p.top_k + lane] = mine;
    p.weight[row * p.top_k + lane] = power / sum;
}

DEVICE void choose(const Params& p, const float* logits, int row) {
    if (p.experts <= 32) choose_among<1>(p, logits, row);
    else choose_among<MOST_EXPERTS / 32>(p, logits, row);
}
