// Gradients of keys and values of causal attention, and the scores' gradients for those of the queries; bf16 in and out,
// fp32 accumulation, deterministic to the bit.
//
// A block of threads has 128 keys of one head, whose keys and values stay in shared memory, and goes over the queries that
// may see any of them. One warp fetches a tile of queries after the other. Two warpgroups, with 64 keys each, multiply: both
// products that make scores leave them transposed, keys by queries, in registers, where they are the left operands of the
// products that make the sums. Each warp writes its 16 keys' gradients of scores to the workspace.
//
// A warpgroup's tile: gradients of weights; gradients of scores, from weights that were made a tile ahead; then the next
// tile's scores and this one's sums at once, and the next weights while the last of these products is under way.
//
// Compile-time choices (-D):
//   WIDTH    128 or 192 columns of queries and keys, at most
//   STAGES   depth of the ring
//   SUMS     EARLY, those of values are multiplied beside the weights' gradients; STAGED, beside those of keys and the next
//            scores, and the left operand of those of keys is what is staged for the workspace: it takes no registers
//   FOLD     of the workspace: 1, two blocks of keys that make n + 1 tiles together share rows; 0, a band under a window
// Letters: B batch, H heads, S positions, d and v columns of keys and values.
#include "attention_sm90.cuh"

#define EARLY 0
#define STAGED 1

struct Params {
  TensorMap q;       // (B, H, S, d), box kQueries × 64
  TensorMap k;       // (B, H, S, d), box 128 × 64
  TensorMap v;       // (B, H, S, v), box 128 × 64
  TensorMap dout;    // (B, H, S, v), box kQueries × 64
  TensorMap dk;      // (B, H, S, d), box 16 × 64
  TensorMap dv;      // (B, H, S, v), box 16 × 64
  TensorMap dscore;  // workspace (heads of this launch, rows, columns), box 16 × 64
  const float* level;  // (B, H, S): the score at which a key's weight would be 1
  const float* delta;  // (B, H, S): a query's output times its gradient
  const int* last;     // (B, S): the last query of the key's document; null: there are no documents
  int heads;
  int length;
  int window;
  int blocks;      // of 128 keys, in a head
  int first_head;  // of all B × H
  int n_heads;     // of this launch
  float exponent;  // scale · log2 e
  float scale;
};

namespace {

constexpr int kValue = 128;  // columns of values, at most
constexpr int kKeys = 128;   // a block
constexpr int kGroup = 64;   // keys of a warpgroup
constexpr int kQueries = 64;  // a tile
constexpr int kK = WIDTH / 64 * kKeys * 128;     // bytes of keys
constexpr int kV = kValue / 64 * kKeys * 128;
constexpr int kQ = WIDTH / 64 * kQueries * 128;   // of a tile of queries
constexpr int kDout = kValue / 64 * kQueries * 128;
constexpr int kStage = kQ + kDout;
constexpr int kChunk = 16 * 128;                 // a warp's 16 keys of 64 queries, swizzled
constexpr int kRing = kK + kV;
constexpr int kChunks = kRing + STAGES * kStage;
constexpr int kNumbers = kChunks + 8 * kChunk;           // of each stage's queries: -level · exponent, then -delta
constexpr int kBarriers = kNumbers + STAGES * kQueries * 8;
constexpr int kSpare = kBarriers + 8 * (2 + 3 * STAGES);

struct Barriers {
  u32 k, v;                   // keys and values are there
  u32 full_q, full_dout;      // of each stage: queries and numbers, gradients
  u32 empty;

