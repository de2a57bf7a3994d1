// Grouped weight gradient: into[e] (+)= a[rows of e]ᵀ · b[rows of e], bf16 in, fp32 accumulation and fp32 out.
//
// The reduction runs over an expert's rows, so both operands lie in shared memory with the reduction strided, and wgmma
// transposes them. One operand may be gathered by index (cp.async, zeros past the expert's last row); the other comes by
// TMA. Persistent and warp-specialised as grouped_gemm_sm90.cu. Every tile of every expert is written: an expert without
// rows gets zeros, or keeps what it has when adding.
//
// plan_wgrad.cu says in which order experts come, and which are cut into pieces of their rows: tiles of a piece are added to
// those of the piece before once these are there. They were taken earlier, by blocks that run, so that all end.
//
// Rows past an expert's last one are multiplied by the gathered operand's zeros, so they must be finite.
//
// Compile-time choices (-D):
//   GATHER   A or B (0 or 1): the gathered operand
//   TILE_M   128 or 256 columns of a
//   TILE_N   128 or 256 columns of b
//   STAGES   depth of the ring
//   ADD      1 adds to `into`, 0 overwrites it
// Letters: R rows, M and N columns of a and b.
#include "tile_queue.cuh"

struct Params {
  TensorMap dense;     // (R, M or N) of the operand that is not gathered, box 64 × 64
  TensorMap out;       // `into`, box 1 × 16 × 32
  const bf16* source;  // (T, N or M) of the gathered one
  const int* token;    // (R): its row in `source`
  const int4* plan;    // of plan_wgrad.cu
  unsigned* counter;   // of this product's tiles
  unsigned* turn;      // (e, n_tiles_m, n_tiles_n), of an expert in pieces: the warps that have added theirs, from 0
  float* into;         // (e, M, N), for what has no rows
  int m;
  int n;
  int n_tiles_m;  // of an expert
  int n_tiles_n;
};

namespace {

constexpr int kK = 64;  // rows a stage
constexpr int kWarpgroups = 2;
constexpr int kRowGroups = TILE_M / 128;  // 64-row products a warpgroup
constexpr int kStageA = TILE_M * kK * 2;
constexpr int kStageB = TILE_N * kK * 2;
constexpr int kStage = kStageA + kStageB;
constexpr int kGathered = GATHER ? TILE_N : TILE_M;
constexpr int kDense = GATHER ? TILE_M : TILE_N;
constexpr int kSub = 64 * kK * 2;  // bytes of 64 columns of a stage
constexpr int kChunk = 16 * 128;   // a warp's 16 rows of 32 columns, swizzled
constexpr int kStaging = 2 * kChunk;                       // one is filled while the other is read
constexpr int kBarriers = STAGES * kStage + 8 * kStaging;  // offset of the barriers

struct Tile {
  int expert, first, rows, m, n;
  unsigned before;  // pieces of the expert that come earlier
  bool more;        // whether another follows
};

constexpr int kEnd = -1;  // rows of what comes after the last tile

// In 16 bytes: an expert, and the tile's place as two numbers, are below 2^16, and an expert's pieces below 2^15.
__device__ __forceinline__ Tile as_tile(int4 v) {
  const unsigned piece = static_cast<unsigned>(v.x) >> 16;
  return {v.x & 0xffff, v.y, v.z, (v.w >> 16) * TILE_M, (v.w & 0xffff) * TILE_N, piece >> 1, (piece & 1) != 0};
}

// `n`: entries of the plan.
__device__ __forceinline__ int take_number(const Params& p, int n) {
  return TileQueue::take(p.counter, n * p.n_tiles_m * p.n_tiles_n);
}

__device__ __forceinline__ int4 look_up(const Params& p, int n, int t) {
  const int tiles = p.n_tiles_m * p.n_tiles_n, entry = t / tiles, rest = t - entry * tiles, m = rest / p.n_tiles_n;
  if (entry >= n) return make_int4(0, 0, kEnd, 0);
  const int4 v = p.plan[1 + entry];
  return make_int4(v.x | v.w << 16, v.y, v.z, m << 16 | rest - m * p.n_tiles_n);
}

// One stage of the gathered operand. A thread copies one 16-byte column of every 16th row, and of every 64 columns.
template <bool WHOLE>
__device__ __forceinline__ void gather(u32 to, const char* from, u32 pitch, const int (&token)[4], int rows, int columns) {
  u64 at[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) at[i] = address_at(from, u32(token[i]) * pitch);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int box = 0; box < kGathered / 64; ++box) {
      copy_async_16<WHOLE>(to + box * kSub + i * 2048, at[i] + box * 128, 16 * i < rows && 64 * box < columns);
    }
  }
}

