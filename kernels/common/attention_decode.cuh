// What the decode attention kernels are made of: a warp's tiles of keys and values, the products with them, the new token.
#pragma once
#include "common/attention.cuh"
#include "common/attention_heads.cuh"
#include "common/inbox.cuh"

// Rows as the QKV product leaves them, which this kernel does to what kv_append.cu does: the same bits.
struct Raw {
    const float* qkv;       // [rows, (heads + 2 * kv_heads) * DIM]; null where `q` has the queries
    const float* inv_freq;  // [DIM / 2]
    HeadNorms norms;
    float mscale;
};

struct Params {
    const __nv_bfloat16* q;  // [rows, heads * DIM], rotated
    const float* kv;         // [rows, 2 * kv_heads * DIM]: rotated keys, then values; null where the cache has them already
    Raw raw;
    Cache cache;
    Tables tables;        // row r is sequence r
    const int* position;  // [rows]
    const int* slot;      // [rows]: page * page_size + offset of the new token; negative is nowhere
    const int* live;      // rows to do
    const float* sinks;   // [heads] or null
    void* out;            // bf16 [rows, heads * DIM], row-major or panels
    float* partial;       // [rows][kv_heads][8][clusters][PARTIAL], where there are several
    int* arrived;         // [rows][kv_heads][8], zero before and after
    int group;            // query heads of a key/value head, 1..8
    int capacity;         // rows of the panels of `out`; 0 is row-major
    int depth_shift;      // log2 of the tiles that every warp of a cluster has before another cluster is used
    float scale;          // times log2(e)
};

constexpr int STAGES = 3;
constexpr int GROUP = 8;
// Keeps products of probabilities and value scales in the normal range of fp16.
constexpr float P_SCALE = 1024.0f;
constexpr int BATCH = 8;  // parts that are read at once

// FP8: the cache has e4m3 bytes. DIM: elements of a head, 64 or 128.
template <bool FP8_, int DIM_> struct Shape {
    static constexpr bool FP8 = FP8_;
    static constexpr int DIM = DIM_;
    static constexpr int LINE = DIM * (FP8 ? 1 : 2);
    static constexpr int KEYS = LINE == 64 ? 32 : 16;  // of a tile
    static constexpr int VALUES = KEYS * LINE;         // offset in a stage
    static constexpr int SCALES = 2 * KEYS * LINE;
    static constexpr int STAGE = SCALES + (FP8 ? 2 * KEYS * 4 : 0);
    static constexpr int PAGES = KEYS / 16;
    static constexpr int HALVES = LINE / 64;           // four chunks of a line of keys at once
    static constexpr int OWN = DIM / 32;               // dimensions of a lane where a warp has a head
    // The outputs of a head, not yet divided, its peak, its sum.
    static constexpr int PARTIAL = DIM + 2;
    static constexpr int MERGE_STRIDE = DIM + 4;
    // Bytes from one rotated query head to the next: the reads of a warp spread over the banks.
    static constexpr int HEAD = DIM * 2 + (FP8 ? 16 : 64);
};

DEVICE void load_words(uint32_t shared, uint32_t (&words)[2]) {
    const uint2 v = load_shared_8(shared);
    words[0] = v.x, words[1] = v.y;
}
DEVICE void load_words(uint32_t shared, uint32_t (&words)[4]) {
    const uint4 v = load_shared_16(shared);
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
}
DEVICE void load_floats(const float* from, float (&to)[2]) {
    const float2 v = *reinterpret_cast<const float2*>(from);
    to[0] = v.x, to[1] = v.y;
}
DEVICE void load_floats(const float* from, float (&to)[4]) {
    const float4 v = *reinterpret_cast<const float4*>(from);
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}

DEVICE void load_pair(const float* from, float& low, float& high) {
    const float2 v = *reinterpret_cast<const float2*>(from);
    low = v.x, high = v.y;
}