  __device__ __forceinline__ explicit Barriers(u32 at)
      : k(at), v(at + 8), full_q(at + 16), full_dout(full_q + 8 * STAGES), empty(full_dout + 8 * STAGES) {}
};

struct Work {
  int batch, head, local;  // `local`: the head's place in the workspace
  int key, tiles;          // first key; tiles of queries, the first of which begins at that position
};

// The last query that sees a key; of a key past the last one, that of the last one.
__device__ __forceinline__ int last_seen(const Params& p, int batch, int key) {
  key = min(key, p.length - 1);
  int last = min(key + p.window, p.length) - 1;
  if (p.last) last = min(last, uniform(p.last[long(batch) * p.length + key]));
  return max(last, key);  // so that a block always ends, whatever the documents are
}

// Blocks with the most queries first; heads run fastest.
__device__ __forceinline__ Work work_of(const Params& p) {
  const int block = blockIdx.x / p.n_heads, local = blockIdx.x - block * p.n_heads, number = p.first_head + local;
  const int batch = number / p.heads, key = block * kKeys;
  return {batch, number - batch * p.heads, local, key, ((last_seen(p, batch, key + kKeys - 1) - key) / kKeys + 1) * (kKeys / kQueries)};
}

// One warp.
__device__ __forceinline__ void produce(const Params& p, u32 memory, const Barriers barriers) {
  const int lane = threadIdx.x;
  const Work work = work_of(p);
  if (lane == 0) {
    barrier_expect(barriers.k, kK);
#pragma unroll
    for (int c = 0; c < WIDTH / 64; ++c) {
      tma_load(memory + c * kKeys * 128, &p.k, barriers.k, c * 64, work.key, work.head, work.batch);
    }
  }
  const long first = (long(work.batch) * p.heads + work.head) * p.length;
  for (int t = 0; t < work.tiles; ++t) {
    const u32 stage = t % STAGES, parity = t / STAGES & 1, q = memory + kRing + stage * kStage;
    const int query = work.key + t * kQueries;
    float level[kQueries / 32], delta[kQueries / 32];
#pragma unroll
    for (int i = 0; i < kQueries / 32; ++i) {
      const int row = query + i * 32 + lane;
      level[i] = row < p.length ? p.level[first + row] : __int_as_float(0x7f800000);  // weights of 0 beyond the last
      delta[i] = row < p.length ? p.delta[first + row] : 0.0f;
    }
    barrier_wait(barriers.empty + 8 * stage, parity ^ 1);
    if (lane == 0) {
      const u32 full_q = barriers.full_q + 8 * stage, full_dout = barriers.full_dout + 8 * stage;
      barrier_expect(full_q, kQ);
#pragma unroll
      for (int c = 0; c < WIDTH / 64; ++c) {
        tma_load(q + c * kQueries * 128, &p.q, full_q, c * 64, query, work.head, work.batch);
      }
      if (t == 0) {
        barrier_expect(barriers.v, kV);
#pragma unroll
        for (int c = 0; c < kValue / 64; ++c) {
          tma_load(memory + kK + c * kKeys * 128, &p.v, barriers.v, c * 64, work.key, work.head, work.batch);
        }
      }
      barrier_expect(full_dout, kDout);
#pragma unroll
      for (int c = 0; c < kValue / 64; ++c) {
        tma_load(q + kQ + c * kQueries * 128, &p.dout, full_dout, c * 64, query, work.head, work.batch);
      }
    }
    const u32 numbers = memory + kNumbers + stage * (kQueries * 8);
#pragma unroll
    for (int i = 0; i < kQueries / 32; ++i) {
      store_shared_4(numbers + (i * 32 + lane) * 4, -level[i] * p.exponent);
      store_shared_4(numbers + (kQueries + i * 32 + lane) * 4, -delta[i]);
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(barriers.full_q + 8 * stage);
  }
}

// A warp's 16 rows of 64 columns, packed as operands of the sums, to a chunk.
__device__ __forceinline__ void fill_chunk(u32 chunk, const u32* packed) {
  const u32 lane = lane_now(), at = chunk + lane % 16 * 128 + ((lane / 16 ^ lane % 8) << 4);
#pragma unroll
  for (int j = 0; j < 8; j += 2) {  // 8 queries are 16 bytes; chunks lie at multiples of 128
    store_matrix_x4(at ^ (j << 4), packed[2 * j], packed[2 * j + 1], packed[2 * j + 2], packed[2 * j + 3]);
  }
}

// Both operands with the reduction contiguous: COLUMNS of it, 64 columns after the other.
template <int COLUMNS, bool ADD>
__device__ __forceinline__ void multiply_scores(float (&score)[kQueries / 2], u32 keys, u32 queries) {
  asm volatile("" : "+r"(keys));  // else each step's descriptor would be kept in registers from tile to tile
  const u64 a = wgmma_descriptor(keys, 1), b = wgmma_descriptor(queries, 1);
#pragma unroll
  for (int c = 0; c < COLUMNS / 64; ++c) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const u64 left = a + (c * kKeys * 128 + k * 32 >> 4), right = b + (c * kQueries * 128 + k * 32 >> 4);
      if (ADD || c + k > 0) {
        wgmma<0, 0>(score, left, right, 1);
      } else {
        wgmma_first(score, left, right);
      }
    }
  }
}

