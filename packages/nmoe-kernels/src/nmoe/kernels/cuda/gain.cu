// Sums over rows of partial sums, and puts them where the gradients of gains go: each column's in one order, so that same
// inputs give same bits. Macros: GAINS, whose columns stand side by side in a row; BATCH, rows that a thread reads at once.
#include "bf16.cuh"

constexpr u32 WARPS = 32;
constexpr u32 COLUMNS = 32;  // of a block: a warp reads one row of them
constexpr u32 ROUND = 0, ADD = 2;  // else fp32 that overwrites

struct GainParams {
  const float* partial;  // (partials, GAINS, width)
  void* out[GAINS];      // bf16 for ROUND, else fp32; null: not wanted
  u32 how[GAINS];
  u32 partials;
  u32 width;
};

extern "C" __global__ void __launch_bounds__(32 * WARPS) gain(const __grid_constant__ GainParams p) {
  __shared__ float sums[WARPS][COLUMNS + 1];
  const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, width = GAINS * p.width;
  const u32 writes = blockIdx.x * COLUMNS + warp, reads = blockIdx.x * COLUMNS + lane;
  const u32 which = GAINS > 1 && writes >= p.width, column = writes - which * p.width;
  const bool writer = lane == 0 && writes < width && p.out[which] != nullptr;
  float before = 0.0f;
  if (writer && p.how[which] == ADD) before = static_cast<const float*>(p.out[which])[column];
  float sum = 0.0f;
  if (reads < width) {
    for (u32 first = warp; first < p.partials; first += BATCH * WARPS) {
      // All loads of a batch leave before the first is waited for.
      float part[BATCH];
#pragma unroll
      for (u32 i = 0; i < BATCH; ++i) {
        const u32 row = first + i * WARPS;
        part[i] = row < p.partials ? p.partial[static_cast<unsigned long long>(row) * width + reads] : 0.0f;
      }
#pragma unroll
      for (u32 i = 0; i < BATCH; ++i) sum += part[i];
    }
  }
  sums[warp][lane] = sum;
  __syncthreads();
  sum = sums[lane][warp];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (!writer) return;
  if (p.how[which] == ROUND)
    static_cast<bf16*>(p.out[which])[column] = round_bf16(sum);
  else
    static_cast<float*>(p.out[which])[column] = p.how[which] == ADD ? before + sum : sum;
}
