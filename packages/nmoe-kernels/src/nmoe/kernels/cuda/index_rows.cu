// The order of routed rows. Nothing here is read back to the host, and no atomic decides a place.
//
// Shapes: T tokens, E experts, K experts per token, R = T*K rows. A flat row index is t*K + k.
// Tokens are cut into CHUNKS equal runs, one block each, of which the histogram has each one's rows per expert: a block sums
// those of earlier chunks, and places its own rows. A row's rank within its warp's part is found while rows are counted,
// and rows leave in runs of one expert, from shared memory.
//
// Macros: CHUNKS; BLOCK_ROWS, rows of one schedule entry; SCHEDULE_HEAD, words before the first; WARPS of a block; TURNS,
// most rows of a lane at a time.

constexpr unsigned FULL = 0xffffffffu;
constexpr int THREADS = 32 * WARPS;
constexpr int PASS_ROWS = THREADS * TURNS;

struct IndexParams {
  const int* expert_TK;
  const int* histogram_BE;  // rows per expert of each chunk
  int* order_R;
  int* token_R;
  int* row_TK;
  int* offset_E;
  int* schedule;
  int n_tokens, n_experts, top_k;
};

// A warp's rows of a pass: as many turns in all warps, and then the next warp's.
struct Part {
  int turns, first, last;
};

__device__ __forceinline__ Part part_of(int first, int last) {
  const int end = min(first + PASS_ROWS, last), turns = (end - first + THREADS - 1) / THREADS;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  return {turns, first + warp * turns * 32 + lane, end};
}

// -1 where a lane has no row.
__device__ __forceinline__ void load_experts(int (&expert)[TURNS], const int* expert_TK, const Part& part) {
#pragma unroll
  for (int i = 0; i < TURNS; ++i) {
    const int at = part.first + i * 32;
    expert[i] = i < part.turns && at < part.last ? expert_TK[at] : -1;
  }
}

struct Sums {
  int rows, blocks, here;  // of all chunks, their schedule entries, and of this chunk's pass
};

// Sums of lower threads. All threads of the block call it.
__device__ __forceinline__ Sums scan_before(const Sums& mine, Sums* scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Sums sum = mine;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int rows = __shfl_up_sync(FULL, sum.rows, step), blocks = __shfl_up_sync(FULL, sum.blocks, step);
    const int here = __shfl_up_sync(FULL, sum.here, step);
    if (lane >= step) sum.rows += rows, sum.blocks += blocks, sum.here += here;
  }
  if (lane == 31) scratch[warp] = sum;
  __syncthreads();
  Sums before = {sum.rows - mine.rows, sum.blocks - mine.blocks, sum.here - mine.here};
  for (int w = 0; w < warp; ++w)
    before.rows += scratch[w].rows, before.blocks += scratch[w].blocks, before.here += scratch[w].here;
  return before;
}

