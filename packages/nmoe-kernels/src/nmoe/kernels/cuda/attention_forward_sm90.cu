// Causal attention forward, to all keys before a query or to a window of them, within documents or whole samples: bf16
// in, fp32 scores, softmax and sums.
//
// Persistent and warp-specialised. Three threads of warpgroup 0 fill shared memory by TMA: one a ring of key tiles, one
// a ring of value tiles, one the queries of each consumer, so that its next ones come while this tile ends. Each other
// warpgroup owns 64 queries: it goes from the last key tile that they see to the first. While it computes a softmax,
// the product of the last tile's weights with their values is under way. PING_PONG: warpgroups issue their products in
// turns, so that one's softmax runs beside another's products.
//
// A row's weights are relative to its highest score so far; a warp scales its sums anew only where one of its rows has met
// a higher one. (A reference that may lie 2^8 below would make that rarer, and saves 1 to 5%; but then the weight of a key
// that outweighs all others is rounded, where here it is 1.)
//
// Sources: FlashAttention-3 (arXiv:2407.08608), sections 3.1 and 3.2, for the overlap; the code is ours.
//
// Compile-time choices (-D):
//   WIDTH        columns of queries and keys, at most: 64, 128 or 192
//   VALUE        columns of values, at most: 64 or 128
//   WARPGROUPS   consumers; a tile has 64 queries for each
//   KEYS         of a tile: 64 or 128, so that the last tile which a query sees holds the query itself
//   STAGES       tiles of keys, and of values, in shared memory
//   PER_SM       blocks of a multiprocessor
//   PING_PONG    see above
// Letters: B batch, H heads, S positions, d and v columns of keys and values.
#include "attention_sm90.cuh"
#include "tile_queue.cuh"

struct Params {
  TensorMap q;    // (B, H, S, d), box 64 × 64
  TensorMap k;    // (B, H, S, d), box KEYS × 64
  TensorMap v;    // (B, H, S, v), box KEYS × 64
  TensorMap out;  // (B, H, S, v), box 16 × 64
  const int* edge;    // (B, S): first key that a query may see; null: the sample's first
  float* level;       // (B, H, S): the score at which a key's weight would be 1
  unsigned* counter;  // of tiles taken: 0, before and after
  int heads;
  int length;
  int window;   // at most `length`
  int n_rows;   // tiles along S
  int n_tiles;
  float exponent;  // of 2, for each unit of a score
};

