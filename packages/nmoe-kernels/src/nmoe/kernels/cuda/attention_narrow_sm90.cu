// Gradients of causal attention whose heads have up to 64 columns: of keys and values, or of the queries, as the compile
// says which of them a block of threads owns; bf16 in and out, fp32 accumulation, deterministic to the bit.
//
// Both make the scores and their gradients, seven products in all for five that share them: at this width a product takes
// less time than the memory through which they would be shared (attention_dkdv_sm90.cu).
//
// Persistent. A tile is 128 rows of a head: 64 for each of two warpgroups, which hold them in registers, the left operands of
// both products that make scores. One warp fetches what they own, and then the other side's rows, 64 at a time. Scores and
// weights' gradients leave the products as the left operands of the sums. A warpgroup issues the next products before this
// one's sums, and makes weights while those are under way.
//
// Compile-time choices (-D):
//   OWN     KEYS: of keys and values. QUERIES: of queries
//   STAGES  depth of the ring
// Letters: B batch, H heads, S positions, d and v columns of keys and values.
#include "attention_sm90.cuh"
#include "tile_queue.cuh"

#define KEYS 0
#define QUERIES 1

struct Params {
  TensorMap own_score;     // keys or queries (B, H, S, d), box 128 × 64
  TensorMap own_weight;    // values or the output's gradients (B, H, S, v), box 128 × 64
  TensorMap other_score;   // queries or keys, box 64 × 64
  TensorMap other_weight;  // the output's gradients or values, box 64 × 64
  TensorMap dscore;        // gradients of keys or queries, box 16 × 64
  TensorMap dweight;       // of values, box 16 × 64; not used where OWN is QUERIES
  const float* level;      // (B, H, S): the score at which a key's weight would be 1
  const float* delta;      // (B, H, S): a query's output times its gradient
  const int* edge;         // (B, S): the last query of a key's document, or the first key of a query's; null: no documents
  unsigned* counter;       // of tiles taken: 0, before and after
  int heads;
  int length;
  int window;  // at most `length`
  int n_heads;  // B · H
  float exponent;  // scale · log2 e
  float scale;
};

namespace {

constexpr int kTile = 128, kOther = 64;
constexpr int kOwnBytes = kTile * 128, kOtherBytes = kOther * 128;  // of one of two matrices
constexpr int kStage = 2 * kOtherBytes;
constexpr int kChunk = 16 * 128;  // a warp's 16 rows of 64 columns, swizzled
constexpr int kSums = OWN == KEYS ? 2 : 1;
constexpr int kRing = 2 * kOwnBytes;
constexpr int kStaging = kRing + STAGES * kStage;
constexpr int kNumbers = kStaging + 8 * kSums * kChunk;  // of each stage's queries: -level · exponent, then -delta
constexpr int kBarriers = kNumbers + (OWN == KEYS ? STAGES * kOther * 8 : 0);
constexpr int kQueue = kBarriers + 8 * (2 + 2 * STAGES);
constexpr int kSpare = kQueue + 64;
constexpr int kGroup = 32;  // heads that are at work together: L2 holds them

struct Barriers {
  u32 own_full, own_empty, full, empty;

