// The output projection of at most 16 token rows: x += W heads + bias, x float32. A block owns its columns of x: no atomics.
#include "common/gemv_split.cuh"

struct Params {
    gemv::Product m;   // outputs = cols of x, cols = q_width
    const void* heads; // bf16 [rows, q_width]
    const float* bias; // [outputs]
    float* x;          // [rows, outputs]
};

struct Residual {
    static constexpr bool WALKS = false;
    const Params& p;
    struct Early {
        float2 bias, x;
    };
    METHOD float2* at(int row, int column) const {
        return reinterpret_cast<float2*>(p.x + static_cast<size_t>(row) * p.m.outputs + column);
    }
    METHOD Early load(int row, int column) const {
        return {__ldg(reinterpret_cast<const float2*>(p.bias + column)), __ldcg(at(row, column))};
    }
    METHOD void refine(Early&) const {}
    METHOD void store(int row, int column, float2 y, const Early& e) const {
        *at(row, column) = make_float2(e.x.x + (y.x + e.bias.x), e.x.y + (y.y + e.bias.y));
    }
};

template <int TILES, int STAGES, int ROWS> DEVICE void gemv_out(const Params& p) {
    const gemv::PlainRows rows{p.heads, p.m.panels * 64};
    gemv::run<TILES, STAGES, ROWS>(p.m, rows, Residual{p}, 1, 0);
}

#define KERNEL_OF(TILES, STAGES, ROWS)                                                                                         \
    KERNEL __launch_bounds__(gemv::max_threads(ROWS), 1) gemv_out_##TILES##x##STAGES##_##ROWS(const __grid_constant__ Params p) { \
        gemv_out<TILES, STAGES, ROWS>(p);                                                                                      \
    }
#define VARIANT(TILES, STAGES)  \
    KERNEL_OF(TILES, STAGES, 1) \
    KERNEL_OF(TILES, STAGES, 16)
VARIANT(3, 4)
VARIANT(3, 2)
VARIANT(1, 2)

#ifdef HOPPER
#define SPLIT_BODY(TILES, STAGES, ROWS)                                                  \
    const gemv::PlainRows rows{p.heads, p.m.panels * 64};                                \
    gemv::run_split<TILES, STAGES, ROWS>(p.m, rows, Residual{p}, 1, 0)
#define CLUSTER __cluster_dims__(8, 1, 1)
#else
#define SPLIT_BODY(TILES, STAGES, ROWS)
#define CLUSTER
#endif
#define SPLIT_KERNEL(TILES, STAGES, ROWS)                                                                                      \
    KERNEL CLUSTER __launch_bounds__(256, 2) gemv_out_split_##TILES##x##STAGES##_##ROWS(const __grid_constant__ Params p) { \
        SPLIT_BODY(TILES, STAGES, ROWS);                                                                                       \
    }
SPLIT_KERNEL(3, 3, 8)
SPLIT_KERNEL(3, 3, 16)
