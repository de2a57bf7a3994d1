// Backward of RMSNorm's rows, alone and after a residual's addition. Macros: TEAM_WARPS that share a row, at most 16; PER
// pieces of a row that a thread has; TEAMS of a block, at most 15 where TEAM_WARPS is above 1; STAGES rows of a team that
// are on their way or worked on; ADD, 0 or 1: the sum's gradient is added. A piece is eight elements, 16 bytes.
//
// Teams take rows in turn. A thread has the same columns of all its team's rows, so that it sums their part of the gain's
// gradient in registers; a block sums its teams' and stores one row of partial sums. A team's first thread fetches its
// rows by bulk copies, STAGES ahead, and a row's place is free as soon as the team has it in registers: no team waits for
// another, and memory has as much to do as shared memory holds.
#include "sm90.cuh"

constexpr u32 TEAM = 32 * TEAM_WARPS;
constexpr u32 THREADS = TEAM * TEAMS;
constexpr u32 TENSORS = 2 + ADD;
constexpr u32 ELEMENTS = 8;
constexpr u32 X = 0, DOUT = 1, DTOTAL = 2;

struct NormBackwardParams {
  const char* in[3];  // x, what was normed; the norm's gradient; with ADD, the sum's
  const uint4* weight;
  const float* scale;  // what each row was multiplied by
  uint4* dx;
  float* partial;  // of the gain's gradient, a row a block; null: not wanted
  u64 x_row;       // bytes from one row of x to the next; all else is dense
  u32 n_rows;
  u32 pieces;  // of a row
};

// --- PTX ------------------------------------------------------------------------------------------------------------

// Volatile, so that it leaves where it stands and not where it is used.
__device__ __forceinline__ float load_early(const float* from) {
  float x;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(x) : "l"(from));
  return x;
}

// The threads of one team, whatever the others do.
__device__ __forceinline__ void team_sync(u32 team) {
  if (TEAM_WARPS == 1)
    __syncwarp();
  else
    asm volatile("barrier.cta.sync %0, %1;" ::"r"(team + 1), "n"(TEAM) : "memory");
}

// The compiler may not keep what it has formed of these bits: it would take twice the registers.
__device__ __forceinline__ void forget_formed(uint4& piece) {
  asm volatile("" : "+r"(piece.x), "+r"(piece.y), "+r"(piece.z), "+r"(piece.w));
}

// --- rows -----------------------------------------------------------------------------------------------------------

struct Row {
  uint4 at[TENSORS][PER];
};

__device__ __forceinline__ void unpack(const uint4& piece, float (&x)[ELEMENTS]) {
  const u32 words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) x[2 * i] = bf16_low(words[i]), x[2 * i + 1] = bf16_high(words[i]);
}

__device__ __forceinline__ uint4 pack(const float (&x)[ELEMENTS]) {
  return make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7]));
}

// By one thread of the team.
__device__ __forceinline__ void fetch(const NormBackwardParams& p, const uint4* to, const u64* full, u32 row) {
  const u32 bytes = p.pieces * sizeof(uint4), barrier = shared_address(full);
  barrier_expect(barrier, TENSORS * bytes);
#pragma unroll
  for (u32 tensor = 0; tensor < TENSORS; ++tensor)
    bulk_load(shared_address(to + tensor * p.pieces), p.in[tensor] + row * (tensor == X ? p.x_row : u64(bytes)), bytes,
              barrier);
}

// What stands past the row's end is 0: it adds nothing.
__device__ __forceinline__ Row read(const NormBackwardParams& p, const uint4* from, u32 thread) {
  Row row;
#pragma unroll
  for (u32 tensor = 0; tensor < TENSORS; ++tensor)
#pragma unroll
    for (u32 i = 0; i < PER; ++i) {
      const u32 piece = i * TEAM + thread;
      row.at[tensor][i] = piece < p.pieces ? from[tensor * p.pieces + piece] : make_uint4(0, 0, 0, 0);
    }
  return row;
}

// The sum over a team, the same bits in each thread. `slots` of the row before may still be read: rows take turns.
__device__ __forceinline__ float team_sum(float mine, float* slots, u32 team, u32 thread) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) mine += __shfl_xor_sync(~0u, mine, step);
  if (TEAM_WARPS == 1) return mine;
  if (thread % 32 == 0) slots[thread / 32] = mine;
  team_sync(team);
  float sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < TEAM_WARPS; ++warp) sum += slots[warp];
  return sum;
}

// --- the gain's gradient --------------------------------------------------------------------------------------------

