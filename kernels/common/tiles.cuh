// How an expert's sorted rows are cut into tiles: for the kernels that sort (moe_sort, moe_scatter) and those that multiply (moe_gemm).
#pragma once
#include "common/common.cuh"

// The tiles of `rows` rows (a multiple of 8): whole ones of `height`, but the last two share evenly what they have, as one of few
// rows would cost little less.
struct Tiles {
    int count, height, half, last;  // of the second to last and the last: rows

    __device__ __forceinline__ Tiles(int rows, int height) : height(height) {
        count = (rows + height - 1) / height;
        const int rest = rows - max(count - 2, 0) * height;
        half = count > 1 ? (rest + 15) / 16 * 8 : 0, last = rest - half;
    }
    __device__ __forceinline__ int rows(int tile) const { return tile + 1 == count ? last : tile + 2 == count ? half : height; }
    __device__ __forceinline__ int first(int tile) const { return tile * height - (tile > 0 && tile + 1 == count ? height - half : 0); }
    // What a list of tiles has of one: expert, first sorted row, rows, 0.
    __device__ __forceinline__ int4 entry(int expert, int first_row, int tile) const {
        return make_int4(expert, first_row + first(tile), rows(tile), 0);
    }
};