  __device__ __forceinline__ explicit Barriers(u32 at) : own_full(at), own_empty(at + 8), full(at + 16), empty(full + 8 * STAGES) {}
};

struct Tile {
  int batch, head;
  int row;         // the first; -1: there are no more tiles
  int begin, end;  // tiles of the other side's rows that one of these has a part in
};

// Where what a row sees, or is seen by, ends; of a row past the last one, that of the last one. Always on the right side of
// the row, so that a tile ends whatever the documents are.
__device__ __forceinline__ int far_end(const Params& p, int batch, int row) {
  row = min(row, p.length - 1);
  const int edge = p.edge ? uniform(p.edge[long(batch) * p.length + row]) : OWN == KEYS ? p.length - 1 : 0;
  return OWN == KEYS ? max(min(min(row + p.window, p.length) - 1, edge), row) : min(max(max(row - p.window + 1, 0), edge), row);
}

__device__ __forceinline__ int tile_count(const Params& p) { return p.n_heads * ((p.length + kTile - 1) / kTile); }

// Heads in groups; in a group the longest first, heads fastest.
__device__ __forceinline__ int4 look_up(const Params& p, int t) {
  if (t >= tile_count(p)) return make_int4(0, 0, -1, 0);
  const int blocks = (p.length + kTile - 1) / kTile, group = t / (kGroup * blocks);
  const int in_group = min(kGroup, p.n_heads - group * kGroup), rest = t - group * kGroup * blocks, place = rest / in_group;
  const int number = group * kGroup + rest - place * in_group, batch = number / p.heads;
  const int row = (OWN == KEYS ? place : blocks - 1 - place) * kTile;
  return make_int4(batch, number - batch * p.heads, row, 0);
}

// By whole warps.
__device__ __forceinline__ Tile tile_of(const Params& p, int4 v) {
  Tile tile = {uniform(v.x), uniform(v.y), uniform(v.z), 0, 0};
  if (tile.row < 0) return tile;
  if (OWN == KEYS) {
    tile.begin = tile.row / kOther, tile.end = far_end(p, tile.batch, tile.row + kTile - 1) / kOther + 1;
  } else {
    tile.begin = far_end(p, tile.batch, tile.row) / kOther, tile.end = (min(tile.row + kTile, p.length) - 1) / kOther + 1;
  }
  return tile;
}

// One warp.
__device__ __forceinline__ void produce(const Params& p, u32 memory, const Barriers barriers, TileQueue queue) {
  const int lane = threadIdx.x;
  Ring<STAGES> ring;
  if (lane == 0) queue.send(look_up(p, TileQueue::take(p.counter, tile_count(p))), 0);
  for (u32 n = 0;; ++n) {
    const Tile tile = tile_of(p, queue.receive());
    if (tile.row < 0) break;
    const int next = lane == 0 ? TileQueue::take(p.counter, tile_count(p)) : 0;  // waited for at the end
    if (lane == 0) {
      barrier_wait(barriers.own_empty, n & 1 ^ 1);
      barrier_expect(barriers.own_full, 2 * kOwnBytes);
      tma_load(memory, &p.own_score, barriers.own_full, 0, tile.row, tile.head, tile.batch);
      tma_load(memory + kOwnBytes, &p.own_weight, barriers.own_full, 0, tile.row, tile.head, tile.batch);
    }
    const long first = (long(tile.batch) * p.heads + tile.head) * p.length;
#pragma unroll 1
    for (int t = tile.begin; t < tile.end; ++t, ring.advance()) {
      const u32 to = memory + kRing + ring.stage() * kStage, full = barriers.full + 8 * ring.stage();
      float level[kOther / 32], delta[kOther / 32];
      if (OWN == KEYS) {
#pragma unroll
        for (int i = 0; i < kOther / 32; ++i) {
          const int row = t * kOther + i * 32 + lane;
          level[i] = row < p.length ? p.level[first + row] : __int_as_float(0x7f800000);  // weights of 0 beyond the last
          delta[i] = row < p.length ? p.delta[first + row] : 0.0f;
        }
      }
      barrier_wait(barriers.empty + 8 * ring.stage(), ring.parity() ^ 1);
      if (lane == 0) {
        barrier_expect(full, kStage);
        tma_load(to, &p.other_score, full, 0, t * kOther, tile.head, tile.batch);
        tma_load(to + kOtherBytes, &p.other_weight, full, 0, t * kOther, tile.head, tile.batch);
      }
      if (OWN == KEYS) {
        const u32 numbers = memory + kNumbers + ring.stage() * (kOther * 8);
#pragma unroll
        for (int i = 0; i < kOther / 32; ++i) {
          store_shared_4(numbers + (i * 32 + lane) * 4, -level[i] * p.exponent);
          store_shared_4(numbers + (kOther + i * 32 + lane) * 4, -delta[i]);
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(full);
      }
    }
    if (lane == 0) queue.send(look_up(p, next), queue.n);
  }
}

// A matrix's 64 columns of a warp's 16 rows, as left operands.
__device__ __forceinline__ void load_own(u32 (&left)[16], u32 at) {
  const u32 lane = lane_now();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    load_matrix_x4(at + fragment_at(lane, 2 * k), left[4 * k], left[4 * k + 1], left[4 * k + 2], left[4 * k + 3]);
  }
}

// product (+)= own rows · other rows^T.
__device__ __forceinline__ void multiply(float (&product)[32], const u32 (&own)[16], u32 other, bool add) {
  const u64 b = wgmma_descriptor(other, 1);
#pragma unroll
  for (int k = 0; k < 4; ++k) wgmma_registers<0>(product, own + 4 * k, b + (k * 32 >> 4), k > 0 || add);
}

// sums (+)= left · other rows.
__device__ __forceinline__ void add_up(float (&sums)[32], const u32 (&left)[16], u32 other, bool add) {
  const u64 b = wgmma_descriptor(other, kOtherBytes);
#pragma unroll
  for (int k = 0; k < 4; ++k) wgmma_registers<1>(sums, left + 4 * k, b + (k * 2048 >> 4), k > 0 || add);
}

// Hides what a query does not see. `row` is the warp's first, `other` the other tile's. A key is on the wrong side of the
// diagonal, or too far, if its distance, as a number without sign, is not below the row's reach.
__device__ __forceinline__ void hide(const Params& p, float (&score)[32], int batch, int row, int other) {
  const int lane = lane_now();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int own = row + lane / 4 + 8 * h, at = min(own, p.length - 1), ahead = other + lane % 4 * 2 - own;
    int reach = p.window;
    if (p.edge) {
      const int edge = p.edge[long(batch) * p.length + at];
      reach = min(reach, (OWN == KEYS ? edge - at : at - edge) + 1);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int distance = OWN == KEYS ? ahead + 8 * j + i : -ahead - 8 * j - i;
        if (u32(distance) >= u32(reach)) score[4 * j + 2 * h + i] = __int_as_float(0xff800000);
      }
    }
  }
}

