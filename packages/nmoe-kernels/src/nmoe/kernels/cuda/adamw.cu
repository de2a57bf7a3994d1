// AdamW in one pass over weight, residual, gradient and moments. Macros: SPLIT 1 for bf16 weights with a residual, 0 for
// fp32 ones; THREADS of a block; PIECES of four elements that a thread has in flight.
#include "stream.cuh"

struct AdamwParams {
  void* weight;
  unsigned short* residual;
  const float* grad;
  float* exp_avg;
  float* exp_avg_sq;
  const float* grad_scale;
  const int* ok;
  const float* scalars;  // decay, step_size, second_moment_scale
  u64 n;
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
  float eps;
};

struct Scalars {
  float grad_scale, decay, step_size, second_moment_scale;
};

__device__ __forceinline__ void update(const AdamwParams& p, const Scalars& s, float grad, float& master, float& mean,
                                       float& square) {
  const float scaled = mul(grad, s.grad_scale);
  mean = add(mean, mul(sub(scaled, mean), p.one_minus_beta1));
  square = add(mul(square, p.beta2), mul(mul(scaled, p.one_minus_beta2), scaled));
  const float denominator = add(__fdiv_rn(__fsqrt_rn(square), s.second_moment_scale), p.eps);
  master = sub(mul(master, s.decay), __fdiv_rn(mul(mean, s.step_size), denominator));
}

struct Piece {
  Float4 master, grad, mean, square;
#if SPLIT
  Bits4 weight, residual;
#endif

  __device__ __forceinline__ void load(const AdamwParams& p, u64 at) {
#if SPLIT
    weight = load4(static_cast<const unsigned short*>(p.weight) + at);
    residual = load4(p.residual + at);
#else
    master = load4(static_cast<const float*>(p.weight) + at);
#endif
    grad = load4(p.grad + at);
    mean = load4(p.exp_avg + at);
    square = load4(p.exp_avg_sq + at);
  }

  __device__ __forceinline__ void work(const AdamwParams& p, const Scalars& s) {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
#if SPLIT
      master.at[i] = join_master(weight.at[i], residual.at[i]);
#endif
      update(p, s, grad.at[i], master.at[i], mean.at[i], square.at[i]);
#if SPLIT
      weight.at[i] = master_weight(master.at[i]);
      residual.at[i] = master_residual(master.at[i]);
#endif
    }
  }

  __device__ __forceinline__ void store(const AdamwParams& p, u64 at) const {
#if SPLIT
    store4(static_cast<unsigned short*>(p.weight) + at, weight);
    store4(p.residual + at, residual);
#else
    store4(static_cast<float*>(p.weight) + at, master);
#endif
    store4(p.exp_avg + at, mean);
    store4(p.exp_avg_sq + at, square);
  }
};

// The last elements of a tensor whose size is no multiple of four.
__device__ __forceinline__ void update_one(const AdamwParams& p, const Scalars& s, u64 at) {
#if SPLIT
  unsigned short* const weight = static_cast<unsigned short*>(p.weight) + at;
  float master = join_master(*weight, p.residual[at]);
#else
  float* const weight = static_cast<float*>(p.weight) + at;
  float master = *weight;
#endif
  update(p, s, p.grad[at], master, p.exp_avg[at], p.exp_avg_sq[at]);
#if SPLIT
  *weight = static_cast<unsigned short>(master_weight(master));
  p.residual[at] = static_cast<unsigned short>(master_residual(master));
#else
  *weight = master;
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS) adamw(const __grid_constant__ AdamwParams p) {
  const u64 first = (static_cast<u64>(blockIdx.x) * (PIECES * THREADS) + threadIdx.x) * WIDTH;
  Piece pieces[PIECES];
#pragma unroll
  for (int i = 0; i < PIECES; ++i) {
    const u64 at = first + i * (THREADS * WIDTH);
    if (at + WIDTH <= p.n) pieces[i].load(p, at);
  }
  // Asked after the loads have left: a block waits for memory once.
  if (*p.ok == 0) return;
  const Scalars s = {*p.grad_scale, p.scalars[0], p.scalars[1], p.scalars[2]};
#pragma unroll
  for (int i = 0; i < PIECES; ++i) {
    const u64 at = first + i * (THREADS * WIDTH);
    if (at + WIDTH <= p.n) {
      pieces[i].work(p, s);
      pieces[i].store(p, at);
    } else {
      for (u64 one = at; one < p.n; ++one) update_one(p, s, one);
    }
  }
}