// Row of S^T to key within 8. With e4m3 neighbours are swapped in every other pair, so that the value lines that the lanes of a
// quad read together lie in different banks.
template <class S> DEVICE int key_of(int row) { return S::FP8 ? row ^ ((row >> 1) & 1) : row; }
template <class S> DEVICE int key_chunk(int key, int chunk) { return S::LINE == 64 ? chunk : chunk ^ ((key & 1) << 2); }
template <class S> DEVICE int value_chunk(int key, int chunk) {
    return !S::FP8 ? chunk ^ (key & 7) : S::DIM == 128 ? chunk ^ (key & 6) : chunk ^ (((key >> 2) & 1) << 1);
}

// What the lanes of a block agree on.
struct Seen {
    int row, head;
    int first, last;   // positions
    int copied;        // last position to be read from the cache
    const int* table;  // by logical page
    int slot;          // of the new token
};

template <class S> DEVICE void find_pages(const Params& p, const Seen& seen, int tile, int (&pages)[S::PAGES]) {
#pragma unroll
    for (int i = 0; i < S::PAGES; ++i) {
        const int key = tile * S::KEYS + i * 16;
        // Entries of positions that are not seen may not exist.
        pages[i] = key + 15 >= seen.first && key <= seen.copied ? __ldg(seen.table + (key >> p.cache.page_shift)) : 0;
    }
}

// Copies a tile; positions that are not seen become zeros, whatever the cache has there.
template <class S> DEVICE void fetch(const Params& p, const Seen& seen, int tile, const int (&pages)[S::PAGES], uint32_t stage) {
    constexpr int CHUNKS = S::LINE / 16, LINES = 32 / CHUNKS;
    const int lane = threadIdx.x % 32, chunk = lane % CHUNKS;
    const int mask = (1 << p.cache.page_shift) - 1;
    const size_t values = values_after_keys(p.cache);
#pragma unroll
    for (int i = 0; i < S::KEYS / LINES; ++i) {
        const int key = i * LINES + lane / CHUNKS, position = tile * S::KEYS + key;
        const uint32_t bytes = position >= seen.first && position <= seen.copied ? 16 : 0;
        const size_t token = token_of(p.cache, pages[S::PAGES == 1 ? 0 : i * LINES / 16], seen.head, position & mask);
        const char* from = p.cache.data + token * S::LINE + chunk * 16;
        copy_async_16(stage + key * S::LINE + key_chunk<S>(key, chunk) * 16, from, bytes);
        copy_async_16(stage + S::VALUES + key * S::LINE + value_chunk<S>(key, chunk) * 16, from + values * S::LINE, bytes);
    }
    if constexpr (S::FP8) {
        const int key = lane % S::KEYS, position = tile * S::KEYS + key;
        const uint32_t bytes = position >= seen.first && position <= seen.copied ? 4 : 0;
        const float* from = p.cache.scales + token_of(p.cache, key < 16 ? pages[0] : pages[S::PAGES - 1], seen.head, position & mask);
        if (lane < S::KEYS) copy_async_4(stage + S::SCALES + key * 4, from, bytes);
        if (lane < S::KEYS) copy_async_4(stage + S::SCALES + (S::KEYS + key) * 4, from + values, bytes);
    }
}

