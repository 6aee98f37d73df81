// RMSNorm, the fused QKV product, bias and rotary embedding of at most 16 token rows: queries as bf16 [rows, q_width], keys and
// values as float32 [rows, 2 * kv_width]. Rows of the matrix are permuted (README.md, QKV rows), so that the two dimensions that
// rotate against each other are one pair of a lane's sums. Heads have 64 dimensions.
#include "common/gemv_split.cuh"

struct Params {
    gemv::Product m;       // outputs = q_width + 2 * kv_width
    const float* x;        // [rows, cols]
    const float* norm;     // [cols]
    const float* bias;     // [outputs], permuted as the matrix
    const int* positions;  // [rows]
    const float* inv_freq; // [rope_pairs]
    __nv_bfloat16* q;
    float* kv;  // of each row keys, rotated, then values
    int q_width, kv_width;
    int rope_pairs;   // at most 32; later pairs of a head are padding
    float mean;       // one over the columns that the mean of squares is over
    float eps, mscale;
};

struct Rotated {
    static constexpr bool WALKS = false;
    const Params& p;
    struct Early {
        float2 bias;
        int position;  // as it is read: what needs it in registers would wait for it
        float cosine, sine;  // a frequency until `refine`
    };

    METHOD Early load(int row, int column) const {
        Early e;
        e.bias = __ldg(reinterpret_cast<const float2*>(p.bias + column));
        const int pair = column % 64 / 2;
        const bool turns = column < p.q_width + p.kv_width && pair < p.rope_pairs;
        e.position = turns ? __ldcg(p.positions + row) : 0;
        e.cosine = 0;
        e.sine = turns ? __ldg(p.inv_freq + pair) : 0.0f;
        return e;
    }

    // The angle is rounded to float32 as in the reference; it reaches 131072 radians, so it is reduced in float64.
    METHOD void refine(Early& e) const {
        const double turns = __dmul_rn(__fmul_rn(static_cast<float>(e.position), e.sine), 0.15915494309189533577);
        sincospif(static_cast<float>(2 * (turns - rint(turns))), &e.sine, &e.cosine);
        e.cosine *= p.mscale;
        e.sine *= p.mscale;
    }

    METHOD void store(int row, int column, float2 y, const Early& e) const {
        const float a = y.x + e.bias.x, b = y.y + e.bias.y;
        float* kv = p.kv + static_cast<size_t>(row) * 2 * p.kv_width;
        if (column >= p.q_width + p.kv_width) {
            *reinterpret_cast<float2*>(kv + column - p.q_width) = make_float2(a, b);
            return;
        }
        // As one instruction or two, but the same in every kernel: a row's bits do not depend on how many there are.
        const float low = fmaf(a, e.cosine, -__fmul_rn(b, e.sine)), high = fmaf(b, e.cosine, __fmul_rn(a, e.sine));
        const int at = column / 64 * 64 + column % 64 / 2;
        if (column < p.q_width) {
            __nv_bfloat16* q = p.q + static_cast<size_t>(row) * p.q_width + at;
            q[0] = __float2bfloat16(low);
            q[32] = __float2bfloat16(high);
        } else {
            kv[at - p.q_width] = low;
            kv[at - p.q_width + 32] = high;
        }
    }
};

template <int TILES, int STAGES, int ROWS> DEVICE void gemv_qkv(const Params& p) {
    const gemv::NormedRows rows{p.x, p.norm, nullptr, 0, p.m.panels * 64, {}};
    gemv::run<TILES, STAGES, ROWS>(p.m, rows, Rotated{p}, p.mean, p.eps);
}

#define KERNEL_OF(TILES, STAGES, ROWS)                                                                                         \
    KERNEL __launch_bounds__(gemv::max_threads(ROWS), 1) gemv_qkv_##TILES##x##STAGES##_##ROWS(const __grid_constant__ Params p) { \
        gemv_qkv<TILES, STAGES, ROWS>(p);                                                                                      \
    }
#define VARIANT(TILES, STAGES)  \
    KERNEL_OF(TILES, STAGES, 1) \
    KERNEL_OF(TILES, STAGES, 16)
VARIANT(5, 2)
VARIANT(2, 2)
VARIANT(1, 2)

#ifdef HOPPER
#define SPLIT_BODY(TILES, STAGES, ROWS)                                                  \
    const gemv::NormedRows rows{p.x, p.norm, nullptr, 0, p.m.panels * 64, {}};           \
    gemv::run_split<TILES, STAGES, ROWS>(p.m, rows, Rotated{p}, p.mean, p.eps)
#define CLUSTER __cluster_dims__(8, 1, 1)
#else
#define SPLIT_BODY(TILES, STAGES, ROWS)
#define CLUSTER
#endif
#define SPLIT_KERNEL(TILES, STAGES, ROWS)                                                                                      \
    KERNEL CLUSTER __launch_bounds__(256, 2) gemv_qkv_split_##TILES##x##STAGES##_##ROWS(const __grid_constant__ Params p) { \
        SPLIT_BODY(TILES, STAGES, ROWS);                                                                                       \
    }
SPLIT_KERNEL(5, 2, 8)
SPLIT_KERNEL(5, 2, 16)
