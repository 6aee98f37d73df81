// Dense NVFP4 weights from the checkpoint's layout to strips (README.md), at load: some rows of them, permuted and padded as asked. Rows and
// columns beyond the source become zeros. A warp makes a tile. It does not let the next kernel start early: kernels read weights
// before they wait.
#include "common/nvfp4.cuh"

struct Params {
    const uint8_t* codes;   // [rows, cols / 2]: two codes a byte, the even column low
    const uint8_t* scales;  // [rows, cols / 16]: e4m3
    const int* row_map;     // [count]: source row, or -1 for zeros; null is the same row, zeros beyond `rows`
    char* strips;           // the first strip to write
    int rows;               // of the source
    int cols;               // multiple of 16
    int count;              // rows to write, multiple of 16
    int tiles;              // of a strip
};

constexpr int THREADS = 256;

// Eight codes of a row from column `col` on, 2, 8, 2, 8 apart, and what a sign or zero of their two blocks' scales makes of them.
DEVICE uint32_t pack_word(const Params& p, int row, int col) {
    uint32_t pairs[4];
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
        const int at = col + pair * 8;
        pairs[pair] = 0;
        if (row < 0 || at >= p.cols) continue;
        const uint32_t byte = p.codes[static_cast<size_t>(row) * (p.cols / 2) + at / 2];
        const uint32_t scale = p.scales[static_cast<size_t>(row) * (p.cols / 16) + at / 16];
        if ((scale & 0x7f) == 0) continue;
        pairs[pair] = fp4_bits(byte & 15) | fp4_bits(byte >> 4) << 16;
        if (scale & 0x80) pairs[pair] ^= 0x80008000u;
    }
    return fp4_word(pairs);
}

KERNEL __launch_bounds__(THREADS) pack_nvfp4(const __grid_constant__ Params p) {
    pdl_wait();
    const int64_t tile = static_cast<int64_t>(blockIdx.x) * (THREADS / 32) + threadIdx.x / 32;
    if (tile >= static_cast<int64_t>(p.count / 16) * p.tiles) return;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int strip = static_cast<int>(tile / p.tiles), at = static_cast<int>(tile % p.tiles);
    int rows[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int place = strip * 16 + g + i * 8, row = p.row_map ? p.row_map[place] : place;
        rows[i] = row < p.rows ? row : -1;
    }
    const int col = at * NV_TILE_COLS + 2 * t;
    char* const to = p.strips + strip * nv_strip_bytes(p.tiles);
    *reinterpret_cast<uint4*>(to + at * NV_TILE_CODES + lane * 16) =
        make_uint4(pack_word(p, rows[0], col), pack_word(p, rows[1], col), pack_word(p, rows[0], col + 32), pack_word(p, rows[1], col + 32));
    // Lane t writes the bytes of block t: the first and third of a word's four, or the second and fourth.
    char* const scales = to + p.tiles * NV_TILE_CODES + at * NV_TILE_SCALES + g * 8;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int block = at * 4 + t;
        const bool real = rows[i] >= 0 && block * 16 < p.cols;
        const uint32_t scale = real ? p.scales[static_cast<size_t>(rows[i]) * (p.cols / 16) + block] : 0;
        scales[t / 2 * 4 + i * 2 + t % 2] = static_cast<char>(nv_scale_byte(scale));
    }
}