// Elements of a lane in shared or global memory, as words.
template <class S> DEVICE void words_of(const float (&v)[S::OWN], const E4m3Scale& scale, uint32_t (&words)[2]) {
    if constexpr (S::FP8) {
        words[0] = to_e4m3(v[0], v[1], scale);
        if constexpr (S::OWN == 4) words[0] |= to_e4m3(v[2], v[3], scale) << 16;
    } else {
        words[0] = pack2<__nv_bfloat16>(v[0], v[1]);
        if constexpr (S::OWN == 4) words[1] = pack2<__nv_bfloat16>(v[2], v[3]);
    }
}
template <class S> DEVICE void put(uint32_t shared, char* global, const uint32_t (&words)[2]) {
    constexpr int BYTES = S::LINE / 32;  // of a lane
    if constexpr (BYTES == 2)
        store_shared_16(shared, words[0]);
    else
        store_shared_32(shared, words[0]);
    if constexpr (BYTES == 8) store_shared_32(shared + 4, words[1]);
    if (!global) return;
    if constexpr (BYTES == 2)
        *reinterpret_cast<uint16_t*>(global) = static_cast<uint16_t>(words[0]);
    else if constexpr (BYTES == 4)
        *reinterpret_cast<uint32_t*>(global) = words[0];
    else
        *reinterpret_cast<uint2*>(global) = make_uint2(words[0], words[1]);
}

// The new token, a lane's dimensions of keys and values: to the stage as its tile's line, and to the cache.
template <class S> DEVICE void append(const Params& p, const Seen& seen, const float (&k)[S::OWN], const float (&v)[S::OWN], uint32_t stage) {
    constexpr int BYTES = S::LINE / 32;
    const int lane = threadIdx.x % 32, key = seen.last % S::KEYS;
    const int slot = seen.slot, size = 1 << p.cache.page_shift;
    const size_t token = token_of(p.cache, slot >> p.cache.page_shift, seen.head, slot & (size - 1));
    const size_t values = values_after_keys(p.cache);
    // Where a lane's elements are in a line of chunks.
    const int chunk = lane * BYTES / 16, within = lane * BYTES % 16;
    const uint32_t to_k = stage + key * S::LINE + key_chunk<S>(key, chunk) * 16 + within;
    const uint32_t to_v = stage + S::VALUES + key * S::LINE + value_chunk<S>(key, chunk) * 16 + within;
    float most_k = 0, most_v = 0;
    if constexpr (S::FP8) {
#pragma unroll
        for (int i = 0; i < S::OWN; ++i) {
            most_k = fmaxf(most_k, fabsf(k[i]));
            most_v = fmaxf(most_v, fabsf(v[i]));
        }
        most_k = warp_max(most_k);
        most_v = warp_max(most_v);
    }
    const E4m3Scale scale_k(most_k), scale_v(most_v);
    if (S::FP8 && lane == 0) {
        store_shared_f32(stage + S::SCALES + key * 4, scale_k.scale);
        store_shared_f32(stage + S::SCALES + (S::KEYS + key) * 4, scale_v.scale);
        if (slot >= 0) {
            p.cache.scales[token] = scale_k.scale;
            p.cache.scales[token + values] = scale_v.scale;
        }
    }
    uint32_t words_k[2], words_v[2];
    words_of<S>(k, scale_k, words_k);
    words_of<S>(v, scale_v, words_v);
    char* data = p.cache.data + token * S::LINE + lane * BYTES;
    put<S>(to_k, slot >= 0 ? data : nullptr, words_k);
    put<S>(to_v, slot >= 0 ? data + values * S::LINE : nullptr, words_v);
    __syncwarp();
}

