// Sums over rows of partial sums, and puts them where a gain's gradient goes: each column's in one order, so that same
// inputs give same bits. Macro: MOST_PARTIALS, rows there may be.
#include "bf16.cuh"

constexpr u32 WARPS = 32;
constexpr u32 COLUMNS = 32;  // of a block: a warp reads one row of them
constexpr u32 PER_WARP = (MOST_PARTIALS + WARPS - 1) / WARPS;
constexpr u32 ROUND = 0, ADD = 2;  // else fp32 that overwrites

struct NormGainParams {
  const float* partial;  // (partials, width)
  void* out;             // bf16 for ROUND, else fp32
  u32 partials;
  u32 width;
  u32 how;
};

extern "C" __global__ void __launch_bounds__(32 * WARPS) norm_gain(const __grid_constant__ NormGainParams p) {
  __shared__ float sums[WARPS][COLUMNS + 1];
  const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const u32 writes = blockIdx.x * COLUMNS + warp, reads = blockIdx.x * COLUMNS + lane;
  const bool writer = lane == 0 && writes < p.width;
  float before = 0.0f;
  if (writer && p.how == ADD) before = static_cast<const float*>(p.out)[writes];
  float sum = 0.0f;
  if (reads < p.width) {
    // All loads leave before the first is waited for.
    float part[PER_WARP];
#pragma unroll
    for (u32 i = 0; i < PER_WARP; ++i) {
      const u32 row = i * WARPS + warp;
      part[i] = row < p.partials ? p.partial[row * p.width + reads] : 0.0f;
    }
#pragma unroll
    for (u32 i = 0; i < PER_WARP; ++i) sum += part[i];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  sum = sums[lane][warp];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (!writer) return;
  if (p.how == ROUND)
    static_cast<bf16*>(p.out)[writes] = round_bf16(sum);
  else
    static_cast<float*>(p.out)[writes] = p.how == ADD ? before + sum : sum;
}
