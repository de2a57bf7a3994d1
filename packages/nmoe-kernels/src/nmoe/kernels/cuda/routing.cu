// Router selection, the counts of routed rows, and the order of those that other ranks sent; index_rows.cu has the order
// of this rank's. Nothing here is read back to the host, no atomic decides a place, and every grid follows from sizes that
// the host knows.
//
// Shapes: T tokens, E experts, K experts per token, R = T*K rows. A flat row index is t*K + k.
// Tokens are cut into CHUNKS equal runs, one block each: `route` or `count_rows` counts each chunk's rows per expert, and
// the order's kernel sums the counts of earlier chunks and places its own.
//
// Macros: CHUNKS; BLOCK_ROWS, rows of one schedule entry; SCHEDULE_HEAD, words before the first; SLOTS (only of a compile
// for `route`), experts per lane of the quick selection (4, 8 or 16), 0 for none; SLAB (only of one for `count_rows` or
// `index_slab`, which has none but 1): 1 for what other ranks sent. The tokens are then the slab's rows, N for each source,
// of which those up to the last wave's end are there; an expert of -1 is another rank's; an expert's rows stand by wave
// first, so that E counts pairs of expert and wave; and if there are more rows than `capacity`, none is ordered.

constexpr unsigned FULL = 0xffffffffu;

__device__ __forceinline__ int smaller(int a, int b) { return a < b ? a : b; }

struct Chunk {
  int first, last;
};

__device__ __forceinline__ Chunk chunk_of(int block, int n_tokens) {
  const int size = n_tokens / CHUNKS + (n_tokens % CHUNKS != 0);
  const int first = smaller(block * size, n_tokens);
  return {first, smaller(first + size, n_tokens)};
}

#ifdef SLOTS

// ---------------------------------------------------------------------------------------------------------------------
// route: one warp a token
// ---------------------------------------------------------------------------------------------------------------------

constexpr int LOWEST = -2147483647 - 1;
constexpr int NONE = 2147483647;

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The operations of torch.sigmoid in fp32, so that the choice is the reference's.
__device__ __forceinline__ float sigmoid(float x) { return __frcp_rn(1.0f + expf(-x)); }

// Integers in the order of floats, NaN above all as in torch.sort. A score is never -0, so neither is score + bias.
__device__ __forceinline__ int order_key(float choice) {
  const int bits = __float_as_int(choice);
  return choice != choice ? NONE : bits ^ ((bits >> 31) & 0x7fffffff);
}

// Lane k of the first `top_k` gets the k-th expert. Right for all inputs: exact keys, the lower id where they are
// equal. `key_E` is this warp's; lane l alone touches experts l, l + 32, ...
__device__ __noinline__ int select_exact(const float* logit_E, const float* bias_E, int* key_E, int n_experts,
                                         int top_k, int lane) {
  int best = LOWEST, best_id = NONE, mine = 0;
  for (int e = lane; e < n_experts; e += 32) {
    const int key = order_key(__fadd_rn(sigmoid(logit_E[e]), bias_E[e]));
    key_E[e] = key;
    if (key > best) best = key, best_id = e;
  }
  for (int k = 0; k < top_k; ++k) {
    const int top = __reduce_max_sync(FULL, best);
    const int id = __reduce_min_sync(FULL, best == top ? best_id : NONE);
    if (lane == k) mine = id;
    if (best_id == id) {
      key_E[id] = LOWEST;
      best = LOWEST, best_id = NONE;
      for (int e = lane; e < n_experts; e += 32)
        if (key_E[e] > best) best = key_E[e], best_id = e;
    }
  }
  return mine;
}

#if SLOTS

