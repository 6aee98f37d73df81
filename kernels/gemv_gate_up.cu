// RMSNorm, gate and up projection and SwiGLU of at most 16 token rows: y = silu(gate) * up, bf16 [rows, inner]. Of every 16 rows of the matrix
// the first eight are gates, the others the ups. One block an SM walks through the matrix, all blocks side by side.
#include "common/dense.cuh"
#include "common/gemv.cuh"

struct Params {
    gemv::Product m;    // outputs = 2 * inner
    const float* x;     // [rows, cols]
    const float* norm;  // [cols]
    __nv_bfloat16* y;   // [rows, inner]
    int inner;          // multiple of 8
    float mean;         // one over the columns that the mean of squares is over
    float eps;
};

struct Gated {
    static constexpr bool WALKS = true, GATED = true;
    const Params& p;
    struct Early {};
    METHOD Early load(int, int) const { return {}; }
    METHOD void refine(Early&) const {}
    METHOD void store(int row, int column, float2 gate, float2 up) const {
        *reinterpret_cast<uint32_t*>(p.y + static_cast<size_t>(row) * p.inner + column) =
            pack2<__nv_bfloat16>(silu_times(gate.x, up.x), silu_times(gate.y, up.y));
    }
};

template <int TILES, int STAGES, int ROWS> DEVICE void gemv_gate_up(const Params& p) {
    const gemv::NormedRows rows{p.x, p.norm, nullptr, 0, p.m.panels * 64, {}};
    gemv::run<TILES, STAGES, ROWS>(p.m, rows, Gated{p}, p.mean, p.eps);
}

#define KERNEL_OF(TILES, STAGES, ROWS)                                                                             \
    KERNEL __launch_bounds__(512, 1) gemv_gate_up_##TILES##x##STAGES##_##ROWS(const __grid_constant__ Params p) { \
        gemv_gate_up<TILES, STAGES, ROWS>(p);                                                                      \
    }
#define VARIANT(TILES, STAGES)  \
    KERNEL_OF(TILES, STAGES, 1) \
    KERNEL_OF(TILES, STAGES, 16)
VARIANT(4, 3)
VARIANT(4, 2)
VARIANT(2, 2)
