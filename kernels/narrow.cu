// Drops the rows of a step that no logits need: of `x`, of the queries, and of what attention reads of each row. What is left lies at
// the front, one row a sequence, so that the rest of the step is that of a decode step.
//
// In place: row l of what is kept comes from a row that is not before l, and these rows ascend. A thread that takes its columns of one row
// after another therefore never overwrites what it still has to read, and no other thread has those columns.
#include "common/common.cuh"

struct Params {
    uint4* x;             // [rows, x_pieces]
    uint4* q;             // [rows, q_pieces]
    const int* row;       // [kept]: rows that are kept, ascending
    const int* sequence;  // [kept]: their sequences, ascending
    const int* kept;      // how many
    int* position;        // [rows]
    int* at;              // [sequences]
    int* first;           // [sequences]
    int* rows;            // becomes `kept`
    int* decode;          // becomes `kept`
    int x_pieces, q_pieces;  // of 16 bytes
};

constexpr int AHEAD = 8;  // rows on their way

template <class T> DEVICE void keep(T* column, int stride, const int* source, int kept) {
    for (int row = 0; row < kept; row += AHEAD) {
        T values[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i)
            if (row + i < kept) values[i] = column[static_cast<size_t>(source[row + i]) * stride];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i)
            if (row + i < kept) column[static_cast<size_t>(row + i) * stride] = values[i];
    }
}

KERNEL __launch_bounds__(64) narrow(const __grid_constant__ Params p) {
    pdl_wait();
    pdl_launch();
    const int kept = *p.kept;
    int at = blockIdx.x * 64 + threadIdx.x;
    if (at < p.x_pieces) return keep(p.x + at, p.x_pieces, p.row, kept);
    at -= p.x_pieces;
    if (at < p.q_pieces) return keep(p.q + at, p.q_pieces, p.row, kept);
    at -= p.q_pieces;
    if (at == 0) keep(p.position, 1, p.row, kept);
    if (at == 1) keep(p.at, 1, p.sequence, kept);
    if (at == 2) keep(p.first, 1, p.sequence, kept);
    if (at == 3) *p.rows = *p.decode = kept;
}
