// The 2-norm of many tensors as one vector: each block sums squares of a fixed part of every tensor, then one block sums
// what they found, in one order. The parts depend on no GPU: same inputs, same bits.
#include "stream.cuh"

constexpr int TENSORS = 32;   // of a launch
constexpr int BLOCKS = 1056;  // eight for each multiprocessor of an H100; as the host has it
constexpr int THREADS = 256;
constexpr int IN_FLIGHT = 8;

struct SquaresParams {
  const float* tensor[TENSORS];
  u64 n[TENSORS];
  float* partial;  // BLOCKS
  int tensors;
};

template <typename T>
__device__ __forceinline__ T block_sum(T mine) {
  __shared__ T warps[THREADS / 32];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) mine = mine + __shfl_down_sync(~0u, mine, step);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = mine;
  __syncthreads();
  T total = 0;
#pragma unroll
  for (int warp = 0; warp < THREADS / 32; ++warp) total = total + warps[warp];
  return total;
}

extern "C" __global__ void __launch_bounds__(THREADS) sum_squares(const __grid_constant__ SquaresParams p) {
  constexpr u64 STRIDE = static_cast<u64>(BLOCKS) * THREADS * WIDTH;
  float sum[WIDTH] = {};
  for (int t = 0; t < p.tensors; ++t) {
    const float* const from = p.tensor[t];
    const u64 n = p.n[t];
    u64 at = (static_cast<u64>(blockIdx.x) * THREADS + threadIdx.x) * WIDTH;
    for (; at + (IN_FLIGHT - 1) * STRIDE + WIDTH <= n; at += IN_FLIGHT * STRIDE) {
      Float4 x[IN_FLIGHT];
#pragma unroll
      for (int i = 0; i < IN_FLIGHT; ++i) x[i] = load4(from + at + i * STRIDE);
#pragma unroll
      for (int i = 0; i < IN_FLIGHT; ++i)
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) sum[j] = __fmaf_rn(x[i].at[j], x[i].at[j], sum[j]);
    }
    for (; at < n; at += STRIDE)
      for (int j = 0; j < WIDTH && at + j < n; ++j) sum[j] = __fmaf_rn(from[at + j], from[at + j], sum[j]);
  }
  const float total = block_sum(add(add(sum[0], sum[1]), add(sum[2], sum[3])));
  if (threadIdx.x == 0) p.partial[blockIdx.x] = total;
}

struct RootParams {
  const float* partial;
  float* norm;
  int n;
};

extern "C" __global__ void __launch_bounds__(THREADS) root_of_sum(const __grid_constant__ RootParams p) {
  double sum = 0;
  for (int i = threadIdx.x; i < p.n; i += THREADS) sum += p.partial[i];
  const double total = block_sum(sum);
  if (threadIdx.x == 0) *p.norm = static_cast<float>(sqrt(total));
}