// Warpgroup 0.
__device__ __forceinline__ void produce(const Params& p, u32 stages, u32 full, u32 empty, TileQueue queue) {
  const int thread = threadIdx.x;
  const int width = GATHER ? p.n : p.m;
  const int row = thread / 8, chunk = thread % 8;
  const u32 place = stages + (GATHER ? kStageA : 0) + row * 128 + ((chunk ^ (row & 7)) << 4);
  Ring<STAGES> ring;
  const int n = thread == 0 ? p.plan[0].x : 0;
  if (thread == 0) queue.send(look_up(p, n, take_number(p, n)), 0);
  while (true) {
    const Tile tile = as_tile(queue.receive());
    if (tile.rows == kEnd) break;
    const int next_tile = thread == 0 ? take_number(p, n) : 0;  // waited for once this tile's copies are on their way
    const int start = GATHER ? tile.n : tile.m, column = start + chunk * 8;
    const char* from = reinterpret_cast<const char*>(p.source + column);
    const bool wide = start + kGathered <= width;
    const int n_steps = (tile.rows + kK - 1) / kK;
    // Row numbers are read one stage ahead; past the last row the last one's stands in, and nothing is copied.
    const int* tokens = p.token + tile.first;
    int next[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) next[i] = n_steps > 0 ? tokens[min(row + 16 * i, tile.rows - 1)] : 0;
    for (int step = 0; step < n_steps; ++step, ring.advance()) {
      const u32 offset = ring.stage() * kStage, ready = full + 8 * ring.stage();
      int token[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        token[i] = next[i];
        next[i] = tokens[min((step + 1) * kK + row + 16 * i, tile.rows - 1)];
      }
      barrier_wait(empty + 8 * ring.stage(), ring.parity() ^ 1);
      if (thread == 0) {
        barrier_expect(ready, kDense * kK * 2);
#pragma unroll
        for (int box = 0; box < kDense / 64; ++box) {
          tma_load(stages + offset + (GATHER ? 0 : kStageA) + box * kSub, &p.dense, ready,
                   (GATHER ? tile.m : tile.n) + box * 64, tile.first + step * kK);
        }
      }
      const int left = tile.rows - step * kK;
      if (left >= kK && wide) {
        gather<true>(place + offset, from, width * 2, token, 0, 0);
      } else {
        gather<false>(place + offset, from, width * 2, token, left - row, width - column);
      }
      copy_async_arrive(ready);
    }
    if (thread == 0) queue.send(look_up(p, n, next_tile), queue.n);
  }
  copy_async_wait();
}

// The turns of an expert's pieces at a tile: a warp's copies into `into` come after those of all warps of earlier pieces.
// Copies are the async proxy's, and turns are not: each side has to order the two.
__device__ __forceinline__ void await_turn(const unsigned* turn, unsigned warps) {
  unsigned done;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(done) : "l"(turn) : "memory");
  } while (done < warps);
  fence_proxy_async_global();
}

__device__ __forceinline__ void pass_turn(unsigned* turn) {
  bulk_store_wait();
  fence_proxy_async_global();
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(turn) : "memory");
}

// 16 rows of the product, to memory by TMA. acc[4 j + i]: row lane / 4 (+ 8 for i > 1), column 8 j + 2 (lane % 4) + i % 2.
__device__ __forceinline__ void finish(const Params& p, const Tile& tile, const float (&acc)[TILE_N / 2], u32 staging,
                                       int row) {
  const u32 lane = lane_now();
  const bool add = ADD || tile.before > 0;
#pragma unroll
  for (int c = 0; c < TILE_N / 32; ++c) {
    const u32 chunk = staging + c % 2 * kChunk;
    tma_store_wait<1>();
    __syncwarp();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const u32 at = chunk + lane / 4 * 128 + (((2 * j + lane % 4 / 2) ^ lane / 4) << 4) + lane % 2 * 8;
      store_shared_8(at, acc[16 * c + 4 * j], acc[16 * c + 4 * j + 1]);
      store_shared_8(at + 8 * 128, acc[16 * c + 4 * j + 2], acc[16 * c + 4 * j + 3]);
    }
    fence_proxy_async();
    __syncwarp();
    if (lane == 0) {
      if (add) {
        tma_add(&p.out, chunk, tile.n + c * 32, row, tile.expert);
      } else {
        tma_store(&p.out, chunk, tile.n + c * 32, row, tile.expert);
      }
    }
    tma_store_commit();
  }
}

