// RMSNorm and the LM head for at most 16 rows of logits, float32 [rows, stride]. One block an SM walks through the vocabulary,
// all blocks side by side, so that few memory pages are open at a time.
#include "common/gemv.cuh"

struct Params {
    gemv::Product m;     // outputs = vocab rounded up to 8
    const float* x;      // [x_rows, cols]
    const float* norm;   // [cols]
    const int* index;    // [rows]: the row of x that a row of logits takes; null is the same row
    float* logits;       // [rows, stride]
    unsigned sources;    // rows of x
    int vocab, stride;   // stride is even
    float mean;          // one over the columns that the mean of squares is over
    float eps;
};

struct Logits {
    static constexpr bool WALKS = true;
    const Params& p;
    struct Early {};
    METHOD Early load(int, int) const { return {}; }
    METHOD void refine(Early&) const {}
    METHOD void store(int row, int column, float2 y, const Early&) const {
        float* at = p.logits + static_cast<size_t>(row) * p.stride + column;
        if (column + 1 < p.vocab)
            *reinterpret_cast<float2*>(at) = y;
        else if (column < p.vocab)
            *at = y.x;
    }
};

template <int TILES, int STAGES, int ROWS> DEVICE void gemv_head(const Params& p) {
    const gemv::NormedRows rows{p.x, p.norm, p.index, p.sources, p.m.panels * 64, {}};
    gemv::run<TILES, STAGES, ROWS>(p.m, rows, Logits{p}, p.mean, p.eps);
}

#define KERNEL_OF(TILES, STAGES, ROWS)                                                                                         \
    KERNEL __launch_bounds__(512, 1) gemv_head_##TILES##x##STAGES##_##ROWS(const __grid_constant__ Params p) { \
        gemv_head<TILES, STAGES, ROWS>(p);                                                                                      \
    }
#define VARIANT(TILES, STAGES)  \
    KERNEL_OF(TILES, STAGES, 1) \
    KERNEL_OF(TILES, STAGES, 16)
VARIANT(5, 3)
VARIANT(5, 2)
VARIANT(2, 2)
VARIANT(1, 2)