// Dynamic shared memory: before (E), here (E), first row (E + 1), first entry (E + 1), first place here (E), ranks
// (WARPS, E + 1); and of each row of a pass its place in the order, and its number.
extern "C" __global__ void __launch_bounds__(THREADS, 1) index_rows(const __grid_constant__ IndexParams p) {
  extern __shared__ int shared[];
  __shared__ Sums scratch[WARPS];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n = p.n_experts, block = blockIdx.x;
  int* const before_E = shared;            // rows of earlier chunks and passes; then with the expert's first row
  int* const here_E = before_E + n;        // rows of this pass
  int* const offset_E = here_E + n;        // first rows of all, then the first row of each expert
  int* const entry_E = offset_E + n + 1;   // first schedule entry of each expert
  int* const local_E = entry_E + n + 1;    // first place of each expert among this pass's rows
  int* const rank_WE = local_E + n;        // first a warp's rows so far, then the rows of the warps before it
  int* const rank_E = rank_WE + warp * (n + 1);
  const int size = p.n_tokens / CHUNKS + (p.n_tokens % CHUNKS != 0);
  const int first = min(block * size, p.n_tokens) * p.top_k, last = min((block + 1) * size, p.n_tokens) * p.top_k;
  int* const place = rank_WE + WARPS * (n + 1);
  int* const number = place + min(size * p.top_k, PASS_ROWS);
  for (int i = threadIdx.x; i < 5 * n + 2 + WARPS * (n + 1); i += THREADS) shared[i] = 0;

  Part part = part_of(first, last);
  int expert[TURNS], rank[TURNS];
  load_experts(expert, p.expert_TK, part);
  __syncthreads();  // zeros are there
  const int strands = n < THREADS ? min(THREADS / n, CHUNKS) : 1;
  for (int i = threadIdx.x; i < n * strands; i += THREADS) {
    const int e = i % n;
    int total = 0, before = 0;
#pragma unroll 8
    for (int b = i / n; b < CHUNKS; b += strands) {
      const int rows = p.histogram_BE[b * n + e];
      total += rows;
      before += b < block ? rows : 0;
    }
    atomicAdd(&offset_E[e], total);
    atomicAdd(&before_E[e], before);
  }

  const int per_thread = (n + THREADS - 1) / THREADS;
  const int e_first = min(static_cast<int>(threadIdx.x) * per_thread, n), e_last = min(e_first + per_thread, n);
  for (int begin = first;;) {
#pragma unroll
    for (int i = 0; i < TURNS; ++i) {
      if (i >= part.turns) break;
      const unsigned same = __match_any_sync(FULL, expert[i]);
      const int earlier = __popc(same & ((1u << lane) - 1));
      rank[i] = expert[i] >= 0 ? rank_E[expert[i]] + earlier : 0;
      __syncwarp();  // all have read
      if (expert[i] >= 0 && earlier == 0) {
        rank_E[expert[i]] += __popc(same);
        atomicAdd(&here_E[expert[i]], __popc(same));
      }
      __syncwarp();
    }
    __syncthreads();

    // Ranks start where the warps before have ended: a lane for each warp.
    for (int e = warp; e < n; e += WARPS) {
      const int rows = lane < WARPS ? rank_WE[lane * (n + 1) + e] : 0;
      int sum = rows;
#pragma unroll
      for (int step = 1; step < WARPS; step *= 2) {
        const int lower = __shfl_up_sync(FULL, sum, step);
        if (lane >= step) sum += lower;
      }
      if (lane < WARPS) rank_WE[lane * (n + 1) + e] = sum - rows;
    }
    Sums mine = {0, 0, 0};
    for (int e = e_first; e < e_last; ++e) {
      mine.here += here_E[e];
      if (begin > first) continue;
      mine.rows += offset_E[e];
      mine.blocks += (offset_E[e] + BLOCK_ROWS - 1) / BLOCK_ROWS;
    }
    Sums at = scan_before(mine, scratch);
    for (int e = e_first; e < e_last; ++e) {
      local_E[e] = at.here;
      at.here += here_E[e];
      if (begin > first) continue;
      const int rows = offset_E[e];
      offset_E[e] = at.rows, entry_E[e] = at.blocks;
      before_E[e] += at.rows;
      at.rows += rows, at.blocks += (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
      if (e == n - 1) offset_E[n] = at.rows, entry_E[n] = at.blocks;
    }
    __syncthreads();

#pragma unroll
    for (int i = 0; i < TURNS; ++i) {
      if (i >= part.turns) break;
      if (expert[i] >= 0) {
        const int ahead = rank_E[expert[i]] + rank[i], row = before_E[expert[i]] + ahead, at = local_E[expert[i]] + ahead;
        p.row_TK[part.first + i * 32] = row;
        place[at] = row, number[at] = part.first + i * 32;
      }
    }
    if (begin == first) {
      for (int e = block; e < n; e += CHUNKS) {
        const int entries = entry_E[e + 1] - entry_E[e];
        for (int b = threadIdx.x; b < entries; b += THREADS) {
          const int row = offset_E[e] + b * BLOCK_ROWS;
          reinterpret_cast<int4*>(p.schedule)[SCHEDULE_HEAD / 4 + entry_E[e] + b] =
              make_int4(e, row, min(BLOCK_ROWS, offset_E[e + 1] - row), 0);
        }
      }
      if (block == 0) {
        for (int e = threadIdx.x; e <= n; e += THREADS) p.offset_E[e] = offset_E[e];
        if (threadIdx.x < SCHEDULE_HEAD) p.schedule[threadIdx.x] = threadIdx.x == 0 ? entry_E[n] : 0;
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < part.last - begin; i += THREADS) {
      p.order_R[place[i]] = number[i];
      p.token_R[place[i]] = number[i] / p.top_k;
    }

    begin = part.last;
    if (begin >= last) break;
    for (int e = threadIdx.x; e < n; e += THREADS) before_E[e] += here_E[e], here_E[e] = 0;
    for (int i = threadIdx.x; i < WARPS * (n + 1); i += THREADS) rank_WE[i] = 0;
    part = part_of(begin, last);
    load_experts(expert, p.expert_TK, part);
    __syncthreads();
  }
}
