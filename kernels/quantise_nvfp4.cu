// Inputs of products with NVFP4 weights, rounded to NVFP4 as hardware with FP4 products has them: of each 16 columns of a row
//   scale = e4m3(min(448, max |x| / (6 f))), code = e2m1(x / (scale f)), 0 where scale is 0,
// both to the nearest, ties to even, where f is the checkpoint's factor. What is written is code * scale, which has at most six significant
// bits and is exact in bf16 (2^-10 to 2688); the product's sums are multiplied by f once, at the end. A block with a NaN or an infinity becomes
// NaN, so that garbage stays visible.
//
// Nothing is decided by a rounded quotient: that only says between which two values the result lies, and one fused multiply-add, whose sign is
// exact, says on which side of their middle.
#include "common/norm.cuh"

constexpr int MOST_PARTS = 3;

struct Params {
    const float* x;       // of the norm: [rows, cols]
    const float* weight;  // [cols]
    void* y;              // bf16: panels of [capacity, parts * cols]; with capacity 0 row-major. Rounded in place where there is no norm
    const int* live;      // rows to do; later ones are left alone
    const int* index;     // as rms_norm.cu has it
    int cols;             // multiple of 64
    int capacity;         // multiple of 8, or 0
    int parts;            // factors: part i of a row of y is x rounded by factor i
    int scaled;           // whether code * scale * f is written
    float eps;
    float factors[MOST_PARTS];
};

// The nearest to v / (times * factor) of the values that have MANTISSA bits after the first, and as large a step below 2^LEAST as from there on;
// `quotient` is that within 2^-20 of itself. `times` has few bits: its product with the middle of two values is exact.
template <int MANTISSA, int LEAST> DEVICE float nearest(float quotient, float v, float times, float factor) {
    const uint32_t exponent = max(__float_as_uint(quotient) & 0x7f800000u, static_cast<uint32_t>(127 + LEAST) << 23);
    // Of a sum this large the last bit is a step.
    const float shift = __uint_as_float(exponent + ((23 - MANTISSA) << 23));
    const float moved = __fadd_rz(quotient, shift);
    const float below = moved - shift, half = __uint_as_float(exponent - ((MANTISSA + 1) << 23));
    const float over = fmaf(-((below + half) * times), factor, v);
    const bool odd = __float_as_uint(moved) & 1;
    return over > 0 || (over == 0 && odd) ? below + 2 * half : below;
}

// Rounds the eight values of a lane, which are half of a block; the lane beside it has the other half. Lanes of `mask` are here.
DEVICE void round_half(const float (&v)[8], float (&y)[8], uint32_t mask, float factor, bool scaled) {
    uint32_t peak_bits = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) peak_bits = max(peak_bits, __float_as_uint(v[i]) & 0x7fffffffu);
    peak_bits = max(peak_bits, __shfl_xor_sync(mask, peak_bits, 1));
    const float peak = __uint_as_float(peak_bits), largest = 448.0f;
    const float scale = fminf(nearest<3, -6>(fminf(__fdividef(peak, 6.0f * factor), largest), peak, 6.0f, factor), largest);
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(scale * factor));
    if (scale == 0) inverse = 0;
    const float unit = scaled ? scale * factor : scale;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const float size = fabsf(v[i]);
        const float code = fminf(nearest<1, 0>(fminf(size * inverse, 6.0f), size, scale, factor), 6.0f);
        y[i] = copysignf(peak_bits < 0x7f800000u ? code * unit : __uint_as_float(0x7fffffffu), v[i]);
    }
}

KERNEL __launch_bounds__(NORM_THREADS) quantise_nvfp4_normed(const __grid_constant__ Params p) {
    norm_row(p, [&](int row, int col, const float (&v)[8]) {
        // Of the warp's lanes the first ones have columns.
        const int lanes = p.cols / 8 - (col / 8 - static_cast<int>(threadIdx.x) % 32);
        const uint32_t mask = lanes < 32 ? (1u << lanes) - 1 : ~0u;
#pragma unroll 1
        for (int part = 0; part < p.parts; ++part) {
            float y[8];
            round_half(v, y, mask, p.factors[part], p.scaled);
            const int at = part * p.cols + col;
            const size_t plain = (static_cast<size_t>(row) * p.parts * p.cols + at) * 2;
            *reinterpret_cast<uint4*>(static_cast<char*>(p.y) + (p.capacity ? panel_chunk(row, at, p.capacity) : plain)) = pack8(y);
        }
    });
}

constexpr int THREADS = 256;

// In place. A block of columns is 32 bytes in line in panels too, where lines of one panel follow one another: blockIdx.y is a panel, or a row.
KERNEL __launch_bounds__(THREADS) quantise_nvfp4(const __grid_constant__ Params p) {
    pdl_wait();
    pdl_launch();
    const int chunks = p.capacity ? p.capacity * 8 : p.cols / 8, chunk = blockIdx.x * THREADS + threadIdx.x;
    const int row = p.capacity ? chunk / 8 : blockIdx.y;
    // Both lanes of a block are of one row.
    const bool mine = chunk < chunks && row < *p.live;
    uint4* const at = static_cast<uint4*>(p.y) + static_cast<size_t>(blockIdx.y) * chunks + chunk;
    const uint4 packed = mine ? *at : make_uint4(0, 0, 0, 0);
    const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
    float v[8], y[8];
#pragma unroll
    for (int i = 0; i < 4; ++i) v[2 * i] = __uint_as_float(words[i] << 16), v[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    round_half(v, y, ~0u, p.factors[0], p.scaled);
    if (mine) *at = pack8(y);
}