namespace {

constexpr int kQueries = 64 * WARPGROUPS;
constexpr int kPanels = WIDTH / 64, kValuePanels = VALUE / 64;  // of 64 columns: a row of the 128-byte swizzle
constexpr int kQueryBytes = 64 * WIDTH * 2;                     // of one consumer
constexpr int kKeyBytes = KEYS * WIDTH * 2;
constexpr int kValueBytes = KEYS * VALUE * 2;
constexpr int kPanelBytes = KEYS * 128;
constexpr int kChunk = 16 * 128;  // a warp's 16 rows of 64 columns, swizzled
constexpr int kKeysAt = WARPGROUPS * kQueryBytes;
constexpr int kValuesAt = kKeysAt + STAGES * kKeyBytes;
constexpr int kStagingAt = kValuesAt + STAGES * kValueBytes;
constexpr int kBarriersAt = kStagingAt + WARPGROUPS * 4 * kChunk;
constexpr int kThreads = 128 * (WARPGROUPS + 1);
constexpr int kProducerRegisters = PER_SM > 1 || WARPGROUPS > 2 ? 32 : 40;
// A block starts with this number for each thread, and hands round no more than that; in steps of 8.
constexpr int kLaunchRegisters = 65536 / PER_SM / kThreads / 8 * 8;
constexpr int kConsumerRegisters = (kLaunchRegisters * (WARPGROUPS + 1) - kProducerRegisters) / WARPGROUPS / 8 * 8;

static_assert(WIDTH % 64 == 0 && (VALUE == 64 || VALUE == 128), "panels of 64 columns; an accumulator for each VALUE");
static_assert(KEYS == 64 || KEYS == 128, "a consumer's last key tile must hold all its queries");
static_assert(STAGES >= 2, "a consumer that skips a tile may wait for it while another still reads the one before");
static_assert(!PING_PONG || WARPGROUPS > 1, "turns are for several");

// Holds back what follows, a wait, until `x` is known, which is below 2^100. ptxas would have it wait before that is
// computed, but does not move it over a branch.
__device__ __forceinline__ void stay_before(float x) {
  asm volatile(
      "{\n.reg .pred known;\n"
      "setp.lt.f32 known, %0, 0f71800000;\n"
      "@known bra KNOWN;\n"
      "nanosleep.u32 1;\n"
      "KNOWN:\n}\n" ::"f"(x)
      : "memory");
}

// --- work ---------------------------------------------------------------------------------------------------------

struct Tile {
  int batch, head;
  int query;  // the first; -1: there are no more tiles
  int first;  // the first key tile that one of its queries sees
};

__device__ __forceinline__ Tile as_tile(int4 v) { return {v.x, v.y, v.z, v.w}; }

// The last key tile that one of its queries sees.
__device__ __forceinline__ int last_of(const Params& p, const Tile& tile) {
  return (min(tile.query + kQueries, p.length) - 1) / KEYS;
}

// Of query `row`, which may be beyond the last: then its own.
__device__ __forceinline__ int first_visible(const Params& p, int batch, int row) {
  int first = max(row - p.window + 1, 0);
  if (p.edge != nullptr) first = max(first, row < p.length ? p.edge[u64(u32(batch)) * p.length + row] : row);
  return first;
}

// Heads run fastest, as in memory; then from the last queries, which see the most keys, to the first.
__device__ __forceinline__ int4 look_up(const Params& p, int number) {
  if (number >= p.n_tiles) return make_int4(0, 0, -1, 0);
  const int rest = number / p.heads, batch = rest / p.n_rows;
  const int query = (p.n_rows - 1 - (rest - batch * p.n_rows)) * kQueries;
  return make_int4(batch, number - rest * p.heads, query, min(first_visible(p, batch, query), query) / KEYS);
}

// Warpgroup 0's threads 0, 32 and 64.
template <int BYTES>
__device__ __forceinline__ void load_tiles(const Params& p, const TensorMap* map, const Tile& tile, u32 to, u32 full,
                                           u32 empty, Ring<STAGES>& ring) {
#pragma unroll 1
  for (int key = last_of(p, tile); key >= tile.first; --key, ring.advance()) {
    const u32 at = to + ring.stage() * BYTES, ready = full + 8 * ring.stage();
    barrier_wait(empty + 8 * ring.stage(), ring.parity() ^ 1);
    barrier_expect(ready, BYTES);
#pragma unroll
    for (int c = 0; c < BYTES / kPanelBytes; ++c) {
      tma_load(at + c * kPanelBytes, map, ready, c * 64, key * KEYS, tile.head, tile.batch);
    }
  }
}

struct Barriers {
  u32 key_full, key_empty, value_full, value_empty, query_full, query_empty, queue;

  __device__ __forceinline__ explicit Barriers(u32 at)
      : key_full(at),
        key_empty(at + 8 * STAGES),
        value_full(at + 16 * STAGES),
        value_empty(at + 24 * STAGES),
        query_full(at + 32 * STAGES),
        query_empty(at + 32 * STAGES + 8 * WARPGROUPS),
        queue(at + 32 * STAGES + 16 * WARPGROUPS) {}
};

__device__ __forceinline__ void produce_keys(const Params& p, u32 memory, const Barriers& b, TileQueue queue) {
  Ring<STAGES> ring;
  queue.send(look_up(p, TileQueue::take(p.counter, p.n_tiles)), 0);
  while (true) {
    const Tile tile = as_tile(queue.receive());
    if (tile.query < 0) break;
    const int next = TileQueue::take(p.counter, p.n_tiles);
    load_tiles<kKeyBytes>(p, &p.k, tile, memory + kKeysAt, b.key_full, b.key_empty, ring);
    queue.send(look_up(p, next), queue.n);
  }
}

__device__ __forceinline__ void produce_values(const Params& p, u32 memory, const Barriers& b, TileQueue queue) {
  Ring<STAGES> ring;
  while (true) {
    const Tile tile = as_tile(queue.receive());
    if (tile.query < 0) break;
    load_tiles<kValueBytes>(p, &p.v, tile, memory + kValuesAt, b.value_full, b.value_empty, ring);
  }
}

__device__ __forceinline__ void produce_queries(const Params& p, u32 memory, const Barriers& b, TileQueue queue) {
  for (u32 n = 0;; ++n) {
    const Tile tile = as_tile(queue.receive());
    if (tile.query < 0) break;
#pragma unroll 1
    for (int group = 0; group < WARPGROUPS; ++group) {
      const u32 ready = b.query_full + 8 * group, at = memory + group * kQueryBytes;
      barrier_wait(b.query_empty + 8 * group, (n & 1) ^ 1);
      barrier_expect(ready, kQueryBytes);
#pragma unroll
      for (int c = 0; c < kPanels; ++c) {
        tma_load(at + c * 8192, &p.q, ready, c * 64, tile.query + 64 * group, tile.head, tile.batch);
      }
    }
  }
}

// --- consumers ------------------------------------------------------------------------------------------------------

// Whose turn it is to issue products. One of a warpgroup's turns for each key tile of the block, seen by its queries or
// not.
struct Turns {
  int group;