// The quick selection compares 23-bit fixed-point choices: score + bias + SHIFT lies in [8, 16), where a float's
// mantissa counts units of 2^-20. With an expert's id below it a key is unique, and one integer maximum finds value and
// id. A NaN is 0x7fffffff after any fp32 addition, hence above all.
//
// Error of a choice against the reference's fp32, in units: two roundings at [8, 16) 1/2 each, the reference's own
// rounding of score + bias 1/8, and both sigmoids 3/8; 1.5 in all, so that keys SAFE_GAP apart are in the reference's
// order. Where the K + 1 best are not all so far apart, and where a bias is beyond MAX_BIAS, the exact selection
// decides.
constexpr int ID_BITS = 9;
constexpr unsigned LAST_ID = (1u << ID_BITS) - 1;
constexpr float SHIFT = 12.0f;
constexpr float MAX_BIAS = 2.5f;
constexpr unsigned SAFE_GAP = 4;
constexpr int DEPTH = 4;
#define MINUS_INF __int_as_float(static_cast<int>(0xff800000u))
static_assert(SLOTS % DEPTH == 0 && SLOTS * 32 <= LAST_ID + 1, "an expert's id has ID_BITS");

__device__ __forceinline__ void order(unsigned& a, unsigned& b) {
  const unsigned low = a < b ? a : b;
  a = a < b ? b : a;
  b = low;
}

// `best` becomes the four best of itself, in falling order, and four more, in any order.
__device__ __forceinline__ void merge(unsigned (&best)[DEPTH], unsigned (&more)[DEPTH], bool first) {
  order(more[0], more[1]), order(more[2], more[3]), order(more[0], more[2]), order(more[1], more[3]);
  order(more[1], more[2]);
  if (first) {
#pragma unroll
    for (int i = 0; i < DEPTH; ++i) best[i] = more[i];
    return;
  }
#pragma unroll
  for (int i = 0; i < DEPTH; ++i) best[i] = best[i] > more[DEPTH - 1 - i] ? best[i] : more[DEPTH - 1 - i];
  order(best[0], best[2]), order(best[1], best[3]), order(best[0], best[1]), order(best[2], best[3]);
}

// Slot s of a lane is this expert: four neighbours a lane, so that a lane loads 16 bytes.
__device__ __forceinline__ int expert_of(int slot, int lane) { return slot / 4 * 128 + lane * 4 + slot % 4; }

__device__ __forceinline__ void load_logits(float (&x)[SLOTS], const float* logit_E, int n_experts, bool vectors,
                                            int lane) {
#pragma unroll
  for (int s = 0; s < SLOTS; s += 4) {
    const int e = expert_of(s, lane);
    if (vectors) {
      const float4 four = e < n_experts ? *reinterpret_cast<const float4*>(logit_E + e)
                                        : make_float4(MINUS_INF, MINUS_INF, MINUS_INF, MINUS_INF);
      x[s] = four.x, x[s + 1] = four.y, x[s + 2] = four.z, x[s + 3] = four.w;
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) x[s + j] = e + j < n_experts ? logit_E[e + j] : MINUS_INF;
    }
  }
}

// As select_exact, but only if all lanes' `sure` is set on return.
__device__ __forceinline__ int select_quick(const float (&logit)[SLOTS], const float (&shifted_bias)[SLOTS], int top_k,
                                            int lane, bool& sure) {
  unsigned best[DEPTH];
#pragma unroll
  for (int s = 0; s < SLOTS; s += DEPTH) {
    unsigned more[DEPTH];
#pragma unroll
    for (int j = 0; j < DEPTH; ++j) {
      const float score = reciprocal_approx(1.0f + exp2_approx(logit[s + j] * -1.4426950408889634f));
      more[j] = (__float_as_uint(score + shifted_bias[s + j]) << ID_BITS) + (LAST_ID - expert_of(s + j, lane));
    }
    merge(best, more, s == 0);
  }
  unsigned mine = 0;
  for (int k = 0; k <= top_k; ++k) {
    const unsigned top = __reduce_max_sync(FULL, best[0]);
    if (best[0] == top) {
#pragma unroll
      for (int i = 0; i + 1 < DEPTH; ++i) best[i] = best[i + 1];
      best[DEPTH - 1] = 0;
    }
    if (lane == k) mine = top;
  }
  const unsigned next = __shfl_down_sync(FULL, mine, 1);
  const bool apart = lane >= top_k || (mine >> ID_BITS) >= (next >> ID_BITS) + SAFE_GAP;
  const bool exhausted = SLOTS > DEPTH && best[0] == 0;  // of the DEPTH that the lane kept: it may have had more
  sure = sure && apart && !exhausted;
  return LAST_ID - (mine & LAST_ID);
}

