// For each query of attention, its output times the output's gradient, summed over columns: what the softmax's backward
// subtracts from each weight's gradient (FlashAttention, arXiv:2205.14135, appendix B.4). bf16 in, fp32 out.
//
// 16 lanes share a row. Rows are numbered as they lie in memory, heads fastest.
// Letters: B batch, H heads, S positions, v columns of values.
#include "bf16.cuh"

struct Params {
  const bf16* out;   // (B, H, S, v); rows dense, at multiples of 16 bytes
  const bf16* dout;  // likewise
  float* delta;      // (B, H, S)
  unsigned* counter;  // set to 0, for the kernel that takes its tiles from it
  long out_stride[3], dout_stride[3];  // of B, H and S, in elements
  int heads;
  int length;
  int pieces;  // of 8 columns
  int n_rows;  // B · S · H
};

namespace {

constexpr int kRows = 4;  // of 16 lanes at once: all that is read of them is under way together
constexpr int kBlock = 256 / 16 * kRows;

__device__ __forceinline__ float product(u32 a, u32 b, float sum) {
  return fmaf(bf16_high(a), bf16_high(b), fmaf(bf16_low(a), bf16_low(b), sum));
}

}  // namespace

extern "C" __global__ void __launch_bounds__(256) attention_delta(const __grid_constant__ Params p) {
  const int piece = threadIdx.x % 16, first = blockIdx.x * kBlock + threadIdx.x / 16;
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.counter = 0;
  uint4 a[kRows], b[kRows];
  long place[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int row = first + i * 16, position = row / p.heads, batch = position / p.length;
    const int head = row - position * p.heads, query = position - batch * p.length;
    const bool inside = row < p.n_rows;
    place[i] = inside ? (long(batch) * p.heads + head) * p.length + query : -1;
    a[i] = b[i] = make_uint4(0, 0, 0, 0);
    if (inside && piece < p.pieces) {
      a[i] = *reinterpret_cast<const uint4*>(p.out + batch * p.out_stride[0] + head * p.out_stride[1] +
                                             query * p.out_stride[2] + piece * 8);
      b[i] = *reinterpret_cast<const uint4*>(p.dout + batch * p.dout_stride[0] + head * p.dout_stride[1] +
                                             query * p.dout_stride[2] + piece * 8);
    }
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    float sum = product(a[i].x, b[i].x, 0);
    sum = product(a[i].y, b[i].y, sum);
    sum = product(a[i].z, b[i].z, sum);
    sum = product(a[i].w, b[i].w, sum);
#pragma unroll
    for (int lanes = 1; lanes < 16; lanes *= 2) sum += __shfl_xor_sync(0xffffffff, sum, lanes);
    if (piece == 0 && place[i] >= 0) p.delta[place[i]] = sum;
  }
}