  __device__ __forceinline__ explicit Turns(int group) : group(group) {
    if (PING_PONG && group == WARPGROUPS - 1) pass();
  }

  __device__ __forceinline__ void await() const {
    if (!PING_PONG) return;
    __syncwarp();  // lanes may leave a wait one by one
    asm volatile("bar.sync %0, 256;" ::"r"(1 + group) : "memory");
  }

  __device__ __forceinline__ void pass() const {
    if (PING_PONG) asm volatile("bar.arrive %0, 256;" ::"r"(group == WARPGROUPS - 1 ? 1 : 2 + group) : "memory");
  }

  __device__ __forceinline__ void end() const {
    if (PING_PONG && group == 0) await();
  }
};

constexpr int kScores = KEYS / 2, kSums = VALUE / 2, kWeights = KEYS / 4;  // registers

// `wgmma_descriptor` of a uniform address: what is added to it later needs 32 bits, as shared memory has fewer than
// 2^18 bytes.
struct Operand {
  u32 low, high;

  __device__ __forceinline__ Operand(u32 address, u32 next_64) {
    const u64 whole = wgmma_descriptor(0, next_64);
    low = u32(whole) | uniform(address >> 4), high = u32(whole >> 32);
  }

  __device__ __forceinline__ u64 at(int bytes) const { return u64(high) << 32 | (low + (bytes >> 4)); }
};

// score = queries · keys^T, under way.
__device__ __forceinline__ void multiply_keys(float (&score)[kScores], u32 queries, u32 keys) {
  const Operand a(queries, 1), b(keys, 1);
#pragma unroll
  for (int k = 0; k < WIDTH / 16; ++k) {
    const u64 left = a.at(k / 4 * 8192 + k % 4 * 32), right = b.at(k / 4 * kPanelBytes + k % 4 * 32);
    if (k == 0) {
      wgmma_first(score, left, right);
    } else {
      wgmma<0, 0>(score, left, right, 1);
    }
  }
}

// sums += weights · values, under way.
__device__ __forceinline__ void multiply_values(float (&sums)[kSums], const u32 (&weight)[kWeights], u32 values) {
  const Operand b(values, kPanelBytes);
#pragma unroll
  for (int k = 0; k < KEYS / 16; ++k) wgmma_registers(sums, weight + 4 * k, b.at(k * 2048), 1);
}

// Two rows of a thread: lane / 4 of its warp's 16, and 8 further on. score[4 j + 2 h + i]: row h, column 8 j +
// 2 (lane % 4) + i.
struct Rows {
  float highest[2];  // score so far, times the exponent: a weight is 2^(score * exponent - highest)
  float total[2];      // of this thread's weights
};

// Hides keys after the query, and keys before the first that it sees, where a tile has any. `key` is the tile's first;
// `row` and `low` are the two rows' own, `first_row` the consumer's first, `last_low` its last's.
__device__ __forceinline__ void hide(float (&score)[kScores], int key, int first_row, int last_low, int row,
                                     const int (&low)[2]) {
  const int column = key + threadIdx.x % 4 * 2;
  if (key + KEYS - 1 > first_row) {
#pragma unroll
    for (int j = 0; j < kScores; ++j) {
      if (j / 4 * 8 + j % 2 > row + (j % 4 / 2) * 8 - column) score[j] = __int_as_float(0xff800000);
    }
  }
  if (key < last_low) {
#pragma unroll
    for (int j = 0; j < kScores; ++j) {
      if (j / 4 * 8 + j % 2 < low[j % 4 / 2] - column) score[j] = __int_as_float(0xff800000);
    }
  }
}

// The highest score of each of the two rows, in all four lanes that share them.
__device__ __forceinline__ void highest(const float (&score)[kScores], float (&top)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float part[2] = {fmaxf(score[2 * h], score[2 * h + 1]), fmaxf(score[4 + 2 * h], score[4 + 2 * h + 1])};
#pragma unroll
    for (int j = 8; j < kScores; j += 8) {
      part[0] = fmaxf(part[0], fmaxf(score[j + 2 * h], score[j + 2 * h + 1]));
      part[1] = fmaxf(part[1], fmaxf(score[j + 4 + 2 * h], score[j + 4 + 2 * h + 1]));
    }
    top[h] = fmaxf(part[0], part[1]);
#pragma unroll
    for (int lanes = 1; lanes < 4; lanes *= 2) top[h] = fmaxf(top[h], __shfl_xor_sync(0xffffffff, top[h], lanes));
  }
}

