// Causal attention's gradient of the queries from kept gradients of the scores: dq[i] = scale · sum over keys j of
// ds[j, i] · k[j], bf16 in, fp32 accumulation, bf16 out. A plain product: attention_dkdv_sm90.cu has left zeros for
// hidden pairs in every block of 128 keys by 128 queries that holds a visible one; no other block is multiplied here.
//
// Both operands lie in shared memory with the reduction strided. Persistent: a tile is 256 queries of a head, 128 for
// each of two warpgroups, whose ranges of keys differ at both ends; one thread of a third warpgroup copies by TMA.
//
// Compile-time choices (-D):
//   WIDTH   128 or 192 columns of queries and keys, at most
//   FOLD    how the workspace is laid out (place_of)
//   STAGES  depth of the ring
// Letters: B batch, H heads, S positions, d columns of queries and keys.
#include "attention_sm90.cuh"
#include "tile_queue.cuh"

struct Params {
  TensorMap dscore;   // workspace (heads of this launch, rows, columns), box 64 × 64
  TensorMap k;        // (B, H, S, d), box 64 × 64
  TensorMap dq;       // (B, H, S, d), box 16 × 64
  const int* start;   // (B, S): the first key of the query's document; null: there are no documents
  unsigned* counter;  // of tiles taken: 0, before and after
  float scale;
  int heads;
  int length;
  int window;
  int first_head;  // of all B × H
  int n_heads;     // of this launch
};

namespace {

constexpr int kBlock = 128;  // keys and queries of the workspace's blocks
constexpr int kTile = 256;   // queries
constexpr int kK = 64;       // keys a stage
constexpr int kSub = 64 * kK * 2;
constexpr int kStage = (kTile + WIDTH) / 64 * kSub;
constexpr int kChunk = 16 * 128;
constexpr int kBarriers = STAGES * kStage + 8 * 2 * kChunk;
constexpr int kGroup = 16;  // heads whose keys are in L2 together

struct Tile {
  int mine, batch, head, query;  // `mine`: of this launch
  int first, last;               // steps of 64 keys: of all queries, `last` not included
};

// Blocks of 128 keys that queries of block `block` see.
__device__ __forceinline__ int first_block(const Params& p, int batch, int block) {
  const int query = min(block * kBlock, p.length - 1);
  int key = max(query - p.window + 1, 0);
  if (p.start) key = max(key, p.start[long(batch) * p.length + query]);
  return min(key, query) / kBlock;
}

// Heads in groups, whose keys L2 holds; in a group the longest first.
__device__ __forceinline__ Tile tile_of(const Params& p, int t) {
  const int blocks = (p.length + kBlock - 1) / kBlock, tiles = (blocks + 1) / 2;
  const int group = t / (kGroup * tiles), in_group = min(kGroup, p.n_heads - group * kGroup);
  const int rest = t - group * kGroup * tiles, place = rest / in_group;
  Tile tile;
  tile.mine = group * kGroup + rest - place * in_group;
  const int number = p.first_head + tile.mine;
  tile.batch = number / p.heads, tile.head = number - tile.batch * p.heads;
  tile.query = (tiles - 1 - place) * kTile;
  const int block = tile.query / kBlock;
  tile.first = 2 * first_block(p, tile.batch, block);
  tile.last = 2 * min(block + 2, blocks);
  return tile;
}

// Row of a block of keys in the workspace, and how far a query's column is ahead of its number.
__device__ __forceinline__ int2 place_of(const Params& p, int block) {
  const int blocks = (p.length + kBlock - 1) / kBlock;
  if (FOLD && 2 * block < blocks) return make_int2(block * kBlock, kBlock);
  return make_int2((FOLD ? blocks - 1 - block : block) * kBlock, -block * kBlock);
}

__device__ __forceinline__ int tile_count(const Params& p) {
  return p.n_heads * (((p.length + kBlock - 1) / kBlock + 1) / 2);
}

// One thread.
__device__ __forceinline__ void produce(const Params& p, u32 stages, u32 full, u32 empty, TileQueue queue) {
  Ring<STAGES> ring;
  const int n = tile_count(p);
  int t = TileQueue::take(p.counter, n);
  for (u32 sent = 0;; ++sent) {
    queue.send(make_int4(t, 0, 0, 0), sent);
    if (t >= n) break;
    const Tile tile = tile_of(p, t);
    t = TileQueue::take(p.counter, n);  // waited for once this tile's copies are on their way
    for (int step = tile.first; step < tile.last; ++step, ring.advance()) {
      const u32 to = stages + ring.stage() * kStage, ready = full + 8 * ring.stage();
      const int2 place = place_of(p, step / 2);
      barrier_wait(empty + 8 * ring.stage(), ring.parity() ^ 1);
      barrier_expect(ready, kStage);
#pragma unroll
      for (int box = 0; box < kTile / 64; ++box) {
        tma_load(to + box * kSub, &p.dscore, ready, tile.query + box * 64 + place.y, place.x + step % 2 * kK, tile.mine);
      }
#pragma unroll
      for (int box = 0; box < WIDTH / 64; ++box) {
        tma_load(to + (kTile / 64 + box) * kSub, &p.k, ready, box * 64, step * kK, tile.head, tile.batch);
      }
    }
  }
}

// A warp's 16 rows of a tile, rounded to bf16, to memory.
__device__ __forceinline__ void finish(const Params& p, const Tile& tile, const float (&acc)[WIDTH / 2], u32 staging, int part,
                                       int row) {
  const u32 lane = lane_now();
#pragma unroll
  for (int c = 0; c < WIDTH / 64; ++c) {
    const u32 chunk = staging + (part * (WIDTH / 64) + c) % 2 * kChunk;
    tma_store_wait<1>();
    __syncwarp();
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      const int i = c * 32 + j * 4;
      store_matrix_x4(chunk + fragment_at(lane, j),
                      pack_bf16(acc[i] * p.scale, acc[i + 1] * p.scale), pack_bf16(acc[i + 2] * p.scale, acc[i + 3] * p.scale),
                      pack_bf16(acc[i + 4] * p.scale, acc[i + 5] * p.scale),
                      pack_bf16(acc[i + 6] * p.scale, acc[i + 7] * p.scale));
    }
    fence_proxy_async();
    __syncwarp();
    if (lane == 0 && row < p.length) tma_store(&p.dq, chunk, c * 64, row, tile.head, tile.batch);
    tma_store_commit();
  }
}

