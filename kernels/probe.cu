// Reads memory once, as fast as it comes: what the device's memory gives, to hold other kernels against.
#include "common/common.cuh"

struct Params {
    const uint4* data;
    uint4* sink;           // never written, but the compiler does not know
    unsigned long long count;  // 16-byte words, a multiple of TILE
};

constexpr int THREADS = 512, UNROLL = 8, TILE = THREADS * UNROLL;

KERNEL __launch_bounds__(THREADS) probe_read(const __grid_constant__ Params p) {
    pdl_wait();
    pdl_launch();
    uint32_t seen = 0;
    for (unsigned long long at = blockIdx.x * static_cast<unsigned long long>(TILE); at < p.count;
         at += gridDim.x * static_cast<unsigned long long>(TILE)) {
        uint4 v[UNROLL];
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) v[i] = load_streaming(p.data + at + i * THREADS + threadIdx.x);
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) seen |= (v[i].x ^ v[i].y) + (v[i].z ^ v[i].w);
    }
    if (seen == 0x9e3779b9) p.sink[threadIdx.x] = make_uint4(seen, seen, seen, seen);
}

// Numbers without a pattern: some memories move repeated bits faster.
KERNEL __launch_bounds__(THREADS) probe_fill(const __grid_constant__ Params p) {
    pdl_wait();
    pdl_launch();
    uint4* data = const_cast<uint4*>(p.data);
    for (unsigned long long at = blockIdx.x * static_cast<unsigned long long>(THREADS) + threadIdx.x; at < p.count;
         at += gridDim.x * static_cast<unsigned long long>(THREADS)) {
        uint32_t x = static_cast<uint32_t>(at) * 0x9e3779b9u + static_cast<uint32_t>(at >> 32);
        x = (x ^ (x >> 16)) * 0x85ebca6bu;
        x = (x ^ (x >> 13)) * 0xc2b2ae35u;
        data[at] = make_uint4(x, x * 0x27d4eb2fu + 1, x * 0x165667b1u + 2, x * 0x9e3779b1u + 3);
    }
}