// Scores to weights; `total` is the sum of this thread's.
__device__ __forceinline__ void weigh(float (&score)[kScores], float exponent, const Rows& rows, float (&total)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float part[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < kScores; j += 4) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& s = score[j + 2 * h + i];
        s = exp2_fast(fmaf(s, exponent, -rows.highest[h]));
        part[i] += s;
      }
    }
    total[h] = part[0] + part[1];
  }
}

// 16 rows of the output by a warp, through its own part of shared memory; and their levels.
__device__ __forceinline__ void finish(const Params& p, const Tile& tile, const float (&sums)[kSums], Rows& rows,
                                       u32 staging, int warp_row) {
  const u32 lane = lane_now();
  float inverse[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int lanes = 1; lanes < 4; lanes *= 2) rows.total[h] += __shfl_xor_sync(0xffffffff, rows.total[h], lanes);
    inverse[h] = 1.0f / rows.total[h];
  }
#pragma unroll
  for (int c = 0; c < kValuePanels; ++c) {
    tma_store_wait<0>();  // the last copy has been read
    __syncwarp();
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      u32 part[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = c * 32 + j * 4 + i * 2;
        part[i] = pack_bf16(sums[at] * inverse[i % 2], sums[at + 1] * inverse[i % 2]);
      }
      store_matrix_x4(staging + fragment_at(lane, j), part[0], part[1], part[2], part[3]);
    }
    fence_proxy_async();
    __syncwarp();
    if (lane == 0 && warp_row < p.length) tma_store(&p.out, staging, c * 64, warp_row, tile.head, tile.batch);
    tma_store_commit();
  }
  if (lane % 4 == 0) {
    float* level = p.level + (u64(u32(tile.batch)) * p.heads + tile.head) * p.length;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = warp_row + int(lane / 4) + 8 * h;
      if (row < p.length) level[row] = (rows.highest[h] + log2f(rows.total[h])) / p.exponent;
    }
  }
}

