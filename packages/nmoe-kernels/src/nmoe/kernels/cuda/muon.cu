// Muon's passes over memory: momentum before its orthogonalisation, the master's update after. Macros: THREADS of a
// block; PIECES of four elements that a thread has in flight.
#include "stream.cuh"

struct MomentumParams {
  const float* grad;
  float* momentum;
  unsigned short* ahead;  // bf16
  const float* grad_scale;
  const int* ok;
  u64 n;
  float one_minus_beta;
};

__device__ __forceinline__ float move(const MomentumParams& p, float scale, float grad, float& momentum) {
  const float scaled = mul(grad, scale);
  momentum = add(momentum, mul(sub(scaled, momentum), p.one_minus_beta));
  return sub(momentum, mul(sub(momentum, scaled), p.one_minus_beta));
}

extern "C" __global__ void __launch_bounds__(THREADS) muon_momentum(const __grid_constant__ MomentumParams p) {
  const u64 first = (static_cast<u64>(blockIdx.x) * (PIECES * THREADS) + threadIdx.x) * WIDTH;
  Float4 grad[PIECES], momentum[PIECES];
#pragma unroll
  for (int i = 0; i < PIECES; ++i) {
    const u64 at = first + i * (THREADS * WIDTH);
    if (at + WIDTH > p.n) continue;
    grad[i] = load4(p.grad + at);
    momentum[i] = load4(p.momentum + at);
  }
  if (*p.ok == 0) return;
  const float scale = *p.grad_scale;
#pragma unroll
  for (int i = 0; i < PIECES; ++i) {
    const u64 at = first + i * (THREADS * WIDTH);
    if (at + WIDTH <= p.n) {
      Bits4 ahead;
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) ahead.at[j] = round_bf16(move(p, scale, grad[i].at[j], momentum[i].at[j]));
      store4(p.momentum + at, momentum[i]);
      store4(p.ahead + at, ahead);
    } else {
      for (u64 one = at; one < p.n; ++one) p.ahead[one] = round_bf16(move(p, scale, p.grad[one], p.momentum[one]));
    }
  }
}

struct ApplyParams {
  unsigned short* weight;  // bf16
  unsigned short* residual;
  const unsigned short* update;  // bf16
  const int* ok;
  const float* scalars;  // decay, step_size
  u64 n;
};

__device__ __forceinline__ float apply(float decay, float step_size, u32 weight, u32 residual, u32 update) {
  return sub(mul(join_master(weight, residual), decay), mul(bf16_low(update), step_size));
}

extern "C" __global__ void __launch_bounds__(THREADS) muon_apply(const __grid_constant__ ApplyParams p) {
  const u64 first = (static_cast<u64>(blockIdx.x) * (PIECES * THREADS) + threadIdx.x) * WIDTH;
  Bits4 weight[PIECES], residual[PIECES], update[PIECES];
#pragma unroll
  for (int i = 0; i < PIECES; ++i) {
    const u64 at = first + i * (THREADS * WIDTH);
    if (at + WIDTH > p.n) continue;
    weight[i] = load4(p.weight + at);
    residual[i] = load4(p.residual + at);
    update[i] = load4(p.update + at);
  }
  if (*p.ok == 0) return;
  const float decay = p.scalars[0], step_size = p.scalars[1];
#pragma unroll
  for (int i = 0; i < PIECES; ++i) {
    const u64 at = first + i * (THREADS * WIDTH);
    if (at + WIDTH <= p.n) {
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) {
        const float master = apply(decay, step_size, weight[i].at[j], residual[i].at[j], update[i].at[j]);
        weight[i].at[j] = master_weight(master);
        residual[i].at[j] = master_residual(master);
      }
      store4(p.weight + at, weight[i]);
      store4(p.residual + at, residual[i]);
    } else {
      for (u64 one = at; one < p.n; ++one) {
        const float master = apply(decay, step_size, p.weight[one], p.residual[one], p.update[one]);
        p.weight[one] = static_cast<unsigned short>(master_weight(master));
        p.residual[one] = static_cast<unsigned short>(master_residual(master));
      }
    }
  }
}
