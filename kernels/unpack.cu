// A step's description: read from pinned host memory, where its parts lie one after the other, into the arrays of fixed address
// that recorded launches read. Replaces a copy: the first kernel of a step would wait for the copy engine, this is that kernel.
#include "common/common.cuh"

constexpr int PARTS = 32;

struct Params {
    const uint32_t* from;  // host, words
    uint32_t* to;          // device, words
    int count;
    int at[PARTS];   // where a part goes, in words of `to`
    int len[PARTS];  // words
};

KERNEL __launch_bounds__(256) unpack(const __grid_constant__ Params p) {
    pdl_wait();
    pdl_launch();
    const int first = blockIdx.x * blockDim.x + threadIdx.x, stride = gridDim.x * blockDim.x;
    const uint32_t* from = p.from;
    for (int part = 0; part < p.count; ++part) {
        for (int i = first; i < p.len[part]; i += stride) p.to[p.at[part] + i] = from[i];
        from += p.len[part];
    }
}
