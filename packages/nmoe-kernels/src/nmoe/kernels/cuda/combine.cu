// A token's rows summed in slot order, and the partial sums of a row's gate gradient: both are gathers by row_TK, so
// that one launch may do either or both.
//
// Shapes: T tokens, D width, K slots, R = T*K rows, N partial sums per row.
#include "bf16.cuh"

constexpr int IN_FLIGHT = 8;
constexpr int LANES = 8;  // bf16 values of a 16-byte piece

__device__ __forceinline__ uint4 load_once(const uint4* from) {
  uint4 x;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(from));
  return x;
}

struct CombineParams {
  const uint4* y_RD;
  const int* row_TK;
  uint4* out_TD;
  const float* partial_NR;
  float* dgate_TK;
  unsigned n_pieces;    // 16-byte pieces of out; 0 for no combine
  unsigned row_pieces;  // of one row
  int top_k;
  int n_partials;
  unsigned n_rows;
  unsigned gate_blocks;  // blocks at the grid's start that sum partials; 0 for none
};

__device__ __forceinline__ void sum_partials(const CombineParams& p, unsigned at) {
  if (at >= p.n_rows) return;
  const float* from = p.partial_NR + p.row_TK[at];
  float sum = 0.0f;
#pragma unroll 4
  for (int n = 0; n < p.n_partials; ++n, from += p.n_rows) sum += *from;
  p.dgate_TK[at] = sum;
}

__device__ __forceinline__ void sum_slots(const CombineParams& p, unsigned piece) {
  if (piece >= p.n_pieces) return;
  const unsigned token = piece / p.row_pieces, column = piece - token * p.row_pieces;
  const int* const row_K = p.row_TK + static_cast<long long>(token) * p.top_k;
  float sum[LANES] = {};
  for (int first = 0; first < p.top_k; first += IN_FLIGHT) {
    uint4 rows[IN_FLIGHT];
#pragma unroll
    for (int k = 0; k < IN_FLIGHT; ++k)
      if (first + k < p.top_k)
        rows[k] = load_once(p.y_RD + static_cast<long long>(row_K[first + k]) * p.row_pieces + column);
#pragma unroll
    for (int k = 0; k < IN_FLIGHT; ++k) {
      if (first + k >= p.top_k) break;
      const unsigned words[4] = {rows[k].x, rows[k].y, rows[k].z, rows[k].w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sum[2 * i] += bf16_low(words[i]);
        sum[2 * i + 1] += bf16_high(words[i]);
      }
    }
  }
  p.out_TD[piece] = make_uint4(pack_bf16(sum[0], sum[1]), pack_bf16(sum[2], sum[3]), pack_bf16(sum[4], sum[5]),
                               pack_bf16(sum[6], sum[7]));
}

extern "C" __global__ void __launch_bounds__(256) combine(const __grid_constant__ CombineParams p) {
  if (blockIdx.x < p.gate_blocks)
    sum_partials(p, blockIdx.x * blockDim.x + threadIdx.x);
  else
    sum_slots(p, (blockIdx.x - p.gate_blocks) * blockDim.x + threadIdx.x);
}
