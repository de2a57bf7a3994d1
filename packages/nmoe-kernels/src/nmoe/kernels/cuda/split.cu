// An fp32 matrix as two bf16 matrices side by side: the upper 8 bits of each significand, and the next 8. Bound by memory.
// Letters: R rows, N columns.
struct Params {
  const float* wide;      // (R, N)
  unsigned short* parts;  // (R, 2, N), bf16
  unsigned n_elements;    // R · N
  unsigned n_columns;     // N
};

extern "C" __global__ void __launch_bounds__(256) split(const __grid_constant__ Params p) {
  const unsigned i = blockIdx.x * 256 + threadIdx.x;
  if (i >= p.n_elements) return;
  const float wide = p.wide[i];
  unsigned short high, low;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(high) : "f"(wide));
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(low) : "f"(wide - __uint_as_float(static_cast<unsigned>(high) << 16)));
  unsigned short* to = p.parts + i + static_cast<unsigned long long>(i / p.n_columns) * p.n_columns;
  to[0] = high;
  to[p.n_columns] = low;
}
