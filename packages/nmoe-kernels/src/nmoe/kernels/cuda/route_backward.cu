// The gradient of a router's logits, whole tokens at a time: rows of zeros in shared memory, the chosen experts' gradients
// among them, and one bulk copy of all. Macro: THREADS of a block.
//
// gate_k = scale * s_k / S with S = sum(s) + 1e-20, hence ds_k = (scale * dgate_k - sum_j(dgate_j * gate_j)) / S; and
// s = sigmoid(logit), hence dlogit = ds * s * (1 - s). Logits of experts not chosen get 0.
#include "sm90.cuh"

struct RouteBackwardParams {
  const float* dgate_TK;
  const int* expert_TK;
  const float* score_TK;
  float* dlogits_TE;
  int n_tokens, n_experts, top_k;
  int tokens;  // of a block: a multiple of 4, so that each block's gradient starts at a multiple of 16 bytes
  float route_scale;
};

struct Choice {
  float score, dgate;
  int expert;
};

// Zeros of a token that is not there, and past the chosen.
__device__ __forceinline__ Choice load_choice(const RouteBackwardParams& p, int token, bool chosen, int slot) {
  if (!chosen) return {0.0f, 0.0f, 0};
  const long long at = static_cast<long long>(token) * p.top_k + slot;
  return {p.score_TK[at], p.dgate_TK[at], p.expert_TK[at]};
}

// Dynamic shared memory: gradients (tokens, E).
extern "C" __global__ void __launch_bounds__(THREADS) route_backward(const __grid_constant__ RouteBackwardParams p) {
  extern __shared__ float4 quads[];
  float* const rows = reinterpret_cast<float*>(quads);
  int room = 1;  // lanes of a token
  while (room < p.top_k) room *= 2;
  const int slot = threadIdx.x % room, group = threadIdx.x / room, groups = THREADS / room;
  const int first = blockIdx.x * p.tokens, count = min(p.tokens, p.n_tokens - first), values = count * p.n_experts;
  Choice choice = load_choice(p, first + group, group < count && slot < p.top_k, slot);
  for (int i = threadIdx.x; i < (values + 3) / 4; i += THREADS) quads[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  __syncthreads();
  for (int base = 0; base < p.tokens; base += groups) {  // as often in all threads
    const int t = base + group;
    const bool chosen = t < count && slot < p.top_k;
    if (base > 0) choice = load_choice(p, first + t, chosen, slot);
    float total = choice.score;
    for (int step = room / 2; step > 0; step /= 2) total += __shfl_xor_sync(~0u, total, step);
    total += 1e-20f;
    float shared_term = choice.dgate * (choice.score / total * p.route_scale);
    for (int step = room / 2; step > 0; step /= 2) shared_term += __shfl_xor_sync(~0u, shared_term, step);
    if (chosen)
      rows[t * p.n_experts + choice.expert] =
          (p.route_scale * choice.dgate - shared_term) / total * choice.score * (1.0f - choice.score);
  }
  fence_proxy_async();
  __syncthreads();
  float* const to = p.dlogits_TE + static_cast<long long>(first) * p.n_experts;
  // Only the last block's may end within 16 bytes.
  const int copied = values / 4 * 4, left = values - copied;
  if (static_cast<int>(threadIdx.x) < left) to[copied + threadIdx.x] = rows[copied + threadIdx.x];
  if (threadIdx.x == 0 && copied > 0) {
    bulk_store(to, shared_address(quads), copied * sizeof(float));
    tma_store_commit();
    tma_store_wait<0>();
  }
}