// Of the block's teams, in their order. Nobody uses `held` any more when this begins.
__device__ __forceinline__ void store_partial(const NormBackwardParams& p, const float (&dweight)[PER][ELEMENTS],
                                              float4* held, u32 team, u32 thread) {
  const u32 quads = p.pieces * 2;
#pragma unroll
  for (u32 i = 0; i < PER; ++i) {
    const u32 piece = i * TEAM + thread;
    if (piece < p.pieces) {
      const float(&d)[ELEMENTS] = dweight[i];
      held[team * quads + piece * 2] = make_float4(d[0], d[1], d[2], d[3]);
      held[team * quads + piece * 2 + 1] = make_float4(d[4], d[5], d[6], d[7]);
    }
  }
  __syncthreads();
  float4* const to = reinterpret_cast<float4*>(p.partial) + static_cast<u64>(blockIdx.x) * quads;
  for (u32 quad = threadIdx.x; quad < quads; quad += THREADS) {
    float4 sum = held[quad];
#pragma unroll
    for (u32 other = 1; other < TEAMS; ++other) {
      const float4 d = held[other * quads + quad];
      sum.x += d.x, sum.y += d.y, sum.z += d.z, sum.w += d.w;
    }
    to[quad] = sum;
  }
}

// --- the kernel -----------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    norm_backward(const __grid_constant__ NormBackwardParams p) {
  extern __shared__ uint4 held[];  // rows, by team, stage and tensor; then the teams' sums
  __shared__ u64 full[TEAMS][STAGES];
  __shared__ float slots[2][TEAMS][TEAM_WARPS];

  const u32 team = threadIdx.x / TEAM, thread = threadIdx.x % TEAM;
  const u32 stride = gridDim.x * TEAMS;
  const u32 stage_pieces = TENSORS * p.pieces;
  const uint4* const mine = held + team * STAGES * stage_pieces;
  u32 row = blockIdx.x * TEAMS + team;
  if (thread == 0) {
    for (u32 stage = 0; stage < STAGES; ++stage) barrier_init(shared_address(&full[team][stage]), 1);
    barrier_init_fence();
    fence_proxy_async();
    for (u32 stage = 0; stage < STAGES && row + stage * stride < p.n_rows; ++stage)
      fetch(p, mine + stage * stage_pieces, &full[team][stage], row + stage * stride);
  }
  uint4 weight[PER];
#pragma unroll
  for (u32 i = 0; i < PER; ++i) {
    const u32 piece = i * TEAM + thread;
    weight[i] = piece < p.pieces ? p.weight[piece] : make_uint4(0, 0, 0, 0);
  }
  float dweight[PER][ELEMENTS] = {};
  float next_scale = row < p.n_rows ? load_early(p.scale + row) : 0.0f;
  __syncthreads();  // barriers are there

  const float width = static_cast<float>(p.pieces * ELEMENTS);
  Ring<STAGES> ring;
  for (; row < p.n_rows; row += stride, ring.advance()) {
    const u32 stage = ring.stage();
    barrier_wait(shared_address(&full[team][stage]), ring.parity());
    Row now = read(p, mine + stage * stage_pieces, thread);
    fence_proxy_async();  // what was read, before what the next copy writes
    // The whole team has read: with more warps than one, after the sum, whose barrier tells.
    const bool refills = thread == 0 && row + STAGES * stride < p.n_rows;
    if (TEAM_WARPS == 1) {
      __syncwarp();
      if (refills) fetch(p, mine + stage * stage_pieces, &full[team][stage], row + STAGES * stride);
    }
    const float scale = next_scale;
    if (row + stride < p.n_rows) next_scale = load_early(p.scale + row + stride);
    float part = 0.0f;
#pragma unroll
    for (u32 i = 0; i < PER; ++i) {
      float x[ELEMENTS], dout[ELEMENTS], w[ELEMENTS];
      unpack(now.at[X][i], x), unpack(now.at[DOUT][i], dout), unpack(weight[i], w);
#pragma unroll
      for (int j = 0; j < ELEMENTS; ++j) part += dout[j] * w[j] * (x[j] * scale);
    }
    const float mean = __fdiv_rn(team_sum(part, slots[ring.n % 2][team], team, thread), width);
    if (TEAM_WARPS > 1 && refills) fetch(p, mine + stage * stage_pieces, &full[team][stage], row + STAGES * stride);
    uint4* const dx = p.dx + static_cast<u64>(row) * p.pieces + thread;
#pragma unroll
    for (u32 i = 0; i < PER; ++i) {
#pragma unroll
      for (u32 tensor = 0; tensor < TENSORS; ++tensor) forget_formed(now.at[tensor][i]);
      forget_formed(weight[i]);
      float x[ELEMENTS], dout[ELEMENTS], w[ELEMENTS];
      unpack(now.at[X][i], x), unpack(now.at[DOUT][i], dout), unpack(weight[i], w);
#pragma unroll
      for (int j = 0; j < ELEMENTS; ++j) {
        const float normed = x[j] * scale;
        dweight[i][j] += dout[j] * normed;
        x[j] = (dout[j] * w[j] - normed * mean) * scale;
      }
#if ADD
      float dtotal[ELEMENTS];
      unpack(now.at[DTOTAL][i], dtotal);
#pragma unroll
      for (int j = 0; j < ELEMENTS; ++j) x[j] += dtotal[j];
#endif
      if (i * TEAM + thread < p.pieces) dx[i * TEAM] = pack(x);
    }
  }
  if (p.partial != nullptr) {
    __syncthreads();  // all teams have read their last row
    store_partial(p, dweight, reinterpret_cast<float4*>(held), team, thread);
  }
}
