// Dense products of NVFP4 weights by few tokens, on Hopper: as gemm_nvfp4.cu, but the SPLIT blocks of a cluster share the columns of a tile of
// QUADS quads (64 rows a warpgroup) by up to MAX tokens. Of each strip's sums, pieces of 16 rows by eight tokens are dealt to the blocks; each
// sends the others theirs and adds up its own, in the order of the blocks.
#include "common/gemm_nvfp4.cuh"
#include "common/inbox.cuh"
#include "common/wgmma_more.cuh"

#ifdef HOPPER

template <int QUADS, int MAX, int SPLIT, int STAGES> DEVICE void gemm_nvfp4_few(const Params& p) {
    constexpr int WARPS = QUADS * 4, PIECES = (WARPS * (MAX / 8) + SPLIT - 1) / SPLIT, STAGE_BYTES = MAX * 128;
    // After the ring: pieces of 512 bytes from each block.
    extern __shared__ __align__(1024) char shared[];
    __shared__ __align__(8) uint64_t barriers[2 * STAGES + 1];
    const uint32_t stages = shared_address(shared), inbox = shared_address(barriers + 2 * STAGES);
    Ring<STAGES, 1, WARPS> ring(shared_address(barriers));
    const int rank = cluster_rank(), tile = blockIdx.x / SPLIT, tiles = (p.tokens + p.height - 1) / p.height;
    const int quad = tile / tiles * QUADS, token = tile % tiles * p.height;
    const int strips = p.rows / STRIP_ROWS, all = p.cols / 64;
    const int begin = all * rank / SPLIT, steps = all * (rank + 1) / SPLIT - begin;
    const int warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
    if (threadIdx.x == 0) ring.init();
    // Factors, and the first weights, do not wait for the kernel before.
    const Rows rows(p, min(quad * 4 + warp, strips - 1));
    Weights weights;
    if (steps > 0) {
        const char* from = p.w + min(quad * 4 + warp, strips - 1) * nv_strip_bytes(all);
        weights.enter(from, begin, all);
        weights.fill(steps);
    }
    pdl_launch();
    __syncthreads();
    pdl_wait();
    // Tokens that are multiplied: all that there may be, so that nothing waits to hear of the live ones.
    const int room = min(p.height, p.tokens - token), x_bytes = (room + 7) / 8 * 1024;
    // The first thread also asks for the tokens: all that there is room for, then each step those that take the place of the step before
    // (of the one before that, whose products are known to be done).
    Ring<STAGES, 1, WARPS> asked = ring;
    int wanted = steps;
    const char* x = static_cast<const char*>(p.x) + (static_cast<size_t>(begin) * p.capacity + token) * 128;
    const auto ask = [&] {
        barrier_expect(asked.full(), x_bytes);
        bulk_load(stages + asked.stage * STAGE_BYTES, x, x_bytes, asked.full());
        x += static_cast<size_t>(p.capacity) * 128;
        asked.advance();
        --wanted;
    };
    if (threadIdx.x == 0) {
        global_proxy_fence();
        for (int k = min(STAGES, steps); k > 0; --k) ask();
    }
    int early = 2;  // steps before a place is free
    const auto fed = [&] {
        if (warp == 0 && --early <= 0) {
            if (lane == 0 && wanted > 0) {
                barrier_wait(asked.empty(), asked.parity ^ 1);
                ask();
            }
            __syncwarp();
        }
    };
    const int live = uniform(*p.live), tokens = max(0, min(room, live - token)), blocks = (tokens + 7) / 8;
    // Pieces of this tile, and of those, how many this block adds up.
    const int pieces = WARPS * blocks, mine = (pieces - rank + SPLIT - 1) / SPLIT;
    if (warp == 0) inbox_open(inbox, SPLIT * mine * 512);
    __syncwarp();
    // Inboxes are open once all have come here.
    cluster_arrive();
    for_columns<MAX>(room, [&](auto columns) {
        constexpr int N = columns.value;
        float d[N / 2];
#pragma unroll
        for (int i = 0; i < N / 2; ++i) d[i] = 0;
        if (steps > 0) multiply<N, MAX, -1, false>(d, ring, weights, nullptr, wgmma_descriptor(stages), steps, 0, fed);
        cluster_wait();
        const uint32_t to = stages + STAGES * STAGE_BYTES + rank * (PIECES * 512) + lane * 16;
        int owner = warp * blocks % SPLIT, place = warp * blocks / SPLIT;
#pragma unroll
        for (int j = 0; j < N / 8; ++j) {
            if (j >= blocks) break;
            send(to + place * 512, inbox, owner,
                 make_float4(d[4 * j] * rows.low, d[4 * j + 1] * rows.low, d[4 * j + 2] * rows.high, d[4 * j + 3] * rows.high));
            if (++owner == SPLIT) owner = 0, ++place;
        }
    });
    inbox_wait(inbox);
    for (int place = warp; place < mine; place += WARPS) {
        const int piece = place * SPLIT + rank, of = quad * 4 + piece / blocks, at = token + piece % blocks * 8;
        if (of >= strips) continue;
        float v[4] = {};
#pragma unroll
        for (int source = 0; source < SPLIT; ++source) {
            const float4 part = *reinterpret_cast<const float4*>(shared + STAGES * STAGE_BYTES + (source * PIECES + place) * 512 + lane * 16);
            v[0] += part.x, v[1] += part.y, v[2] += part.z, v[3] += part.w;
        }
        if (p.output == STORE_F32) put<STORE_F32>(p, v, of, at, token + tokens);
        else if (p.output == ADD_F32) put<ADD_F32>(p, v, of, at, token + tokens);
        else put<SWIGLU>(p, v, of, at, token + tokens);
    }
}

#define BODY(QUADS, MAX, SPLIT, STAGES) gemm_nvfp4_few<QUADS, MAX, SPLIT, STAGES>(p)
#define CLUSTER(SPLIT) __cluster_dims__(SPLIT, 1, 1)
#else
#define BODY(QUADS, MAX, SPLIT, STAGES)
#define CLUSTER(SPLIT)
#endif

// QUADS quads by MAX tokens, SPLIT blocks of a cluster, BLOCKS of a multiprocessor.
#define DEFINE(QUADS, MAX, SPLIT, STAGES, BLOCKS)                                                                        \
    KERNEL CLUSTER(SPLIT) __launch_bounds__(QUADS * 128, BLOCKS)                                                                  \
        gemm_nvfp4_few_##QUADS##x##MAX##_##SPLIT(const __grid_constant__ Params p) { BODY(QUADS, MAX, SPLIT, STAGES); }
DEFINE(2, 64, 4, 6, 2)
DEFINE(3, 64, 2, 14, 1)
DEFINE(3, 64, 8, 14, 1)
DEFINE(3, 128, 4, 6, 1)
DEFINE(3, 128, 8, 6, 1)
