// An fp32 matrix as two bf16 matrices side by side: the upper 8 bits of each significand, and the next 8. Bound by memory.
// Letters: R rows, N columns.
#include "bf16.cuh"

struct Params {
  const float* wide;    // (R, N)
  bf16* parts;          // (R, 2, N)
  unsigned n_elements;  // R · N
  unsigned n_columns;   // N
};

extern "C" __global__ void __launch_bounds__(256) split(const __grid_constant__ Params p) {
  const unsigned i = blockIdx.x * 256 + threadIdx.x;
  if (i >= p.n_elements) return;
  const float wide = p.wide[i];
  const bf16 high = round_bf16(wide);
  bf16* to = p.parts + i + static_cast<unsigned long long>(i / p.n_columns) * p.n_columns;
  to[0] = high;
  to[p.n_columns] = round_bf16(wide - bf16_low(high));
}