// -level · exponent and -delta, of the queries that an accumulator's element is of.
struct Numbers {
  float own[2][2];  // of queries that are rows: lane / 4, and 8 further on
  u32 at;           // of those that are columns: in shared memory

  __device__ __forceinline__ float2 get(int which, int j, int h) const {
    if (OWN == KEYS) return load_shared_8(at + which * (kOther * 4) + j * 32);
    return make_float2(own[which][h], own[which][h]);
  }
};

// score[4 j + 2 h + i]: own row lane / 4 + 8 h, other row 8 j + 2 (lane % 4) + i.
__device__ __forceinline__ void weigh(float (&score)[32], const Numbers& numbers, float exponent) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    float2 level;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (OWN == QUERIES || h == 0) level = numbers.get(0, j, h);
      float* const s = score + 4 * j + 2 * h;
      s[0] = exp2_fast(fmaf(s[0], exponent, level.x));
      s[1] = exp2_fast(fmaf(s[1], exponent, level.y));
    }
  }
}

// What gradients of weights start from, where it differs from column to column.
__device__ __forceinline__ void start(float (&dweight)[32], const Numbers& numbers) {
#pragma unroll
  for (int i = 0; i < 16; ++i) {  // twice the same: copies would take registers
    const float2 minus_delta = numbers.get(1, i / 2, 0);
    dweight[2 * i] = minus_delta.x, dweight[2 * i + 1] = minus_delta.y;
  }
}