// Raw heads of a row, on their way: this warp's of the queries, and the new key.
template <class S, int WARPS> struct Heads {
    static constexpr int LANES = S::DIM / 4;                               // of a head
    static constexpr int AT_ONCE = WARPS * 32 / LANES;                     // heads
    static constexpr int ROUNDS = GROUP > AT_ONCE ? GROUP / AT_ONCE : 1;
    float2 first, second;  // turns of a lane's pairs
    float4 q_weight, k_weight;
    float4 q[ROUNDS], k;

    static __device__ __forceinline__ int lane() { return threadIdx.x % LANES; }
    static __device__ __forceinline__ int member(int round) { return round * AT_ONCE + threadIdx.x / LANES; }
    // Whether any lane of the warp has a query head.
    static __device__ __forceinline__ bool takes_part(const Params& p, int round) { return round * AT_ONCE + threadIdx.x / 32 * 32 / LANES < p.group; }

    // What depends on no kernel before.
    __device__ __forceinline__ void prepare(const Params& p, int position) {
        const Raw& raw = p.raw;
        const float2 inv_freq = __ldg(reinterpret_cast<const float2*>(raw.inv_freq) + lane());
        if (raw.norms.q) q_weight = norm_weights<S::DIM>(raw.norms.q, lane()), k_weight = norm_weights<S::DIM>(raw.norms.k, lane());
        first = turn_of(position, inv_freq.x, raw.mscale);
        second = turn_of(position, inv_freq.y, raw.mscale);
    }

    __device__ __forceinline__ void load(const Params& p, const Seen& seen, bool appends, float (&v)[S::OWN]) {
        const int kv_heads = p.cache.kv_heads;
        const float* row = p.raw.qkv + static_cast<size_t>(seen.row) * (p.group + 2) * kv_heads * S::DIM;
#pragma unroll
        for (int i = 0; i < ROUNDS; ++i)
            // Missing heads repeat the last one; nobody asks for them.
            if (takes_part(p, i)) q[i] = *reinterpret_cast<const float4*>(row + (seen.head * p.group + min(member(i), p.group - 1)) * S::DIM + 4 * lane());
        if (!appends) return;
        const float* key = row + (kv_heads * p.group + seen.head) * S::DIM;
        k = *reinterpret_cast<const float4*>(key + 4 * lane());
        load_floats(key + kv_heads * S::DIM + threadIdx.x % 32 * S::OWN, v);
    }

    // Leaves the queries in `to`, [GROUP] heads of S::HEAD bytes.
    __device__ __forceinline__ void put_queries(const Params& p, uint32_t to) {
#pragma unroll
        for (int i = 0; i < ROUNDS; ++i) {
            if (!takes_part(p, i)) continue;
            if (p.raw.norms.q) q[i] = norm_head<S::DIM>(q[i], q_weight, p.raw.norms.eps);
            const float4 turned = rotate(q[i], first, second);
            const uint32_t at = to + member(i) * S::HEAD + 4 * lane();
            if (member(i) >= GROUP) continue;
            store_shared_32(at, pack2<__nv_bfloat16>(turned.x, turned.y));
            store_shared_32(at + S::DIM, pack2<__nv_bfloat16>(turned.z, turned.w));
        }
    }

    // A lane's dimensions of the new key.
    __device__ __forceinline__ void turn_key(const Params& p, float (&own)[S::OWN]) {
        if (p.raw.norms.k) k = norm_head<S::DIM>(k, k_weight, p.raw.norms.eps);
        const float4 turned = rotate(k, first, second);
        const int lane = threadIdx.x % 32;
        if constexpr (S::OWN == 2) {
            own[0] = lane < 16 ? turned.x : turned.z;
            own[1] = lane < 16 ? turned.y : turned.w;
        } else {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int from = lane % 16 * 2 + i;
                const float x = __shfl_sync(~0u, turned.x, from), y = __shfl_sync(~0u, turned.y, from);
                const float z = __shfl_sync(~0u, turned.z, from), w = __shfl_sync(~0u, turned.w, from);
                own[2 * i] = lane < 16 ? x : z;
                own[2 * i + 1] = lane < 16 ? y : w;
            }
        }
    }
};