__device__ __forceinline__ void consume(const Params& p, u32 stages, u32 full, u32 empty, TileQueue queue) {
  const int group = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 % 4;
  const u32 staging = stages + STAGES * kStage + (group * 4 + warp) * 2 * kChunk;
  constexpr int kDeeper = 2048 >> 4;  // 16 keys on, in descriptor units
  auto release = [&](u32 stage) {
    if (threadIdx.x % 32 == 0) barrier_arrive(empty + 8 * stage);
  };
  Ring<STAGES> ring;
  const int n = tile_count(p);
  while (true) {
    const int t = queue.receive().x;
    if (t >= n) break;
    const Tile tile = tile_of(p, t);
    const int block = tile.query / kBlock + group;
    const bool exists = block * kBlock < p.length;
    // Within the tile's steps whatever the documents are, so that a block always ends.
    const int begin = exists ? max(2 * first_block(p, tile.batch, block), tile.first) : tile.last;
    const int end = exists ? 2 * (block + 1) : tile.last;
    float acc[2][WIDTH / 2];
    for (int step = tile.first; step < begin; ++step, ring.advance()) {
      barrier_wait(full + 8 * ring.stage(), ring.parity());
      __syncwarp();
      release(ring.stage());
    }
    u32 last = 0;
    for (int step = begin; step < end; ++step, ring.advance()) {
      barrier_wait(full + 8 * ring.stage(), ring.parity());
      const u32 at = stages + ring.stage() * kStage;
      const u64 a = wgmma_descriptor(at + group * 2 * kSub, kSub), b = wgmma_descriptor(at + kTile / 64 * kSub, kSub);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kK / 16; ++k) {
#pragma unroll
        for (int m = 0; m < 2; ++m) wgmma<1, 1>(acc[m], a + m * (kSub >> 4) + k * kDeeper, b + k * kDeeper, (step - begin) | k);
      }
      wgmma_commit();
      wgmma_wait<1>();
      if (step > begin) release(last);
      last = ring.stage();
    }
    wgmma_wait<0>();
    if (begin < end) release(last);
#pragma unroll
    for (int m = 0; m < 2; ++m) keep_after_wait(acc[m]);
    for (int step = end; step < tile.last; ++step, ring.advance()) {
      barrier_wait(full + 8 * ring.stage(), ring.parity());
      __syncwarp();
      release(ring.stage());
    }
    if (exists) {
#pragma unroll
      for (int m = 0; m < 2; ++m) finish(p, tile, acc[m], staging, m, tile.query + group * 128 + m * 64 + warp * 16);
    }
  }
  tma_store_wait<0>();
}

}  // namespace

extern "C" __global__ void __launch_bounds__(384, 1) attention_dq(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const u32 stages = shared_address(memory), full = stages + kBarriers, empty = full + 8 * STAGES;
  const TileQueue queue(empty + 8 * STAGES);
  if (threadIdx.x == 0) {
    prefetch_map(&p.dscore);
    prefetch_map(&p.k);
    prefetch_map(&p.dq);
    for (int s = 0; s < STAGES; ++s) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, 8);
    }
    queue.init(256);
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    registers_shrink<40>();
    if (threadIdx.x == 0) produce(p, stages, full, empty, queue);
  } else {
    registers_grow<232>();
    consume(p, stages, full, empty, queue);
  }
}
