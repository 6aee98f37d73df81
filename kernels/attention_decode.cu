// Attention of decode rows (one new token a sequence) over the paged cache, split over its length. The new token is appended
// first: the block that covers its position rounds it, stores it, and attends over what it stored.
//
// A block takes the (up to 8) query heads of one key/value head over one stretch of positions. Its warps take tiles of keys in
// turn, each through its own ring of asynchronous copies. S^T = K Q^T has keys as rows and query heads as columns;
// O^T = V^T P^T has dimensions as rows. What warps found meets in shared memory, what blocks of a cluster found in that of each
// other, and what clusters found in global memory, where the last to arrive has the last word. All sums are in order of position.
//
// Rows may come raw, as the QKV product leaves them: then each block norms and rotates the queries that it needs, and the new key where it is
// appended.
//
// Where the new tokens come as `kv` or in raw rows, a block reads the step's description and the cache before its pdl_wait. That is sound when some
// kernel between the one that wrote the description and this one (embed) lets its successor start only after its own pdl_wait, and none
// between them writes what the cache has from earlier steps.
#include "common/attention_decode.cuh"

// CLUSTER blocks of WARPS warps each take consecutive stretches of a row's positions. The grid is (CLUSTER * kv_heads, rows, clusters): blocks
// that short rows have no use for come last.
template <class S, int WARPS, int CLUSTER> DEVICE void attention_decode(const Params& p) {
    using Part = ::Part<S::OWN>;
    extern __shared__ __align__(128) char shared[];
    __shared__ float peaks[WARPS][GROUP], sums[WARPS][GROUP];
    // Parts that the blocks of the cluster sent: by block, then query head.
    constexpr int MINE = CLUSTER > 1 ? GROUP / CLUSTER : 1;
    __shared__ __align__(16) float inbox[CLUSTER][MINE][S::PARTIAL];
    __shared__ __align__(8) uint64_t inbox_full;
    __shared__ __align__(16) char turned[GROUP * S::HEAD];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int rank = blockIdx.x % CLUSTER, cluster = blockIdx.z, clusters = gridDim.z;
    // Query heads that this warp has the last word on, of those of its cluster.
    constexpr int MEMBERS = WARPS * CLUSTER >= GROUP ? 1 : GROUP / (WARPS * CLUSTER);
    const auto member_at = [&](int i) { return rank + CLUSTER * (warp + WARPS * i); };
    Seen seen;
    seen.head = blockIdx.x / CLUSTER;
    seen.row = blockIdx.y;
    pdl_launch();
    if constexpr (CLUSTER > 1) {
        if (warp == 0) inbox_open(shared_address(&inbox_full), sizeof(inbox));
        __syncwarp();
        cluster_arrive();
    }
    float sinks[MEMBERS];
#pragma unroll
    for (int i = 0; i < MEMBERS; ++i)
        sinks[i] = p.sinks && member_at(i) < p.group ? p.sinks[seen.head * p.group + member_at(i)] : -INFINITY;
    // With the new token in hand nothing that the kernel before writes is needed to fetch what the cache has.
    const bool raw = p.raw.qkv != nullptr, ahead = raw || p.kv != nullptr;
    if (!ahead) pdl_wait();
    // No branch before the last of these loads, so that they take one round trip. What rows beyond the live ones have is not used.
    const bool live = seen.row < *p.live;
    const int position = p.position[seen.row];
    seen.slot = p.slot[seen.row];
    seen.table = table_of(p.tables, seen.row);
    seen.last = live ? position : 0;
    seen.first = first_visible(seen.last, p.cache.window);
    seen.copied = ahead ? seen.last - 1 : seen.last;

    // Tiles start at multiples of their length, so that none crosses a page (or a half of one, a page).
    const int first_tile = seen.first / S::KEYS, tiles = seen.last / S::KEYS + 1 - first_tile;
    const auto ceiling = [](int a, int b) { return (a + b - 1) / b; };
    const int wanted = min((tiles - 1) / (CLUSTER * WARPS) >> p.depth_shift, clusters - 1) + 1;
    int each = ceiling(tiles, CLUSTER * WARPS) * WARPS, used = 1;  // tiles of a block, clusters
    if (wanted > 1) {
        each = ceiling(tiles, wanted * CLUSTER * WARPS) * WARPS;
        used = ceiling(tiles, each * CLUSTER);
    }
    if (!live || cluster >= used) {
        // This grid must not end before the kernel before it. One block that waits is enough: the others make room for the next kernel.
        if (ahead && seen.row == 0 && cluster == 0) pdl_wait();
        return;
    }
    const int begin = first_tile + (cluster * CLUSTER + rank) * each, end = min(begin + each, first_tile + tiles);
    const int count = max((end - begin - warp + WARPS - 1) / WARPS, 0);
    const auto tile_at = [&](int i) { return begin + warp + i * WARPS; };

    char* mine = shared + warp * STAGES * S::STAGE;
    const uint32_t ring = shared_address(mine);
    int early[STAGES][S::PAGES];
#pragma unroll
    for (int i = 0; i < STAGES; ++i)
        if (i < count) find_pages<S>(p, seen, tile_at(i), early[i]);
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) {
        if (i < count) fetch<S>(p, seen, tile_at(i), early[i], ring + i * S::STAGE);
        copy_commit();
    }
    int pages[S::PAGES];
