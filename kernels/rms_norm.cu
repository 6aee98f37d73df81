// RMSNorm of the residual stream into a bf16 operand in panel layout: y = x * rsqrt(mean(x^2) + eps) * w, in float32 until the
// last rounding. One block a row.
#include "common/norm.cuh"

struct Params {
    const float* x;       // [rows, cols]
    const float* weight;  // [cols]
    void* y;              // panels of [capacity, cols], bf16
    const int* live;      // rows to do; later ones are left alone
    const int* index;     // [rows]: the row of x that row r of y takes, -1 for a row of zeros; null is r itself
    int cols;             // multiple of 64, at most NORM_CHUNKS * NORM_THREADS * 8
    int capacity;         // multiple of 8
    float eps;
};

KERNEL __launch_bounds__(NORM_THREADS) rms_norm(const __grid_constant__ Params p) {
    norm_row(p, [&](int row, int col, const float (&v)[8]) {
        *reinterpret_cast<uint4*>(static_cast<char*>(p.y) + panel_chunk(row, col, p.capacity)) = pack8(v);
    });
}
