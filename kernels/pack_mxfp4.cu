// Experts from the checkpoint's layout to MXFP4 strips (README.md), at load. Rows and columns beyond the source become code 0.
// A thread makes one lane's 16 bytes of a tile.
#include "common/mxfp4.cuh"

struct Params {
    const uint8_t* codes;   // [experts * rows, cols / 2]: two codes a byte, the even column low
    const uint8_t* scales;  // [experts * rows, cols / 32]
    char* strips;           // [experts][count] strips of `tiles` tiles
    int experts;
    int rows;               // of an expert, in the source
    int cols;               // multiple of 32, in the source
    int count;              // strips of an expert
    int tiles;
    int gate_up;            // whether row 2i is gate i and row 2i + 1 is up i
};

constexpr int THREADS = 256;

DEVICE uint32_t pack_word(const uint8_t* row, int col, int cols) {
    uint32_t word = 0;
    if (row == nullptr || col >= cols) return 0;
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
        const uint32_t byte = row[(col + pair * 8) / 2];
        word |= fp4_place(byte & 15, pair) | fp4_place(byte >> 4, pair) << 16;
    }
    return word;
}

KERNEL __launch_bounds__(THREADS) pack_mxfp4(const __grid_constant__ Params p) {
    pdl_wait();
    pdl_launch();
    const int64_t tile = static_cast<int64_t>(blockIdx.x) * (THREADS / 32) + threadIdx.x / 32;
    if (tile >= static_cast<int64_t>(p.experts) * p.count * p.tiles) return;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int64_t strip = tile / p.tiles;
    const int at = static_cast<int>(tile % p.tiles), within = static_cast<int>(strip % p.count);
    const int64_t expert = strip / p.count;
    const uint8_t *codes[2], *scales[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int row = p.gate_up ? (within * 8 + g) * 2 + i : within * 16 + g + i * 8;
        const int64_t source = expert * p.rows + row;
        codes[i] = row < p.rows ? p.codes + source * (p.cols / 2) : nullptr;
        scales[i] = row < p.rows ? p.scales + source * (p.cols / 32) : nullptr;
    }
    const int col = at * TILE_COLS + 2 * t;
    char* const to = p.strips + strip * strip_bytes(p.tiles);
    *reinterpret_cast<uint4*>(to + at * TILE_CODES + lane * 16) =
        make_uint4(pack_word(codes[0], col, p.cols), pack_word(codes[1], col, p.cols), pack_word(codes[0], col + 32, p.cols),
                   pack_word(codes[1], col + 32, p.cols));
    if (t != 0) return;
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int block = at * 2 + i / 2;
        const uint8_t* row = scales[i % 2];
        const uint32_t scale = row != nullptr && block * 32 < p.cols ? row[block] : 0;
        word |= scale << (8 * i);
    }
    *reinterpret_cast<uint32_t*>(to + p.tiles * TILE_CODES + at * TILE_SCALES + g * 4) = word;
}