// A warp's 16 rows of sums to memory.
__device__ __forceinline__ void finish(const Params& p, const TensorMap& map, const Tile& tile, const float (&sums)[32],
                                       float scale, u32 staging, int row) {
  const u32 lane = lane_now();
#pragma unroll
  for (int j = 0; j < 8; j += 2) {
    u32 part[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) part[i] = pack_bf16(sums[4 * j + 2 * i] * scale, sums[4 * j + 2 * i + 1] * scale);
    store_matrix_x4(staging + fragment_at(lane, j), part[0], part[1], part[2], part[3]);
  }
  fence_proxy_async();
  __syncwarp();
  if (lane == 0 && row < p.length) tma_store(&map, staging, 0, row, tile.head, tile.batch);
  tma_store_commit();
}

// Warpgroups 1 and 2.
__device__ __forceinline__ void consume(const Params& p, u32 memory, const Barriers barriers, TileQueue queue) {
  const int warp = uniform(threadIdx.x / 32) - 4, group = warp / 4;
  const u32 staging = memory + kStaging + warp * kSums * kChunk;
  Ring<STAGES> ring;
  auto release = [&](u32 stage) {
    if (lane_now() == 0) barrier_arrive(barriers.empty + 8 * stage);
  };
  auto skip = [&](int tiles) {  // that none of these rows has a part in
#pragma unroll 1
    for (; tiles > 0; --tiles, ring.advance()) {
      barrier_wait(barriers.full + 8 * ring.stage(), ring.parity());
      __syncwarp();
      release(ring.stage());
    }
  };
  for (u32 n = 0;; ++n) {
    const Tile tile = tile_of(p, queue.receive());
    if (tile.row < 0) break;
    const int first = tile.row + group * 64, row = tile.row + warp * 16;  // the warpgroup's, and the warp's
    // Of the tiles, those with a part in these rows, and of these the ones where nothing is hidden, but for the diagonal's.
    int begin = tile.end, end = tile.end, near = 0, far = 0;
    if (first < p.length) {
      if (OWN == KEYS) {
        begin = first / kOther, end = min(far_end(p, tile.batch, first + 63) / kOther + 1, tile.end);
        near = begin + 1, far = (far_end(p, tile.batch, first) + 1) / kOther;
      } else {
        begin = max(far_end(p, tile.batch, first) / kOther, tile.begin), end = min(first / kOther + 1, tile.end);
        near = (far_end(p, tile.batch, first + 63) + kOther - 1) / kOther, far = end - 1;
      }
    }
    Numbers numbers;
    if (OWN == QUERIES) {
      const long query = (long(tile.batch) * p.heads + tile.head) * p.length;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int at = row + lane_now() / 4 + 8 * h;
        numbers.own[0][h] = at < p.length ? -p.level[query + at] * p.exponent : __int_as_float(0xff800000);
        numbers.own[1][h] = at < p.length ? -p.delta[query + at] : 0.0f;
      }
    }
    u32 own_score[16], own_weight[16];
    barrier_wait(barriers.own_full, n & 1);
    load_own(own_score, memory + warp * kChunk);
    load_own(own_weight, memory + kOwnBytes + warp * kChunk);
    fence_proxy_async();  // what was read, before what the next tile's copies write
    __syncwarp();
    if (lane_now() == 0) barrier_arrive(barriers.own_empty);
    skip(begin - tile.begin);
    if (begin < end) {
      float sums[kSums][32], score[32], dweight[32];
      u32 left[16], dleft[16];
      auto stage_at = [&](u32 stage) { return memory + kRing + stage * kStage; };
      auto begin_products = [&]() {  // of the ring's stage
        if (OWN == KEYS) numbers.at = memory + kNumbers + ring.stage() * (kOther * 8) + lane_now() % 4 * 8;
        barrier_wait(barriers.full + 8 * ring.stage(), ring.parity());
        if (OWN == KEYS) start(dweight, numbers);
        wgmma_fence();
        multiply(score, own_score, stage_at(ring.stage()), false);
        wgmma_commit();
        multiply(dweight, own_weight, stage_at(ring.stage()) + kOtherBytes, OWN == KEYS);
        wgmma_commit();
      };
      // ptxas would put exponentials off until the products before are done, were it not for a store that needs them all, and
      // never happens, as no weight is below 0.
      auto end_scores = [&](int t) {
        keep_after_wait(score);
        if (t < near || t >= far) hide(p, score, tile.batch, row, t * kOther);
        weigh(score, numbers, p.exponent);
        u32 signs = 0;
#pragma unroll
        for (int i = 0; i < 32; ++i) signs |= __float_as_uint(score[i]);
        if (int(signs) < 0) store_shared_4(memory + kSpare, __uint_as_float(signs));
      };
      auto end_dweights = [&]() {
        keep_after_wait(dweight);
#pragma unroll
        for (int i = 0; i < 32; ++i) {
          if (OWN == QUERIES) dweight[i] += numbers.own[1][i % 4 / 2];
          dweight[i] *= score[i];
        }
      };
      auto begin_sums = [&](u32 stage, bool add) {
        wgmma_fence();
        if (OWN == KEYS) add_up(sums[kSums - 1], left, stage_at(stage) + kOtherBytes, add);
        add_up(sums[0], dleft, stage_at(stage), add);
        wgmma_commit();
      };
      auto pack_both = [&]() {
        if (OWN == KEYS) pack(score, left);
        pack(dweight, dleft);
      };
      begin_products();
      wgmma_wait<1>();
      end_scores(begin);
      wgmma_wait<0>();
      end_dweights();
      pack_both();
#pragma unroll 1
      for (int t = begin + 1; t < end; ++t) {
        const u32 before = ring.stage();
        ring.advance();
        begin_products();
        begin_sums(before, t > begin + 1);
        wgmma_wait<2>();
        end_scores(t);
        wgmma_wait<1>();
        end_dweights();
        wgmma_wait<0>();
#pragma unroll
        for (int s = 0; s < kSums; ++s) keep_after_wait(sums[s]);
        release(before);
        pack_both();
      }
      begin_sums(ring.stage(), end - begin > 1);
      wgmma_wait<0>();
#pragma unroll
      for (int s = 0; s < kSums; ++s) keep_after_wait(sums[s]);
      release(ring.stage());
      ring.advance();
      tma_store_wait<0>();  // the last tile's sums have been read
      __syncwarp();
      finish(p, p.dscore, tile, sums[0], p.scale, staging, row);
      if (OWN == KEYS) finish(p, p.dweight, tile, sums[kSums - 1], 1.0f, staging + kChunk, row);
    }
    skip(tile.end - end);
  }
  tma_store_wait<0>();
}

}  // namespace

extern "C" __global__ void __launch_bounds__(384, 1) attention_narrow(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) unsigned char bytes[];
  const u32 memory = shared_address(bytes);
  const Barriers barriers(memory + kBarriers);
  const TileQueue queue(memory + kQueue);
  if (threadIdx.x == 0) {
    prefetch_map(&p.own_score);
    prefetch_map(&p.own_weight);
    prefetch_map(&p.other_score);
    prefetch_map(&p.other_weight);
    prefetch_map(&p.dscore);
    barrier_init(barriers.own_full, 1);
    barrier_init(barriers.own_empty, 8);
    for (int s = 0; s < STAGES; ++s) {
      barrier_init(barriers.full + 8 * s, OWN == KEYS ? 2 : 1);
      barrier_init(barriers.empty + 8 * s, 8);
    }
    queue.init(256 + 32);
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    registers_shrink<40>();
    if (threadIdx.x < 32) produce(p, memory, barriers, queue);
  } else {
    registers_grow<232>();
    consume(p, memory, barriers, queue);
  }
}