#endif  // SLOTS

struct RouteParams {
  const float* logits_TE;
  const float* bias_E;
  int* expert_TK;
  float* gate_TK;
  float* score_TK;      // of the chosen, for the backward
  int* histogram_BE;    // rows per expert of each chunk
  int n_tokens, n_experts, top_k;
  float route_scale;
};

// Dynamic shared memory: histogram (E), keys (warps, E). 32 * SLOTS >= E if SLOTS is not 0.
extern "C" __global__ void __launch_bounds__(SLOTS == 16 ? 512 : 1024, 1) route(const __grid_constant__ RouteParams p) {
  extern __shared__ int shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  int* const count_E = shared;
  int* const key_E = shared + p.n_experts * (1 + warp);
  for (int e = threadIdx.x; e < p.n_experts; e += blockDim.x) count_E[e] = 0;
  __syncthreads();

  const Chunk chunk = chunk_of(blockIdx.x, p.n_tokens);
#if SLOTS
  const bool vectors = p.n_experts % 4 == 0 && reinterpret_cast<unsigned long long>(p.logits_TE) % 16 == 0;
  float logit[SLOTS], shifted_bias[SLOTS];
  bool quick = p.top_k < 32;  // the quick selection needs a lane for the expert after the last
#pragma unroll
  for (int s = 0; s < SLOTS; ++s) {
    const int e = expert_of(s, lane);
    const float bias = e < p.n_experts ? p.bias_E[e] : 0.0f;
    quick = quick && fabsf(bias) <= MAX_BIAS;
    shifted_bias[s] = e < p.n_experts ? bias + SHIFT : 8.0f;  // 8: below every expert
  }
  if (chunk.first + warp < chunk.last) {
    const float* const logit_E = p.logits_TE + static_cast<long long>(chunk.first + warp) * p.n_experts;
    load_logits(logit, logit_E, p.n_experts, vectors, lane);
  }
#endif
  // A warp finds the experts of `group` tokens in turn, and then weighs them all at once, `room` lanes a token.
  int room = 1;
  while (room < p.top_k) room *= 2;
  const int group = 32 / room, slot = lane % room, member = lane / room;
  for (int t = chunk.first + warp; t < chunk.last; t += group * warps) {
    int id = 0;
    for (int i = 0; i < group && t + i * warps < chunk.last; ++i) {
      const float* const logit_E = p.logits_TE + static_cast<long long>(t + i * warps) * p.n_experts;
      int found;
#if SLOTS
      float following[SLOTS];  // its loads are under way while this token's experts are found
      if (t + (i + 1) * warps < chunk.last)
        load_logits(following, logit_E + static_cast<long long>(warps) * p.n_experts, p.n_experts, vectors, lane);
      bool sure = quick;
      found = select_quick(logit, shifted_bias, p.top_k, lane, sure);
#pragma unroll
      for (int s = 0; s < SLOTS; ++s) logit[s] = following[s];
      if (!__all_sync(FULL, sure))
#endif
        found = select_exact(logit_E, p.bias_E, key_E, p.n_experts, p.top_k, lane);
      const int mine = __shfl_sync(FULL, found, slot);
      if (member == i) id = mine;
    }
    const int token = t + member * warps;
    const bool chosen = slot < p.top_k && token < chunk.last;
    const float score = chosen ? sigmoid(p.logits_TE[static_cast<long long>(token) * p.n_experts + id]) : 0.0f;
    float total = score;
    for (int step = room / 2; step; step /= 2) total += __shfl_xor_sync(FULL, total, step);
    if (chosen) {
      const long long at = static_cast<long long>(token) * p.top_k + slot;
      p.expert_TK[at] = id;
      p.score_TK[at] = score;
      p.gate_TK[at] = __fmul_rn(__fdiv_rn(score, total + 1e-20f), p.route_scale);
      atomicAdd(&count_E[id], 1);
    }
  }
  __syncthreads();
  for (int e = threadIdx.x; e < p.n_experts; e += blockDim.x) p.histogram_BE[blockIdx.x * p.n_experts + e] = count_E[e];
}