// Warpgroups 1 and on.
__device__ __forceinline__ void consume(const Params& p, u32 memory, const Barriers& b, TileQueue queue) {
  const int group = uniform(threadIdx.x / 128 - 1), warp = uniform(threadIdx.x / 32 % 4), lane = threadIdx.x % 32;
  const u32 staging = memory + kStagingAt + (group * 4 + warp) * kChunk;
  const Turns turns(group);

  auto release = [&](u32 barrier) {
    if (lane == 0) barrier_arrive(barrier);
  };

  Ring<STAGES> ring;  // of keys; values are a tile behind
  // Key tiles that other consumers of the block see and this one does not.
  auto skip = [&](int tiles) {
#pragma unroll 1
    for (; tiles > 0; --tiles, ring.advance()) {
      barrier_wait(b.key_full + 8 * ring.stage(), ring.parity());
      barrier_wait(b.value_full + 8 * ring.stage(), ring.parity());
      __syncwarp();
      turns.await();
      turns.pass();
      release(b.key_empty + 8 * ring.stage());
      release(b.value_empty + 8 * ring.stage());
    }
  };

  for (u32 n = 0;; ++n) {
    const int4 received = queue.receive();
    const Tile tile = {uniform(received.x), uniform(received.y), uniform(received.z), uniform(received.w)};
    if (tile.query < 0) break;
    const int first_row = tile.query + 64 * group, last = last_of(p, tile);
    if (WARPGROUPS > 1 && first_row >= p.length) {  // nothing but what others share
      barrier_wait(b.query_full + 8 * group, n & 1);
      __syncwarp();
      release(b.query_empty + 8 * group);
      skip(last - tile.first + 1);
      continue;
    }
    const int row = first_row + warp * 16 + lane / 4;
    const int low[2] = {first_visible(p, tile.batch, row), first_visible(p, tile.batch, row + 8)};
    const int last_low = uniform(first_visible(p, tile.batch, min(first_row + 63, p.length - 1)));
    int key = first_row / KEYS, own_first = tile.first;
    // Within bounds whatever the edges are, so that a block always ends.
    if (WARPGROUPS > 1) own_first = max(min(uniform(first_visible(p, tile.batch, first_row)) / KEYS, key), own_first);
    if (WARPGROUPS > 1) skip(last - key);

    float score[kScores], sums[kSums];
    u32 weight[kWeights];
    Rows rows;
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] = 0;

    const u32 queries = memory + group * kQueryBytes;
    barrier_wait(b.query_full + 8 * group, n & 1);
    barrier_wait(b.key_full + 8 * ring.stage(), ring.parity());
    turns.await();
    wgmma_fence();
    multiply_keys(score, queries, memory + kKeysAt + ring.stage() * kKeyBytes);
    wgmma_commit();
    turns.pass();
    wgmma_wait<0>();
    keep_after_wait(score);
    release(b.key_empty + 8 * ring.stage());
    if (key == own_first) release(b.query_empty + 8 * group);
    hide(score, key * KEYS, first_row, last_low, row, low);
    highest(score, rows.highest);  // above -inf: each row sees its own key
#pragma unroll
    for (int h = 0; h < 2; ++h) rows.highest[h] *= p.exponent;
    weigh(score, p.exponent, rows, rows.total);
    pack(score, weight);
    ring.advance();

#pragma unroll 1
    for (--key; key >= own_first; --key, ring.advance()) {
      const u32 before = ring.stage_before(), before_parity = (ring.n - 1) / STAGES & 1;
      barrier_wait(b.key_full + 8 * ring.stage(), ring.parity());
      turns.await();
      wgmma_fence();
      multiply_keys(score, queries, memory + kKeysAt + ring.stage() * kKeyBytes);
      wgmma_commit();
      barrier_wait(b.value_full + 8 * before, before_parity);
      wgmma_fence();  // else ptxas puts one behind the wait's loop, and waits for each product
      multiply_values(sums, weight, memory + kValuesAt + before * kValueBytes);
      wgmma_commit();
      turns.pass();
      wgmma_wait<1>();
      keep_after_wait(score);
      release(b.key_empty + 8 * ring.stage());
      if (key == own_first) release(b.query_empty + 8 * group);
      hide(score, key * KEYS, first_row, last_low, row, low);
      float top[2], step[2];
      highest(score, top);
      bool beyond = false;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        top[h] *= p.exponent;
        beyond |= top[h] > rows.highest[h];
      }
      beyond = __any_sync(0xffffffff, beyond);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        top[h] = beyond ? fmaxf(top[h], rows.highest[h]) : rows.highest[h];
        step[h] = rows.highest[h] - top[h];
        rows.highest[h] = top[h];
      }
      float part[2];
      weigh(score, p.exponent, rows, part);
      stay_before(part[0] + part[1]);
      if (beyond) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          step[h] = exp2_fast(step[h]);
          rows.total[h] *= step[h];
        }
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) rows.total[h] += part[h];
      wgmma_wait<0>();
      keep_after_wait(sums);
      release(b.value_empty + 8 * before);
      if (beyond) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) sums[i] *= step[i % 4 / 2];
      }
      pack(score, weight);
    }
    const u32 before = ring.stage_before();
    barrier_wait(b.value_full + 8 * before, (ring.n - 1) / STAGES & 1);
    wgmma_fence();
    multiply_values(sums, weight, memory + kValuesAt + before * kValueBytes);
    wgmma_commit();
    wgmma_wait<0>();
    keep_after_wait(sums);
    release(b.value_empty + 8 * before);
    if (WARPGROUPS > 1) skip(own_first - tile.first);
    finish(p, tile, sums, rows, staging, first_row + warp * 16);
  }
  turns.end();
  tma_store_wait<0>();
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, PER_SM) attention_forward(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const u32 memory = shared_address(shared);
  const Barriers barriers(memory + kBarriersAt);
  const TileQueue queue(barriers.queue);
  if (threadIdx.x == 0) {
    prefetch_map(&p.q);
    prefetch_map(&p.k);
    prefetch_map(&p.v);
    for (int s = 0; s < STAGES; ++s) {
      barrier_init(barriers.key_full + 8 * s, 1);
      barrier_init(barriers.key_empty + 8 * s, WARPGROUPS * 4);
      barrier_init(barriers.value_full + 8 * s, 1);
      barrier_init(barriers.value_empty + 8 * s, WARPGROUPS * 4);
    }
    for (int group = 0; group < WARPGROUPS; ++group) {
      barrier_init(barriers.query_full + 8 * group, 1);
      barrier_init(barriers.query_empty + 8 * group, 4);
    }
    queue.init(WARPGROUPS * 128 + 3);
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    registers_shrink<kProducerRegisters>();
    if (threadIdx.x == 0) produce_keys(p, memory, barriers, queue);
    if (threadIdx.x == 32) produce_values(p, memory, barriers, queue);
    if (threadIdx.x == 64) produce_queries(p, memory, barriers, queue);
  } else {
    registers_grow<kConsumerRegisters>();
    consume(p, memory, barriers, queue);
  }
}