// Adds a tile's queries: the reduction.
template <int N>
__device__ __forceinline__ void multiply_sums(float (&sums)[N], const u32 (&left)[kQueries / 4], u32 queries, bool add) {
  const u64 b = wgmma_descriptor(queries, kQueries * 128);
#pragma unroll
  for (int k = 0; k < kQueries / 16; ++k) wgmma_registers(sums, left + 4 * k, b + (k * 2048 >> 4), k > 0 || add);
}

#if SUMS == STAGED
// Likewise, but from gradients of scores in a warpgroup's staging.
template <int N>
__device__ __forceinline__ void multiply_staged(float (&sums)[N], u32 staged, u32 queries, bool add) {
  const u64 a = wgmma_descriptor(staged, 1), b = wgmma_descriptor(queries, kQueries * 128);
#pragma unroll
  for (int k = 0; k < kQueries / 16; ++k) wgmma<0, 1>(sums, a + (k * 32 >> 4), b + (k * 2048 >> 4), k > 0 || add);
}
#endif

// Hides what a query does not see; `key` is the warp's first. A key's query is the wrong side of the diagonal, or too far,
// if their distance, as a number without sign, is not below the key's reach.
__device__ __forceinline__ void hide(const Params& p, float (&score)[kQueries / 2], int batch, int key, int query) {
  const int lane = lane_now(), row = key + lane / 4;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int distance = query + lane % 4 * 2 - (row + 8 * h), at = min(row + 8 * h, p.length - 1);
    const u32 reach = p.last ? min(p.last[long(batch) * p.length + at] - at + 1, p.window) : p.window;
#pragma unroll
    for (int j = 0; j < kQueries / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (u32(distance + 8 * j + i) >= reach) score[4 * j + 2 * h + i] = __int_as_float(0xff800000);
      }
    }
  }
}

// Scores to weights. score[4 j + 2 h + i]: key lane / 4 + 8 h, query 8 j + 2 (lane % 4) + i.
__device__ __forceinline__ void weigh(const float (&score)[kQueries / 2], float (&weight)[kQueries / 2], u32 numbers,
                                      float exponent) {
  const u32 at = numbers + lane_now() % 4 * 8;
#pragma unroll
  for (int j = 0; j < kQueries / 8; ++j) {
    const float2 level = load_shared_8(at + j * 32);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int i = 4 * j + 2 * h;
      weight[i] = exp2_fast(fmaf(score[i], exponent, level.x));
      weight[i + 1] = exp2_fast(fmaf(score[i + 1], exponent, level.y));
    }
  }
}

// What gradients of weights start from: less each query's sum of output times its gradient.
__device__ __forceinline__ void start_dweights(float (&dweight)[kQueries / 2], u32 numbers) {
  const u32 at = numbers + kQueries * 4 + lane_now() % 4 * 8;
#pragma unroll
  for (int i = 0; i < kQueries / 4; ++i) {  // twice the same: copies would take registers
    const float2 minus_delta = load_shared_8(at + i / 2 * 32);
    dweight[2 * i] = minus_delta.x;
    dweight[2 * i + 1] = minus_delta.y;
  }
}