// Queries as operand B: lane (g, t) has head g. The order of the dimensions is that in which `attend` meets the keys'. Missing heads
// repeat the last one; their results are not written. They are read from `turned` in shared memory where rows are raw.
template <class S> DEVICE void load_queries(const Params& p, const Seen& seen, uint32_t turned, uint32_t (&q)[S::DIM / 8]) {
    const int g = min(threadIdx.x % 32 / 4, p.group - 1), t = threadIdx.x % 4;
    const auto* from = reinterpret_cast<const uint4*>(p.q + (static_cast<size_t>(seen.row) * p.cache.kv_heads * p.group + seen.head * p.group + g) * S::DIM);
    // A chunk of keys is 16 dimensions with e4m3, two chunks of queries; else it is 8.
    const auto chunk = [&](int i) { return S::FP8 ? 2 * (t + i / 2 * 4) + i % 2 : t + 4 * i; };
    uint4 chunks[S::DIM / 32];
    if (p.raw.qkv) {
#pragma unroll
        for (int i = 0; i < S::DIM / 32; ++i) chunks[i] = load_shared_16(turned + g * S::HEAD + chunk(i) * 16);
    } else {
#pragma unroll
        for (int i = 0; i < S::DIM / 32; ++i) chunks[i] = from[chunk(i)];
    }
#pragma unroll
    for (int i = 0; i < S::DIM / 32; ++i) {
        const uint32_t words[4] = {chunks[i].x, chunks[i].y, chunks[i].z, chunks[i].w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            q[4 * i + j] = words[j];
            if constexpr (S::FP8) {
                const float low = __uint_as_float(words[j] << 16), high = __uint_as_float(words[j] & 0xffff0000u);
                q[4 * i + j] = pack2<__half>(fminf(fmaxf(low, -65504.0f), 65504.0f), fminf(fmaxf(high, -65504.0f), 65504.0f));
            }
        }
    }
}

template <class S> struct State {
    float o[S::DIM / 16][4];  // O^T: tiles of 16 dimensions by 8 heads
    float peak[2], sum[2];  // heads 2t, 2t + 1; sums of this lane's keys only
};

template <class S>
DEVICE void attend(const Params& p, const Seen& seen, int tile, uint32_t stage, const uint32_t (&q)[S::DIM / 8], State<S>& state) {
    constexpr int BLOCKS = S::KEYS / 16;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int row = key_of<S>(g);
    float s[BLOCKS][4], weight[BLOCKS][2];
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
        s[b][0] = s[b][1] = s[b][2] = s[b][3] = 0;
        float odd[4] = {};  // of every other half: each product waits for the one before into the same sums
        const uint32_t low = stage + (b * 16 + row) * S::LINE, high = low + 8 * S::LINE;
#pragma unroll
        for (int half = 0; half < S::HALVES; ++half) {
            const int at = key_chunk<S>(row, t + 4 * half) * 16;
            const uint4 x = load_shared_16(low + at), y = load_shared_16(high + at);
            const uint32_t xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
            if constexpr (S::FP8) {
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    mma_fp16(half % 2 ? odd : s[b], e4m3_to_half2(xs[i]), e4m3_to_half2(ys[i]), e4m3_to_half2(xs[i] >> 16), e4m3_to_half2(ys[i] >> 16),
                             q[8 * half + 2 * i], q[8 * half + 2 * i + 1]);
            } else {
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    mma_bf16(half % 2 ? odd : s[b], xs[2 * i], ys[2 * i], xs[2 * i + 1], ys[2 * i + 1], q[4 * half + 2 * i], q[4 * half + 2 * i + 1]);
            }
        }
        if constexpr (S::HALVES > 1)
#pragma unroll
            for (int i = 0; i < 4; ++i) s[b][i] += odd[i];
    }
    float peak[2] = {state.peak[0], state.peak[1]};
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int key = b * 16 + r * 8 + row, position = tile * S::KEYS + key;
            const bool visible = position >= seen.first && position <= seen.last;
            float factor = p.scale;
            if constexpr (S::FP8) {
                factor *= load_shared_f32(stage + S::SCALES + key * 4);
                weight[b][r] = load_shared_f32(stage + S::SCALES + (S::KEYS + key) * 4) * P_SCALE;
            }
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                float& v = s[b][2 * r + e];
                v = visible ? v * factor : -INFINITY;
                peak[e] = fmaxf(peak[e], v);
            }
        }
    float rescale[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
        for (int step = 4; step < 32; step *= 2) peak[e] = fmaxf(peak[e], __shfl_xor_sync(~0u, peak[e], step));
        rescale[e] = exp2_fast(state.peak[e] - peak[e]);
        state.peak[e] = peak[e];
        state.sum[e] *= rescale[e];
    }