// An expert without rows.
__device__ __forceinline__ void clear(const Params& p, const Tile& tile) {
  const int consumer = threadIdx.x - 128;
  for (int i = consumer * 4; i < TILE_M * TILE_N; i += kWarpgroups * 128 * 4) {
    const int m = tile.m + i / TILE_N, n = tile.n + i % TILE_N;
    if (m < p.m && n < p.n) {
      *reinterpret_cast<float4*>(p.into + (long(tile.expert) * p.m + m) * p.n + n) = make_float4(0, 0, 0, 0);
    }
  }
}

// Warpgroups 1 and 2.
__device__ __forceinline__ void consume(const Params& p, u32 stages, u32 full, u32 empty, TileQueue queue) {
  const int group = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 % 4;
  const u32 staging = stages + STAGES * kStage + (group * 4 + warp) * kStaging;
  constexpr int kDeeper = 2048 >> 4;  // 16 rows on, in descriptor units

  auto release = [&](u32 stage) {
    if (threadIdx.x % 32 == 0) barrier_arrive(empty + 8 * stage);
  };

  Ring<STAGES> ring;
  while (true) {
    const Tile tile = as_tile(queue.receive());
    if (tile.rows == kEnd) break;
    if (tile.rows == 0) {
      if (!ADD) clear(p, tile);
      continue;
    }
    const int n_steps = (tile.rows + kK - 1) / kK;
    float acc[kRowGroups][TILE_N / 2];
    u32 last = 0;
    for (int step = 0; step < n_steps; ++step, ring.advance()) {
      barrier_wait(full + 8 * ring.stage(), ring.parity());
      fence_proxy_async();
      const u32 at = stages + ring.stage() * kStage;
      const u64 a = wgmma_descriptor(at + group * kRowGroups * kSub, kSub);
      const u64 b = wgmma_descriptor(at + kStageA, kSub);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kK / 16; ++k) {
#pragma unroll
        for (int m = 0; m < kRowGroups; ++m) {
          wgmma<1, 1>(acc[m], a + m * (kSub >> 4) + k * kDeeper, b + k * kDeeper, step | k);
        }
      }
      wgmma_commit();
      wgmma_wait<1>();
      if (step > 0) release(last);
      last = ring.stage();
    }
    wgmma_wait<0>();
    release(last);
#pragma unroll
    for (int m = 0; m < kRowGroups; ++m) keep_after_wait(acc[m]);
    unsigned* const turn = p.turn + (tile.expert * p.n_tiles_m + tile.m / TILE_M) * p.n_tiles_n + tile.n / TILE_N;
    if (tile.before > 0 && lane_now() == 0) await_turn(turn, tile.before * kWarpgroups * 4);
#pragma unroll
    for (int m = 0; m < kRowGroups; ++m) {
      finish(p, tile, acc[m], staging, tile.m + (group * kRowGroups + m) * 64 + warp * 16);
    }
    if (tile.more) {
      if (lane_now() == 0) pass_turn(turn);
      __syncwarp();
    }
  }
  tma_store_wait<0>();
}

}  // namespace

extern "C" __global__ void __launch_bounds__(384, 1) grouped_wgrad(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const u32 stages = shared_address(memory);
  const u32 full = stages + kBarriers, empty = full + 8 * STAGES;
  const TileQueue queue(empty + 8 * STAGES);
  if (threadIdx.x == 0) {
    prefetch_map(&p.dense);
    prefetch_map(&p.out);
    for (int s = 0; s < STAGES; ++s) {
      barrier_init(full + 8 * s, 1 + 128);
      barrier_init(empty + 8 * s, kWarpgroups * 4);
    }
    queue.init(kWarpgroups * 128 + 128);
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    registers_shrink<56>();
    produce(p, stages, full, empty, queue);
  } else {
    registers_grow<224>();
    consume(p, stages, full, empty, queue);
  }
}