#pragma unroll
    for (int i = 0; i < S::PAGES; ++i) pages[i] = early[STAGES - 1][i];
    const bool appends = ahead && count > 0 && tile_at(count - 1) == seen.last / S::KEYS;
    float k[S::OWN] = {}, v[S::OWN] = {};
    uint32_t q[S::DIM / 8];
    if (raw) {
        Heads<S, WARPS> heads;
        heads.prepare(p, position);
        pdl_wait();
        heads.load(p, seen, appends, v);
        heads.put_queries(p, shared_address(turned));
        if (appends) heads.turn_key(p, k);
        __syncthreads();
    } else {
        if (ahead) pdl_wait();
        if (appends) {
            const int width = p.cache.kv_heads * S::DIM;
            const float* from = p.kv + static_cast<size_t>(seen.row) * 2 * width + seen.head * S::DIM + lane * S::OWN;
            load_floats(from, k);
            load_floats(from + width, v);
        }
    }
    load_queries<S>(p, seen, shared_address(turned), q);

    State<S> state;
#pragma unroll
    for (int m = 0; m < S::DIM / 16; ++m) state.o[m][0] = state.o[m][1] = state.o[m][2] = state.o[m][3] = 0;
    state.peak[0] = state.peak[1] = -INFINITY;
    state.sum[0] = state.sum[1] = 0;
    for (int i = 0; i < count; ++i) {
        copy_wait<STAGES - 2>();
        // After it every lane sees tile i, and has done with the stage that is filled next.
        __syncwarp();
        const int next = i + STAGES - 1;
        if (next < count) {
            fetch<S>(p, seen, tile_at(next), pages, ring + next % STAGES * S::STAGE);
            if (next + 1 < count) find_pages<S>(p, seen, tile_at(next + 1), pages);
        }
        copy_commit();
        const uint32_t stage = ring + i % STAGES * S::STAGE;
        if (appends && i == count - 1) append<S>(p, seen, k, v, stage);
        attend<S>(p, seen, tile_at(i), stage, q, state);
    }

    // Warps meet. Each leaves what it found where its ring was.
    __syncwarp();
    float* merged = reinterpret_cast<float*>(mine);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
        for (int step = 4; step < 32; step *= 2) state.sum[e] += __shfl_xor_sync(~0u, state.sum[e], step);
        if (g == 0) {
            peaks[warp][2 * t + e] = state.peak[e];
            sums[warp][2 * t + e] = state.sum[e];
        }
#pragma unroll
        for (int m = 0; m < S::DIM / 16; ++m)
#pragma unroll
            for (int upper = 0; upper < 2; ++upper)
                merged[(2 * t + e) * S::MERGE_STRIDE + dimension<S>(m, upper, g)] = state.o[m][2 * upper + e] * (S::FP8 ? 1 / P_SCALE : 1);
    }
    __syncthreads();
    const auto of_block = [&](int member) {
        Part parts[WARPS];
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            const float* from = reinterpret_cast<const float*>(shared + w * STAGES * S::STAGE) + member * S::MERGE_STRIDE + S::OWN * lane;
            load_floats(from, parts[w].o);
            parts[w].peak = peaks[w][member];
            parts[w].sum = sums[w][member];
        }
        return merge(Part{}, parts);
    };
    if constexpr (CLUSTER > 1) {
        static_assert(WARPS == GROUP, "a warp sends one query head's part");
        const Part part = of_block(warp);
        const uint32_t to = shared_address(inbox[rank][warp / CLUSTER]), full = shared_address(&inbox_full);
        cluster_wait();  // all have opened their inboxes, long ago
#pragma unroll
        for (int i = 0; i < S::OWN; i += 2) send(to + 4 * (S::OWN * lane + i), full, warp % CLUSTER, make_float2(part.o[i], part.o[i + 1]));
        if (lane == 0) send(to + 4 * S::DIM, full, warp % CLUSTER, make_float2(part.peak, part.sum));
    }
