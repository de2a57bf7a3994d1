// The router's logits: x · weightᵀ of a bf16 x and an fp32 weight, which comes as three bf16 parts that sum to it, in one
// pass over the tokens.
//
// Persistent and warp-specialised. Warpgroup 0 fills a ring of shared-memory stages by TMA: a tile of x, and the same
// columns of all three parts of the weight. Warpgroups 1 and 2 multiply 64 tokens each. The first parts have a sum of their
// own: tensor cores cut a sum's last bits off at each addition, and so do it once in 16 columns and not three times.
//
// Compile-time choices (-D):
//   TILE_N     64 or 128 experts a CTA
//   STAGES     depth of the ring
// Letters: T tokens, D model width, E experts.
#include "sm90.cuh"

struct Params {
  TensorMap x;       // (T, D), box 128 × 64
  TensorMap weight;  // (E, 3, D), box TILE_N × 1 × 64
  float* logits;     // (T, E)
  int n_tokens;
  int n_experts;
  int width;  // D
  int n_tiles;
};

namespace {

constexpr int kK = 64;  // columns of x a stage: one 128-byte swizzle row
constexpr int kParts = 3;
constexpr int kWarpgroups = 2;
constexpr int kTileTokens = 64 * kWarpgroups;
constexpr int kStageX = kTileTokens * kK * 2;
constexpr int kPart = TILE_N * kK * 2;
constexpr int kStage = kStageX + kParts * kPart;
constexpr int kDeeper = 32 >> 4;  // 16 columns on, in descriptor units
constexpr int kProducerRegisters = 40;
constexpr int kConsumerRegisters = (504 - kProducerRegisters) / 2;

struct Tile {
  int token, expert;  // its first ones
};

// Tiles of the same tokens follow each other, so that L2 has them for all experts.
__device__ __forceinline__ Tile tile_at(const Params& p, int number) {
  const int across = (p.n_experts + TILE_N - 1) / TILE_N;
  return {number / across * kTileTokens, number % across * TILE_N};
}

// Warpgroup 0's first thread.
__device__ __forceinline__ void produce(const Params& p, u32 stages, u32 full, u32 empty) {
  const int n_steps = (p.width + kK - 1) / kK;
  Ring<STAGES> ring;
  for (int number = blockIdx.x; number < p.n_tiles; number += gridDim.x) {
    const Tile tile = tile_at(p, number);
    for (int step = 0; step < n_steps; ++step, ring.advance()) {
      const u32 to = stages + ring.stage() * kStage, ready = full + 8 * ring.stage();
      barrier_wait(empty + 8 * ring.stage(), ring.parity() ^ 1);
      barrier_expect(ready, kStage);  // what lies outside of a tensor counts too, as zeros
      tma_load(to, &p.x, ready, step * kK, tile.token);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        tma_load(to + kStageX + part * kPart, &p.weight, ready, step * kK, part, tile.expert);
      }
    }
  }
}

// A warp's 16 tokens. Fragments' element [4 j + i]: row lane / 4 (+ 8 for i > 1), column 8 j + 2 (lane % 4) + i % 2.
__device__ __forceinline__ void write(const Params& p, int token, int expert, const float (&first)[TILE_N / 2],
                                      const float (&rest)[TILE_N / 2]) {
  const int lane = lane_now();
  const int column = expert + lane % 4 * 2;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = token + lane / 4 + 8 * h;
    const int left = row < p.n_tokens ? p.n_experts - column : 0;  // logits from here to the row's end
    float* to = p.logits + static_cast<u64>(row) * p.n_experts + column;
    float sum[TILE_N / 4];
#pragma unroll
    for (int j = 0; j < TILE_N / 8; ++j) {
      sum[2 * j] = first[4 * j + 2 * h] + rest[4 * j + 2 * h];
      sum[2 * j + 1] = first[4 * j + 2 * h + 1] + rest[4 * j + 2 * h + 1];
    }
    if (p.n_experts % 2 == 0) {  // rows start at multiples of 8 bytes
#pragma unroll
      for (int j = 0; j < TILE_N / 8; ++j) {
        if (8 * j < left) *reinterpret_cast<float2*>(to + 8 * j) = make_float2(sum[2 * j], sum[2 * j + 1]);
      }
    } else {
#pragma unroll
      for (int j = 0; j < TILE_N / 8; ++j) {
        if (8 * j < left) to[8 * j] = sum[2 * j];
        if (8 * j + 1 < left) to[8 * j + 1] = sum[2 * j + 1];
      }
    }
  }
}

// Warpgroups 1 and 2.
__device__ __forceinline__ void consume(const Params& p, u32 stages, u32 full, u32 empty) {
  // Shuffled so that ptxas knows it for the same in all lanes: wgmma's descriptors then stay in uniform registers.
  const int group = __shfl_sync(0xffffffff, threadIdx.x / 128 - 1, 0);
  const int n_steps = (p.width + kK - 1) / kK;
  constexpr u32 kNext = 1;  // not used by a K-major operand

  auto release = [&](u32 stage) {
    if (lane_now() == 0) barrier_arrive(empty + 8 * stage);
  };

  Ring<STAGES> ring;
  for (int number = blockIdx.x; number < p.n_tiles; number += gridDim.x) {
    float first[TILE_N / 2], rest[TILE_N / 2];
    u32 last = 0;
    for (int step = 0; step < n_steps; ++step, ring.advance()) {
      barrier_wait(full + 8 * ring.stage(), ring.parity());
      const u32 at = stages + ring.stage() * kStage;
      const u64 a = wgmma_descriptor(at + group * 8192, kNext);
      const u64 b = wgmma_descriptor(at + kStageX, kNext);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kK / 16; ++k) {
        wgmma<0, 0>(first, a + k * kDeeper, b + k * kDeeper, step | k);
#pragma unroll
        for (int part = 1; part < kParts; ++part) {
          wgmma<0, 0>(rest, a + k * kDeeper, b + part * (kPart >> 4) + k * kDeeper, step | k | (part - 1));
        }
      }
      wgmma_commit();
      wgmma_wait<1>();
      if (step > 0) release(last);
      last = ring.stage();
    }
    wgmma_wait<0>();
    release(last);
    keep_after_wait(first);
    keep_after_wait(rest);
    const Tile tile = tile_at(p, number);
    write(p, tile.token + (warp_now() - 4) * 16, tile.expert, first, rest);
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(384, 1) router_product(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const u32 stages = shared_address(memory);
  const u32 full = stages + STAGES * kStage, empty = full + 8 * STAGES;
  if (threadIdx.x == 0) {
    prefetch_map(&p.x);
    prefetch_map(&p.weight);
    for (int s = 0; s < STAGES; ++s) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, kWarpgroups * 4);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    registers_shrink<kProducerRegisters>();
    if (threadIdx.x == 0) produce(p, stages, full, empty);
  } else {
    registers_grow<kConsumerRegisters>();
    consume(p, stages, full, empty);
  }
}