#else  // SLOTS

// ---------------------------------------------------------------------------------------------------------------------
// count_rows and index_slab: one block a chunk
// ---------------------------------------------------------------------------------------------------------------------

struct IndexParams {
  const int* expert_TK;
  int* histogram_BE;  // rows per expert of each chunk: written by count_rows, read for the order
  int* order_R;
  int* token_R;
  int* row_TK;
  int* offset_E;
  int* schedule;
  int n_tokens, n_experts, top_k;
#if SLAB
  int most_tokens, capacity;  // N, R
  int n_waves, world;
  const int* end_CW;  // rows of each source up to the end of a wave
  int* by_wave;       // the schedule, in another order
  int* entry_C;       // first entry of each wave there, and the number of entries
  int* ready_S;       // the wave in which the last of a slab row's rows is computed
  int* healthy;
  int* record;  // of faults: see link.cuh
#endif
};

#if SLAB

constexpr int MOST_ENDS = 32;

// A copy of end_CW that is near. All threads of the block call it.
__device__ __forceinline__ const int* near_ends(const IndexParams& p) {
  __shared__ int end_CW[MOST_ENDS];
  if (threadIdx.x < p.n_waves * p.world) end_CW[threadIdx.x] = p.end_CW[threadIdx.x];
  __syncthreads();
  return end_CW;
}

#endif  // SLAB

// The expert of a flat row index, or its pair with the wave; negative: there is no such row here.
__device__ __forceinline__ int expert_at(const IndexParams& p, const int* end_CW, int i) {
#if SLAB
  const int token = i / p.top_k, source = token / p.most_tokens, ordinal = token - source * p.most_tokens;
  int wave = 0;
  while (wave < p.n_waves && ordinal >= end_CW[wave * p.world + source]) ++wave;
  const int expert = p.expert_TK[i];
  return wave == p.n_waves || expert < 0 ? -1 : expert * p.n_waves + wave;
#else
  return p.expert_TK[i];
#endif
}

#if SLAB

// Schedule entries of an expert that can be computed once waves up to `wave` are there; `offset_C`: its pairs' first rows.
__device__ __forceinline__ int entries_up_to(const int* offset_C, int wave, int n_waves) {
  const int rows = offset_C[wave + 1] - offset_C[0];
  return wave == n_waves - 1 ? (rows + BLOCK_ROWS - 1) / BLOCK_ROWS : rows / BLOCK_ROWS;
}

#endif  // SLAB

// Dynamic shared memory: counts (E).
extern "C" __global__ void __launch_bounds__(1024) count_rows(const __grid_constant__ IndexParams p) {
  extern __shared__ int count_E[];
#if SLAB
  const int* const end_CW = near_ends(p);
#else
  const int* const end_CW = nullptr;
#endif
  for (int e = threadIdx.x; e < p.n_experts; e += blockDim.x) count_E[e] = 0;
  __syncthreads();
  const Chunk chunk = chunk_of(blockIdx.x, p.n_tokens);
  for (int i = chunk.first * p.top_k + threadIdx.x; i < chunk.last * p.top_k; i += blockDim.x) {
    const int expert = expert_at(p, end_CW, i);
    if (!SLAB || expert >= 0) atomicAdd(&count_E[expert], 1);
#if SLAB
    if (i % p.top_k == 0) p.ready_S[i / p.top_k] = 0;
#endif
  }
  __syncthreads();
  for (int e = threadIdx.x; e < p.n_experts; e += blockDim.x) p.histogram_BE[blockIdx.x * p.n_experts + e] = count_E[e];
}

#if SLAB

struct Pair {
  int rows, blocks;
};