// 16 keys' sums to memory, through the warp's rows of the tile that their keys or values had: `at` in its first 64 columns.
template <int N>
__device__ __forceinline__ void finish(const TensorMap& map, const float (&sums)[N], float scale, u32 at, int key, int head,
                                       int batch) {
#pragma unroll
  for (int c = 0; c < N / 32; ++c) {
    u32 packed[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) packed[i] = pack_bf16(sums[c * 32 + 2 * i] * scale, sums[c * 32 + 2 * i + 1] * scale);
    fill_chunk(at + c * kKeys * 128, packed);
  }
  fence_proxy_async();
  __syncwarp();
  if (lane_now() == 0) {
#pragma unroll
    for (int c = 0; c < N / 32; ++c) tma_store(&map, at + c * kKeys * 128, c * 64, key, head, batch);
  }
  tma_store_commit();
}

// Warpgroups 1 and 2.
__device__ __forceinline__ void consume(const Params& p, u32 memory, const Barriers barriers) {
  const int warp = uniform(threadIdx.x / 32) - 4, group = warp / 4;
  const Work work = work_of(p);
  const int key = work.key + group * kGroup, own_key = work.key + warp * 16;  // the warpgroup's first, and the warp's
  const u32 k = memory + group * (kGroup * 128), v = k + kK, staging = memory + kChunks + warp * kChunk;

  // Of the block's tiles, those with a query that sees a key of this warpgroup; and the first that some do not see whole.
  u32 begin = 0, end = 0, far = 0;
  if (key < p.length) {
    begin = group * kGroup / kQueries;
    end = min((last_seen(p, work.batch, key + kGroup - 1) - work.key) / kQueries + 1, work.tiles);
    far = (last_seen(p, work.batch, key) - work.key + 1) / kQueries;
  }
  // The tile's place in the workspace.
  int row = own_key, column = 0;
#if FOLD
  const int block = work.key / kKeys;
  if (2 * block < p.blocks) {
    column = work.key + kKeys;
  } else {
    row = (p.blocks - 1 - block) * kKeys + warp * 16;
  }
#endif

  auto tile_at = [&](u32 t) { return memory + kRing + t % STAGES * kStage; };
  auto numbers_at = [&](u32 t) { return memory + kNumbers + t % STAGES * (kQueries * 8); };
  auto release = [&](u32 t) {
    if (lane_now() == 0) barrier_arrive(barriers.empty + 8 * (t % STAGES));
  };
  auto write = [&](u32 t) {  // the warp's part of the tile, from its staging
    if (lane_now() == 0) tma_store(&p.dscore, staging, column + t * kQueries, row, work.local);
    tma_store_commit();
  };
  auto skip = [&](u32 from, u32 to) {  // tiles that none of these keys has a part in
    if (from >= to) return;
    tma_store_wait<0>();
    __syncwarp();
    const u32 zeros[16] = {};
    fill_chunk(staging, zeros);
    fence_proxy_async();
    __syncwarp();
#pragma unroll 1
    for (u32 t = from; t < to; ++t) {
      write(t);
      barrier_wait(barriers.full_q + 8 * (t % STAGES), t / STAGES & 1);
      barrier_wait(barriers.full_dout + 8 * (t % STAGES), t / STAGES & 1);
      __syncwarp();
      release(t);
    }
  };
  auto begin_scores = [&](float (&score)[kQueries / 2], u32 t) {
    barrier_wait(barriers.full_q + 8 * (t % STAGES), t / STAGES & 1);
    wgmma_fence();
    multiply_scores<WIDTH, false>(score, k, tile_at(t));
    wgmma_commit();
  };

  skip(0, begin);
  if (begin < end) {
    float dk[WIDTH / 2], dv[kValue / 2], weight[kQueries / 2];
    // ptxas would put exponentials off until the products before are done, were it not for a store that needs them all, and
    // never happens, as no weight is below 0.
    auto end_scores = [&](float (&score)[kQueries / 2], u32 t) {
      keep_after_wait(score);
      if (t == begin || t >= far) hide(p, score, work.batch, own_key, work.key + t * kQueries);
      weigh(score, weight, numbers_at(t), p.exponent);
      u32 signs = 0;
#pragma unroll
      for (int i = 0; i < kQueries / 2; ++i) signs |= __float_as_uint(weight[i]);
      if (int(signs) < 0) store_shared_4(memory + kSpare, __uint_as_float(signs));
    };
    auto tile = [&](u32 t, float (&score)[kQueries / 2], bool goes_on) {  // and begins the next one's scores, if it goes on
      float dweight[kQueries / 2];
      u32 left[kQueries / 4], dleft[kQueries / 4];
      start_dweights(dweight, numbers_at(t));
      barrier_wait(barriers.full_dout + 8 * (t % STAGES), t / STAGES & 1);
      wgmma_fence();
      multiply_scores<kValue, true>(dweight, v, tile_at(t) + kQ);
      wgmma_commit();
#if SUMS == EARLY
      pack(weight, left);
      wgmma_fence();
      multiply_sums(dv, left, tile_at(t) + kQ, t > begin);
      wgmma_commit();
#endif
      wgmma_wait<SUMS == EARLY>();
      keep_after_wait(dweight);
#pragma unroll
      for (int i = 0; i < kQueries / 2; ++i) dweight[i] *= weight[i];
      pack(dweight, dleft);
      tma_store_wait<0>();
      if (SUMS == STAGED) {
        warpgroup_sync(1 + group);  // nor do other warps' products read it
      } else {
        __syncwarp();
      }
      fill_chunk(staging, dleft);
#if SUMS == EARLY
      if (goes_on) begin_scores(score, t + 1);
      wgmma_fence();
      multiply_sums(dk, dleft, tile_at(t), t > begin);
      wgmma_commit();
      fence_proxy_async();
      __syncwarp();
#else
      pack(weight, left);
      fence_proxy_async();
      warpgroup_sync(1 + group);
      wgmma_fence();
      multiply_sums(dv, left, tile_at(t) + kQ, t > begin);
      if (goes_on) begin_scores(score, t + 1);
      multiply_staged(dk, memory + kChunks + group * 4 * kChunk, tile_at(t), t > begin);
      wgmma_commit();
#endif
      write(t);
    };
    barrier_wait(barriers.k, 0);
    {
      float score[kQueries / 2];
      begin_scores(score, begin);
      barrier_wait(barriers.v, 0);
      wgmma_wait<0>();
      end_scores(score, begin);
    }
#pragma unroll 1
    for (u32 t = begin; t < end - 1; ++t) {
      float score[kQueries / 2];
      tile(t, score, true);
      wgmma_wait<1>();
      end_scores(score, t + 1);
      wgmma_wait<0>();
      release(t);
    }
    float none[kQueries / 2];
    tile(end - 1, none, false);
    wgmma_wait<0>();
    release(end - 1);
    keep_after_wait(dk);
    keep_after_wait(dv);
    warpgroup_sync(1 + group);  // nothing reads this warpgroup's keys and values any more
    const u32 own = memory + warp * kChunk;
    finish(p.dv, dv, 1.0f, own + kK, own_key, work.head, work.batch);
    finish(p.dk, dk, p.scale, own, own_key, work.head, work.batch);
  }
  skip(end, work.tiles);
  tma_store_wait<0>();
}

}  // namespace

extern "C" __global__ void __launch_bounds__(384, 1) attention_dkdv(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) unsigned char bytes[];
  const u32 memory = shared_address(bytes);
  const Barriers barriers(memory + kBarriers);
  if (threadIdx.x == 0) {
    prefetch_map(&p.q);
    prefetch_map(&p.k);
    prefetch_map(&p.v);
    prefetch_map(&p.dout);
    prefetch_map(&p.dscore);
    barrier_init(barriers.k, 1);
    barrier_init(barriers.v, 1);
    for (int s = 0; s < STAGES; ++s) {
      barrier_init(barriers.full_q + 8 * s, 2);
      barrier_init(barriers.full_dout + 8 * s, 1);
      barrier_init(barriers.empty + 8 * s, 8);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    registers_shrink<24>();
    if (threadIdx.x < 32) produce(p, memory, barriers);
  } else {
    registers_grow<240>();
    consume(p, memory, barriers);
  }
}
