// Packs a row-major matrix, as a checkpoint stores it, into rows `first .. first + count` of a bf16 matrix in panel layout, with
// rows and columns permuted and padded as asked. Runs while weights load. It does not let the next kernel start early: kernels read
// weights before they wait.
#include "common/common.cuh"

struct Params {
    const void* source;    // [rows, cols], bf16 or float32
    void* panels;          // of [capacity, padded]
    const int* row_map;    // [count]: source row, or -1 for zeros; null is the same row, zeros beyond `rows`
    const int* column_map; // [padded]: source column, or -1 for zeros; null is the same column, zeros beyond `cols`
    int rows, cols;
    int first, count;
    int capacity;  // multiple of 8
    int padded;    // multiple of 64
};

constexpr int THREADS = 256;

template <class T> DEVICE void pack_panels(const Params& p) {
    pdl_wait();
    const long long chunks = static_cast<long long>(p.padded / 64) * p.count * 8;
    const long long step = static_cast<long long>(gridDim.x) * THREADS;
    const T* source = static_cast<const T*>(p.source);
    for (long long at = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x; at < chunks; at += step) {
        const int place = at % 8, line = at / 8 % p.count, panel = static_cast<int>(at / 8 / p.count);
        const int row = p.first + line, column = panel * 64 + (place ^ (row & 7)) * 8;
        const int from = p.row_map ? p.row_map[line] : line;
        float v[8];
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            const int c = p.column_map ? p.column_map[column + k] : column + k;
            const bool real = from >= 0 && from < p.rows && c >= 0 && c < p.cols;
            v[k] = real ? static_cast<float>(source[static_cast<size_t>(from) * p.cols + c]) : 0.0f;
        }
        const uint4 packed = make_uint4(pack2<__nv_bfloat16>(v[0], v[1]), pack2<__nv_bfloat16>(v[2], v[3]),
                                        pack2<__nv_bfloat16>(v[4], v[5]), pack2<__nv_bfloat16>(v[6], v[7]));
        *reinterpret_cast<uint4*>(static_cast<char*>(p.panels) + panel_chunk(row, column, p.capacity)) = packed;
    }
}

KERNEL __launch_bounds__(THREADS) pack_panels_bf16(const __grid_constant__ Params p) { pack_panels<__nv_bfloat16>(p); }
KERNEL __launch_bounds__(THREADS) pack_panels_f32(const __grid_constant__ Params p) { pack_panels<float>(p); }
