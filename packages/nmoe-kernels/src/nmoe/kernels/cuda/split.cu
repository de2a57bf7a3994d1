// An fp32 matrix as PARTS (2 or 3) bf16 matrices side by side: of each significand the upper 8 bits, the next 8, and the
// last 8. Bound by memory.
// Letters: R rows, N columns.
#include "bf16.cuh"

struct Params {
  const float* wide;    // (R, N)
  bf16* parts;          // (R, PARTS, N)
  unsigned n_elements;  // R · N
  unsigned n_columns;   // N
};

extern "C" __global__ void __launch_bounds__(256) split(const __grid_constant__ Params p) {
  const unsigned i = blockIdx.x * 256 + threadIdx.x;
  if (i >= p.n_elements) return;
  bf16* to = p.parts + i + static_cast<unsigned long long>(i / p.n_columns) * (PARTS - 1) * p.n_columns;
  float left = p.wide[i];
#pragma unroll
  for (int part = 0; part < PARTS; ++part, to += p.n_columns) {
    const bf16 rounded = round_bf16(left);
    *to = rounded;
    left -= bf16_low(rounded);
  }
}
