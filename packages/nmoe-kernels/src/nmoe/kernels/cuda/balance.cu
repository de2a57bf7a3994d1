// The balance loss and its gradient: see balance_cuda.py for what is computed. Blocks take equal runs of a sequence's tokens.
//
// Macros: WARPS of a block; LANES that share a token, a power of 2; PIECES of a lane, of four neighbouring experts each, with
// 4 * LANES * PIECES >= E, which is then a multiple of 4. PIECES 0, with 32 LANES: any number of experts; each token's
// logits are then read twice, and its shares summed in shared memory.
#include "bf16.cuh"

typedef unsigned long long u64;
constexpr u32 FINISH_WARPS = 32, FINISH_COLUMNS = 32;

// Errs by as much as fp32's exp, |x| 2^-23.
__device__ __forceinline__ float sigmoid(float x) {
  float power, s;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * -1.4426950408889634f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(1.0f + power));
  return s;
}

template <u32 COUNT>
__device__ __forceinline__ float sum_over(float x) {
#pragma unroll
  for (u32 step = COUNT / 2; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

// A block's tokens.
struct Run {
  u64 first;
  u32 count;
};

__device__ __forceinline__ Run run_of(u32 blocks, u32 tokens, u32 length) {
  const u32 place = blockIdx.x % blocks * tokens;
  return {static_cast<u64>(blockIdx.x / blocks) * length + place, min(tokens, length - place)};
}

#if PIECES

constexpr u32 GROUPS = 32 / LANES;  // tokens of a warp at a time
constexpr u32 STEP = WARPS * GROUPS;

// A lane's part of a token.
struct Row {
  float at[PIECES][4];
};

// What lies beyond the experts scores 0.
__device__ __forceinline__ Row load(const float* logits_TE, u32 token, const Run& run, u32 n_experts, u32 lane) {
  Row row;
#pragma unroll
  for (u32 i = 0; i < PIECES; ++i) {
    const u32 e = (i * LANES + lane) * 4;
    float4 v = make_float4(-1e30f, -1e30f, -1e30f, -1e30f);
    if (token < run.count && e < n_experts)
      asm volatile("ld.global.cs.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                   : "l"(logits_TE + (run.first + token) * n_experts + e));
    row.at[i][0] = v.x, row.at[i][1] = v.y, row.at[i][2] = v.z, row.at[i][3] = v.w;
  }
  return row;
}

#endif  // PIECES

// ---------------------------------------------------------------------------------------------------------------------
// balance_shares: of each block, what its tokens' shares sum to, and how often they chose an expert
// ---------------------------------------------------------------------------------------------------------------------

struct SharesParams {
  const float* logits_TE;
  const int* expert_TK;
  float* share_PE;
  int* count_PE;
  u32* ticket;  // of balance_finish: 0 from here on
  u32 n_experts, top_k, length;
  u32 tokens, blocks;  // of a block; of a sequence
};

// Dynamic shared memory: counts (E), shares (WARPS, E).
extern "C" __global__ void __launch_bounds__(32 * WARPS) balance_shares(const __grid_constant__ SharesParams p) {
  extern __shared__ u32 shared[];
  int* const count_E = reinterpret_cast<int*>(shared);
  float* const share_WE = reinterpret_cast<float*>(shared + p.n_experts);
  const u32 warp = threadIdx.x / 32, lane = threadIdx.x % LANES;
  float* const share_E = share_WE + warp * p.n_experts;
  const Run run = run_of(p.blocks, p.tokens, p.length);
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.ticket = 0;
#if PIECES
  const u32 member = threadIdx.x % 32 / LANES;
  u32 base = warp * GROUPS;
  Row now = load(p.logits_TE, base + member, run, p.n_experts, lane);
#endif
  for (u32 e = threadIdx.x; e < p.n_experts; e += 32 * WARPS) count_E[e] = 0;
  __syncthreads();
  for (u32 i = threadIdx.x; i < run.count * p.top_k; i += 32 * WARPS)
    atomicAdd(&count_E[p.expert_TK[run.first * p.top_k + i]], 1);
#if PIECES
  float share[PIECES][4] = {};
  for (; base < run.count; base += STEP) {
    const Row next = load(p.logits_TE, base + STEP + member, run, p.n_experts, lane);
    float sum = 0.0f;
#pragma unroll
    for (u32 i = 0; i < PIECES; ++i)
#pragma unroll
      for (u32 j = 0; j < 4; ++j) sum += now.at[i][j] = sigmoid(now.at[i][j]);
    sum = sum_over<LANES>(sum);
    const float factor = base + member < run.count ? __fdividef(1.0f, sum) : 0.0f;
#pragma unroll
    for (u32 i = 0; i < PIECES; ++i)
#pragma unroll
      for (u32 j = 0; j < 4; ++j) share[i][j] += now.at[i][j] * factor;
    now = next;
  }
#pragma unroll
  for (u32 i = 0; i < PIECES; ++i)
#pragma unroll
    for (u32 j = 0; j < 4; ++j) {
#pragma unroll
      for (u32 step = 16; step >= LANES; step /= 2) share[i][j] += __shfl_xor_sync(~0u, share[i][j], step);
      const u32 e = (i * LANES + lane) * 4 + j;
      if (member == 0 && e < p.n_experts) share_E[e] = share[i][j];
    }
#else
  for (u32 e = lane; e < p.n_experts; e += 32) share_E[e] = 0.0f;
  for (u32 t = warp; t < run.count; t += WARPS) {
    const float* const logit_E = p.logits_TE + (run.first + t) * p.n_experts;
    float sum = 0.0f;
    for (u32 e = lane; e < p.n_experts; e += 32) sum += sigmoid(logit_E[e]);
    const float factor = __fdividef(1.0f, sum_over<32>(sum));
    for (u32 e = lane; e < p.n_experts; e += 32) share_E[e] += sigmoid(logit_E[e]) * factor;
  }
#endif
  __syncthreads();
  const u64 out = static_cast<u64>(blockIdx.x) * p.n_experts;
  for (u32 e = threadIdx.x; e < p.n_experts; e += 32 * WARPS) {
    float sum = 0.0f;
#pragma unroll
    for (u32 w = 0; w < WARPS; ++w) sum += share_WE[w * p.n_experts + e];
    p.share_PE[out + e] = sum;
    p.count_PE[out + e] = count_E[e];
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// balance_finish: a grid of (sequences, columns / 32)
// ---------------------------------------------------------------------------------------------------------------------

struct FinishParams {
  const float* share_PE;
  const int* count_PE;
  float* coefficient_GE;
  float* loss_GN;  // of each block of this launch
  float* loss;
  u32* ticket;
  u32 n_experts, blocks;
  float scale;
};

// The last block that is done adds up what all found, in their order.
extern "C" __global__ void __launch_bounds__(32 * FINISH_WARPS) balance_finish(const __grid_constant__ FinishParams p) {
  __shared__ float shares[FINISH_WARPS][FINISH_COLUMNS + 1];
  __shared__ int counts[FINISH_WARPS][FINISH_COLUMNS + 1];
  __shared__ bool last;
  const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, e = blockIdx.y * FINISH_COLUMNS + lane;
  const u64 first = static_cast<u64>(blockIdx.x) * p.blocks * p.n_experts;
  float share = 0.0f;
  int count = 0;
  if (e < p.n_experts) {
#pragma unroll 4
    for (u32 b = warp; b < p.blocks; b += FINISH_WARPS) {
      const u64 at = first + static_cast<u64>(b) * p.n_experts + e;
      share += p.share_PE[at];
      count += p.count_PE[at];
    }
  }
  shares[warp][lane] = share, counts[warp][lane] = count;
  __syncthreads();
  if (warp > 0) return;
  share = 0.0f, count = 0;
#pragma unroll
  for (u32 w = 0; w < FINISH_WARPS; ++w) share += shares[w][lane], count += counts[w][lane];
  const float coefficient = static_cast<float>(count) * p.scale;
  if (e < p.n_experts) p.coefficient_GE[static_cast<u64>(blockIdx.x) * p.n_experts + e] = coefficient;
  float loss = sum_over<32>(coefficient * share);
  const u32 found = gridDim.x * gridDim.y;
  if (lane == 0) {
    p.loss_GN[blockIdx.x * gridDim.y + blockIdx.y] = loss;
    __threadfence();
    last = atomicAdd(p.ticket, 1) == found - 1;
  }
  __syncwarp();
  if (!last) return;
  __threadfence();
  loss = 0.0f;
  for (u32 i = lane; i < found; i += 32) loss += __ldcg(p.loss_GN + i);
  loss = sum_over<32>(loss);
  if (lane == 0) *p.loss = loss;
}

// ---------------------------------------------------------------------------------------------------------------------
// balance_backward
// ---------------------------------------------------------------------------------------------------------------------

struct BackwardParams {
  const float* dloss;
  const float* logits_TE;
  const float* coefficient_GE;
  float* dlogits_TE;
  u32 n_experts, length;
  u32 tokens, blocks;  // of a block; of a sequence
};

// Of one logit; `factor`: the loss's gradient over the sum of the token's scores.
__device__ __forceinline__ float gradient(float score, float coefficient, float mean, float factor) {
  return factor * (score * (1.0f - score)) * (coefficient - mean);
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) balance_backward(const __grid_constant__ BackwardParams p) {
  const u32 warp = threadIdx.x / 32, lane = threadIdx.x % LANES;
  const Run run = run_of(p.blocks, p.tokens, p.length);
  const float* const coefficient_E = p.coefficient_GE + static_cast<u64>(blockIdx.x / p.blocks) * p.n_experts;
#if PIECES
  const u32 member = threadIdx.x % 32 / LANES;
  u32 base = warp * GROUPS;
  Row now = load(p.logits_TE, base + member, run, p.n_experts, lane);
  float c[PIECES][4];
#pragma unroll
  for (u32 i = 0; i < PIECES; ++i) {
    const u32 e = (i * LANES + lane) * 4;
    const float4 v = e < p.n_experts ? __ldg(reinterpret_cast<const float4*>(coefficient_E + e)) : make_float4(0, 0, 0, 0);
    c[i][0] = v.x, c[i][1] = v.y, c[i][2] = v.z, c[i][3] = v.w;
  }
  const float dloss = *p.dloss;
  for (; base < run.count; base += STEP) {
    const Row next = load(p.logits_TE, base + STEP + member, run, p.n_experts, lane);
    float sum = 0.0f, weighed = 0.0f;
#pragma unroll
    for (u32 i = 0; i < PIECES; ++i)
#pragma unroll
      for (u32 j = 0; j < 4; ++j) {
        const float score = now.at[i][j] = sigmoid(now.at[i][j]);
        sum += score, weighed += score * c[i][j];
      }
    sum = sum_over<LANES>(sum), weighed = sum_over<LANES>(weighed);
    const float one_over_sum = __fdividef(1.0f, sum), mean = weighed * one_over_sum, factor = dloss * one_over_sum;
    if (base + member < run.count) {
      float* const to = p.dlogits_TE + (run.first + base + member) * p.n_experts;
#pragma unroll
      for (u32 i = 0; i < PIECES; ++i) {
        const u32 e = (i * LANES + lane) * 4;
        float d[4];
#pragma unroll
        for (u32 j = 0; j < 4; ++j) d[j] = gradient(now.at[i][j], c[i][j], mean, factor);
        if (e < p.n_experts) *reinterpret_cast<float4*>(to + e) = make_float4(d[0], d[1], d[2], d[3]);
      }
    }
    now = next;
  }
#else
  const float dloss = *p.dloss;
  for (u32 t = warp; t < run.count; t += WARPS) {
    const float* const logit_E = p.logits_TE + (run.first + t) * p.n_experts;
    float* const to = p.dlogits_TE + (run.first + t) * p.n_experts;
    float sum = 0.0f, weighed = 0.0f;
    for (u32 e = lane; e < p.n_experts; e += 32) {
      const float score = sigmoid(logit_E[e]);
      sum += score, weighed += score * coefficient_E[e];
    }
    sum = sum_over<32>(sum), weighed = sum_over<32>(weighed);
    const float one_over_sum = __fdividef(1.0f, sum), mean = weighed * one_over_sum, factor = dloss * one_over_sum;
    for (u32 e = lane; e < p.n_experts; e += 32) to[e] = gradient(sigmoid(logit_E[e]), coefficient_E[e], mean, factor);
  }
#endif
}