// Sum of the pairs of lower threads. All threads of the block call it; `scratch` has room for a block's warps.
__device__ __forceinline__ Pair scan_before(Pair mine, Pair* scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Pair sum = mine;
#pragma unroll
  for (int step = 1; step < 32; step <<= 1) {
    const int rows = __shfl_up_sync(FULL, sum.rows, step), blocks = __shfl_up_sync(FULL, sum.blocks, step);
    if (lane >= step) sum.rows += rows, sum.blocks += blocks;
  }
  if (lane == 31) scratch[warp] = sum;
  __syncthreads();
  Pair before = {sum.rows - mine.rows, sum.blocks - mine.blocks};
  for (int w = 0; w < warp; ++w) before.rows += scratch[w].rows, before.blocks += scratch[w].blocks;
  return before;
}

// Dynamic shared memory: before (E), offset (E + 1), first block (E + 1), cursor (warps, E).
extern "C" __global__ void __launch_bounds__(1024) index_slab(const __grid_constant__ IndexParams p) {
  extern __shared__ int shared[];
  __shared__ Pair scratch[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, n = p.n_experts;
  const int* const end_CW = near_ends(p);
  int* const before_E = shared;            // rows of earlier chunks
  int* const offset_E = before_E + n;      // first rows of all, then the first row of each expert
  int* const entry_E = offset_E + n + 1;   // first schedule entry of each expert
  int* const cursor_E = entry_E + n + 1;   // of warp w at w * E: rows in its part, then its next row
  for (int i = threadIdx.x; i < n * (3 + warps) + 2; i += blockDim.x) shared[i] = 0;
  __syncthreads();

  const Chunk chunk = chunk_of(blockIdx.x, p.n_tokens);
  const int first = chunk.first * p.top_k, last = chunk.last * p.top_k;
  const int part = ((last - first + warps - 1) / warps + 31) / 32 * 32;
  const int part_first = smaller(first + warp * part, last), part_last = smaller(part_first + part, last);
  for (int i = part_first + lane; i < part_last; i += 32) {
    const int expert = expert_at(p, end_CW, i);
    if (expert >= 0) atomicAdd(&cursor_E[warp * n + expert], 1);
  }

  const int threads = blockDim.x, strands = n < threads ? smaller(threads / n, CHUNKS) : 1;
  for (int i = threadIdx.x; i < n * strands; i += blockDim.x) {
    const int e = i % n;
    int total = 0, before = 0;
#pragma unroll 8
    for (int b = i / n; b < CHUNKS; b += strands) {
      const int rows = p.histogram_BE[b * n + e];
      total += rows;
      before += b < static_cast<int>(blockIdx.x) ? rows : 0;
    }
    atomicAdd(&offset_E[e], total);
    atomicAdd(&before_E[e], before);
  }
  __syncthreads();

  const int per_thread = (n + threads - 1) / threads;
  const int e_first = smaller(threadIdx.x * per_thread, n), e_last = smaller(e_first + per_thread, n);
  Pair sum = {0, 0};
  for (int e = e_first; e < e_last; ++e) {
    sum.rows += offset_E[e];
    sum.blocks += (offset_E[e] + BLOCK_ROWS - 1) / BLOCK_ROWS;
  }
  Pair at = scan_before(sum, scratch);
  __shared__ bool full;
  if (threadIdx.x == threads - 1) {
    const int needed = at.rows + sum.rows;
    full = needed > p.capacity;
    if (full && blockIdx.x == 0) {
      *p.healthy = 0;
      volatile int* const record = p.record;
      if (record[0] == 0 || (record[0] == 2 && record[3] < needed)) {  // of all layers the one that needs most
        record[3] = needed, record[4] = p.capacity;
        __threadfence_system();
        record[0] = 2;
      }
    }
  }
  __syncthreads();
  if (full) at = {0, 0};
  for (int e = e_first; e < e_last; ++e) {
    if (full) offset_E[e] = 0;
    const int rows = offset_E[e];
    offset_E[e] = at.rows, entry_E[e] = at.blocks;
    int row = at.rows + before_E[e];
    for (int w = 0; w < warps; ++w) {
      const int taken = cursor_E[w * n + e];
      cursor_E[w * n + e] = row;
      row += taken;
    }
    at.rows += rows, at.blocks += (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    if (e == n - 1) offset_E[n] = at.rows, entry_E[n] = at.blocks;
  }
  __syncthreads();
  // Entries belong to the wave of their last row. They are written twice, by expert, and by wave and expert: entry_E has
  // the first of each (wave, expert) there, number wave * experts + expert here; first_E the first of each expert.
  const int waves = p.n_waves, experts = n / waves;
  int* const first_E = before_E;
  auto entries_of = [&](int number) {
    const int wave = number / experts;
    const int* const offset_C = offset_E + number % experts * waves;
    return entries_up_to(offset_C, wave, waves) - (wave ? entries_up_to(offset_C, wave - 1, waves) : 0);
  };
  const int x_each = (experts + threads - 1) / threads;
  const int x_first = smaller(threadIdx.x * x_each, experts), x_last = smaller(x_first + x_each, experts);
  Pair entries = {0, 0};  // by expert, by wave
  for (int e = x_first; e < x_last; ++e) entries.rows += entries_up_to(offset_E + e * waves, waves - 1, waves);
  for (int i = e_first; i < e_last; ++i) entries.blocks += entries_of(i);
  entries = scan_before(entries, scratch);
  for (int e = x_first; e < x_last; ++e) {
    first_E[e] = entries.rows;
    entries.rows += entries_up_to(offset_E + e * waves, waves - 1, waves);
  }
  for (int i = e_first; i < e_last; ++i) {
    entry_E[i] = entries.blocks;
    entries.blocks += entries_of(i);
    if (i == n - 1) entry_E[n] = entries.blocks;
  }
  __syncthreads();

  for (int at_32 = part_first; at_32 < part_last; at_32 += 32) {
    const int i = at_32 + lane;
    int expert = i < part_last ? expert_at(p, end_CW, i) : -1;
    if (full) expert = -1;
    if (expert < 0 && i < part_last) p.row_TK[i] = -1;
    const unsigned same = __match_any_sync(FULL, expert);
    const int earlier = __popc(same & ((1u << lane) - 1));
    if (expert >= 0) {
      // Within the tensors even if a rank that is too late writes to the slab meanwhile.
      const int row = smaller(cursor_E[warp * n + expert] + earlier, p.capacity - 1);
      p.order_R[row] = i;
      p.token_R[row] = i / p.top_k;
      p.row_TK[i] = row;
      const int* const offset_C = offset_E + expert / waves * waves;
      int ready = expert % waves;
      // The last wave has all: said for rows that a late rank changes after a fault, since they were counted.
      while (ready < waves - 1 && (row - offset_C[0]) / BLOCK_ROWS >= entries_up_to(offset_C, ready, waves)) ++ready;
      atomicMax(&p.ready_S[i / p.top_k], ready);
    }
    __syncwarp();  // all have read the cursor
    if (expert >= 0 && earlier == 0) cursor_E[warp * n + expert] += __popc(same);
    __syncwarp();
  }

  for (int number = blockIdx.x; number < n; number += CHUNKS) {
    const int wave = number / experts, e = number % experts;
    const int* const offset_C = offset_E + e * waves;
    const int before = wave ? entries_up_to(offset_C, wave - 1, waves) : 0, here = entries_of(number);
    for (int b = threadIdx.x; b < here; b += blockDim.x) {
      const int first = offset_C[0] + (before + b) * BLOCK_ROWS;
      const int4 entry = make_int4(e, first, smaller(BLOCK_ROWS, offset_C[waves] - first), wave);
      reinterpret_cast<int4*>(p.schedule)[SCHEDULE_HEAD / 4 + first_E[e] + before + b] = entry;
      reinterpret_cast<int4*>(p.by_wave)[SCHEDULE_HEAD / 4 + entry_E[number] + b] = entry;
    }
  }
  if (blockIdx.x == 0) {
    for (int e = threadIdx.x; e <= experts; e += blockDim.x) p.offset_E[e] = offset_E[e * waves];
    if (threadIdx.x <= waves) p.entry_C[threadIdx.x] = entry_E[threadIdx.x * experts];
    if (threadIdx.x < SCHEDULE_HEAD) p.schedule[threadIdx.x] = p.by_wave[threadIdx.x] = threadIdx.x == 0 ? entry_E[n] : 0;
  }
}

#endif  // SLAB

#endif  // SLOTS