#pragma unroll
    for (int i = 0; i < MEMBERS; ++i) {
        const int member = member_at(i);
        if (member >= GROUP) break;
        Part part;
        if constexpr (CLUSTER > 1) {
            Part parts[CLUSTER];
            inbox_wait(shared_address(&inbox_full));
#pragma unroll
            for (int r = 0; r < CLUSTER; ++r) {
                const float* from = inbox[r][member / CLUSTER];
                #pragma unroll
                for (int i = 0; i < S::OWN; i += 2) load_pair(from + S::OWN * lane + i, parts[r].o[i], parts[r].o[i + 1]);
                parts[r].peak = from[S::DIM];
                parts[r].sum = from[S::DIM + 1];
            }
            part = merge(Part{}, parts);
        } else {
            part = of_block(member);
        }
        if (used > 1) {
            // Clusters meet: each leaves its part, the last to come reads all.
            const int pair = (seen.row * p.cache.kv_heads + seen.head) * GROUP + member;
            float* all = p.partial + static_cast<size_t>(pair) * clusters * S::PARTIAL;
            float* own = all + cluster * S::PARTIAL;
#pragma unroll
            for (int i = 0; i < S::OWN; i += 2) *reinterpret_cast<float2*>(own + S::OWN * lane + i) = make_float2(part.o[i], part.o[i + 1]);
            if (lane == 0) *reinterpret_cast<float2*>(own + S::DIM) = make_float2(part.peak, part.sum);
            __syncwarp();
            int order = 0;
            if (lane == 0) order = arrive(p.arrived + pair);
            if (__shfl_sync(~0u, order, 0) != used - 1) continue;
            __syncwarp();
            if (lane == 0) p.arrived[pair] = 0;
            part = Part{};
            for (int start = 0; start < used; start += BATCH) {
                Part parts[BATCH];
#pragma unroll
                for (int c = 0; c < BATCH; ++c) {
                    const float* from = all + min(start + c, used - 1) * S::PARTIAL;
                    const float2 rest = __ldcg(reinterpret_cast<const float2*>(from + S::DIM));
#pragma unroll
                    for (int i = 0; i < S::OWN; i += 2) {
                        const float2 o = __ldcg(reinterpret_cast<const float2*>(from + S::OWN * lane + i));
                        parts[c].o[i] = o.x;
                        parts[c].o[i + 1] = o.y;
                    }
                    // Beyond the end the last part was read again; it does not count.
                    parts[c].peak = start + c < used ? rest.x : -INFINITY;
                    parts[c].sum = rest.y;
                }
                part = merge(part, parts);
            }
        }
        finish<S>(p, seen, member, part, sinks[i]);
    }
}

// Names have the head's elements where those are not 64.
#define KERNEL_OF(NAME, SUFFIX, FP8, DIM, WARPS, CLUSTER, ATTRIBUTE)                                                                    \
    KERNEL __launch_bounds__(WARPS * 32) ATTRIBUTE attention_decode_##NAME##_##SUFFIX(const __grid_constant__ Params p) {                \
        attention_decode<Shape<FP8, DIM>, WARPS, CLUSTER>(p);                                                                            \
    }
#define KERNELS(SUFFIX, WARPS, CLUSTER, ATTRIBUTE)                       \
    KERNEL_OF(e4m3, SUFFIX, true, 64, WARPS, CLUSTER, ATTRIBUTE)         \
    KERNEL_OF(bf16, SUFFIX, false, 64, WARPS, CLUSTER, ATTRIBUTE)        \
    KERNEL_OF(e4m3_128, SUFFIX, true, 128, WARPS, CLUSTER, ATTRIBUTE)    \
    KERNEL_OF(bf16_128, SUFFIX, false, 128, WARPS, CLUSTER, ATTRIBUTE)
KERNELS(4, 4, 1, )
KERNELS(8, 8, 1, )

// Clusters are a matter of compute capability 9.0 and newer; elsewhere these are not used.
#if __CUDA_ARCH__ >= 900
KERNELS(cluster_2, 8, 2, __cluster_dims__(2, 1, 1))
KERNELS(cluster_8, 8, 8, __cluster_dims__(8, 1, 1))
#endif