#pragma unroll
    for (int m = 0; m < S::DIM / 16; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) state.o[m][i] *= rescale[i & 1];
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
        uint32_t probabilities[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float x = exp2_fast(s[b][2 * r] - peak[0]), y = exp2_fast(s[b][2 * r + 1] - peak[1]);
            state.sum[0] += x;
            state.sum[1] += y;
            if constexpr (S::FP8)
                probabilities[r] = pack2<__half>(fminf(x * weight[b][r], 65504.0f), fminf(y * weight[b][r], 65504.0f));
            else
                probabilities[r] = pack2<__nv_bfloat16>(x, y);
            // From (key, pair of heads) to (head, pair of keys).
            probabilities[r] = transpose_8x8(probabilities[r]);
        }
        const uint32_t values = stage + S::VALUES + b * 16 * S::LINE;
        if constexpr (S::FP8) {
            // Lane (g, t) has dimensions DIM / 8 * g.. of the keys in rows 2t, 2t + 1, 2t + 8, 2t + 9 of S^T.
            const int chunk = S::DIM == 128 ? g : g / 2, within = S::DIM == 128 ? 0 : g % 2 * 8;
            const uint32_t at = values + 2 * t * S::LINE + value_chunk<S>(2 * t, chunk) * 16 + within;
            const uint32_t even = at + (t & 1) * S::LINE, odd = at + (~t & 1) * S::LINE;
            uint32_t as[S::OWN], cs[S::OWN], ds[S::OWN], es[S::OWN];
            load_words(even, as);
            load_words(odd, cs);
            load_words(even + 8 * S::LINE, ds);
            load_words(odd + 8 * S::LINE, es);
#pragma unroll
            for (int m = 0; m < S::DIM / 16; ++m) {
                const uint32_t select = m % 2 == 0 ? 0x5140 : 0x7362;
                const uint32_t low = __byte_perm(as[m / 2], cs[m / 2], select), high = __byte_perm(ds[m / 2], es[m / 2], select);
                mma_fp16(state.o[m], e4m3_to_half2(low), e4m3_to_half2(low >> 16), e4m3_to_half2(high), e4m3_to_half2(high >> 16),
                         probabilities[0], probabilities[1]);
            }
        } else {
            const int key = lane % 8 + lane / 16 * 8;
#pragma unroll
            for (int m = 0; m < S::DIM / 16; ++m) {
                const int chunk = 2 * m + lane / 8 % 2;
                const uint4 v = load_matrices_transposed(values + key * S::LINE + value_chunk<S>(key, chunk) * 16);
                mma_bf16(state.o[m], v.x, v.y, v.z, v.w, probabilities[0], probabilities[1]);
            }
        }
    }
}

template <class S> DEVICE int dimension(int m, int upper, int g) { return S::FP8 ? S::DIM / 8 * g + 2 * m + upper : 16 * m + 8 * upper + g; }

// A lane's dimensions of query head `member`, divided and written.
template <class S> DEVICE void finish(const Params& p, const Seen& seen, int member, const Part<S::OWN>& part, float sink) {
    if (member >= p.group) return;
    const int heads = p.cache.kv_heads * p.group, head = seen.head * p.group + member;
    const float inverse = 1.0f / (part.sum + exp2_fast(sink * LOG2E - part.peak));
    char* to = output_at<S::DIM>(p.out, seen.row, head, threadIdx.x % 32 * S::OWN, heads, p.capacity);
#pragma unroll
    for (int i = 0; i < S::OWN; i += 2)
        *reinterpret_cast<uint32_t*>(to + 2 * i) = pack2<__nv_bfloat16>(part.o[i] * inverse, part.o[i + 1] * inverse);
}
