// The exchange of token rows between the ranks of a host, by direct writes into the peers' memory.
//
//   plan_tokens   a token's experts and gates to each rank that owns an expert of it, once: slab[source][ordinal]
//   dispatch      its row likewise
//   await_words   until the rows of all sources are there, or the sums of all owners
//   return_rows   a slab row's rows of the experts summed, and sent back: returned[owner][ordinal]
//   collect_rows  a token's returned rows summed over owners, in rank order
//   clear_tail    zeros after the last routed row, which the weight gradients' products read
//
// A row's place is its source and its ordinal among the tokens that the source sends to the owner: the source computes it
// alone, and nothing is asked of the owner. Rows travel as bulk copies out of shared memory, which NVLink carries in
// packets as long as it has. Flags: link.cuh. Every sum has one order.
//
// Letters: T tokens of this rank, D width, K slots, W ranks, N most tokens of a rank, S = W*N slab rows, C waves.
// Macros choose the kernel, and say how it is made. PLAN and ROWS: plan_tokens (1, 0), dispatch by ordinals that are known
// (0, 1), or both in one (1, 1); STAGES are rows on their way a warp. SEND, GATES and READY: return_rows, which with READY 1
// sends only what became ready with a wave. GATES alone: collect_rows; RANKS is at least W, 2, 4 or 8. With GATES 1 these
// two carry the gates' gradients too. TAIL: clear_tail. None of them: await_words. WARPS are those of a block.
#include "link.cuh"
#include "sm90.cuh"

constexpr unsigned FULL = 0xffffffffu;

__device__ __forceinline__ int smaller(int a, int b) { return a < b ? a : b; }

// Eight bf16 numbers onto as many sums.
__device__ __forceinline__ void add(float (&sum)[8], const uint4& piece) {
  const u32 words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[2 * i] += bf16_low(words[i]), sum[2 * i + 1] += bf16_high(words[i]);
}

// Waits for what an owner returns. All that this rank was sent before has been read, as this comes after it in the stream;
// one thread for each owner says so.
__device__ __forceinline__ void await_sums(const Link& link, bool says, int owner, int number, Phase phase) {
  if (says) post(link, CONSUMED, owner, number);
  wait_for(link, RETURNED, owner, number, phase);
}

#if defined(PLAN)

struct Params {
  Link link;
  const char* x_TD;
  const int* expert_TK;
  const float* gate_TK;
  int* ordinal_TW;                // -1: not sent there
  int* end_CW;                    // tokens sent to each owner up to the end of each wave
  char* slab_ND[MOST_RANKS];      // of each owner, this source's part
  int* slab_expert_NK[MOST_RANKS];
  float* slab_gate_NK[MOST_RANKS];
  int* slab_end_CW[MOST_RANKS];   // this source's column
  int* used[2];  // the slabs' words: the last exchange that needed what they hold. The first is written to; [1] may be null
  unsigned* done;  // WAVES + 1 counters of blocks
  int n_tokens, top_k, n_local, row_bytes, n_waves;
};

struct Run {
  int first, last;
};

__device__ __forceinline__ int end_of_wave(int n_tokens, int wave, int n_waves) {
  return static_cast<long long>(n_tokens) * (wave + 1) / n_waves;
}

// A block's tokens of a wave.
__device__ __forceinline__ Run run_of(int n_tokens, int wave, int n_waves) {
  const int begin = end_of_wave(n_tokens, wave - 1, n_waves), end = end_of_wave(n_tokens, wave, n_waves);
  const int size = (end - begin + gridDim.x - 1) / gridDim.x;
  const int first = smaller(begin + blockIdx.x * size, end);
  return {first, smaller(first + size, end)};
}

#if PLAN

// Which owners a token goes to, a bit each.
__device__ __forceinline__ unsigned owners_of(const int* expert_K, int top_k, int n_local) {
  unsigned owners = 0;
  for (int k = 0; k < top_k; ++k) owners |= 1u << expert_K[k] / n_local;
  return owners;
}

// Ordinals of the block's tokens `first` to `last`, and what has been sent at the ends of waves.
__device__ __forceinline__ void plan(const Params& p, int first, int last) {
  __shared__ int sum_W[MOST_RANKS], of_warp[WARPS][MOST_RANKS];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, world = p.link.world;
  if (threadIdx.x < MOST_RANKS) sum_W[threadIdx.x] = 0;
  __syncthreads();
  // Earlier blocks' tokens are counted anew: that takes less time than to wait for their counts.
  int before_W[MOST_RANKS] = {};
#pragma unroll 4
  for (int t = threadIdx.x; t < first; t += WARPS * 32) {
    const unsigned owners = owners_of(p.expert_TK + t * p.top_k, p.top_k, p.n_local);
#pragma unroll
    for (int w = 0; w < MOST_RANKS; ++w) before_W[w] += owners >> w & 1;
  }
#pragma unroll
  for (int w = 0; w < MOST_RANKS; ++w) {
    const int sum = __reduce_add_sync(FULL, before_W[w]);
    if (lane == 0 && sum) atomicAdd(&sum_W[w], sum);
  }
  __syncthreads();
  for (int begin = first; begin < last; begin += WARPS * 32) {
    const int t = begin + threadIdx.x;
    const unsigned owners = t < last ? owners_of(p.expert_TK + t * p.top_k, p.top_k, p.n_local) : 0;
    for (int w = 0; w < world; ++w) {
      const unsigned sent = __ballot_sync(FULL, owners >> w & 1);
      if (lane == 0) of_warp[warp][w] = __popc(sent);
    }
    __syncthreads();
    for (int w = 0; w < world; ++w) {
      const unsigned sent = __ballot_sync(FULL, owners >> w & 1);
      int ordinal = sum_W[w] + __popc(sent & ((1u << lane) - 1));
      for (int other = 0; other < warp; ++other) ordinal += of_warp[other][w];
      if (t >= last) continue;
      p.ordinal_TW[t * world + w] = owners >> w & 1 ? ordinal : -1;
      for (int c = 0; c < WAVES; ++c) {
        if (t + 1 == end_of_wave(p.n_tokens, c, WAVES)) p.end_CW[c * world + w] = ordinal + (owners >> w & 1);
      }
    }
    __syncthreads();
    if (threadIdx.x < world) {
      for (int other = 0; other < WARPS; ++other) sum_W[threadIdx.x] += of_warp[other][threadIdx.x];
    }
    __syncthreads();
  }
  if (blockIdx.x == 0 && threadIdx.x < world) {
    for (int c = 0; c < WAVES; ++c) {
      if (end_of_wave(p.n_tokens, c, WAVES) == 0) p.end_CW[c * world + threadIdx.x] = 0;
    }
  }
  __syncthreads();
}

// A token's experts and gates, a slot a lane, to its owners, an ordinal a lane.
__device__ __forceinline__ void send_choices(const Params& p, int ordinal, int expert, float gate) {
  const int lane = threadIdx.x % 32;
  for (int w = 0; w < p.link.world; ++w) {
    const int place = __shfl_sync(FULL, ordinal, w);
    if (place < 0 || lane >= p.top_k) continue;
    const int local = expert - w * p.n_local;
    p.slab_expert_NK[w][place * p.top_k + lane] = local >= 0 && local < p.n_local ? local : -1;
    p.slab_gate_NK[w][place * p.top_k + lane] = gate;
  }
}

// By a thread for each owner, when all blocks have planned.
__device__ __forceinline__ void send_ends(const Params& p, int owner) {
  const int world = p.link.world;
  for (int c = 0; c < WAVES; ++c)
    p.slab_end_CW[owner][c * world] = *static_cast<volatile int*>(p.end_CW + c * world + owner);
}

#endif  // PLAN

#if ROWS

// Dynamic shared memory: a row for each warp and stage. Each block has a run of a wave's tokens; its warps take them in
// turn. Lane w of a warp sends a row to owner w.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) dispatch(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) char rows[];
  __shared__ __align__(8) u64 barriers[WARPS][STAGES];
  constexpr int AHEAD = STAGES / 2;  // rows that are read before they are sent
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, world = p.link.world;

  const u32 slots = shared_address(rows) + warp * STAGES * p.row_bytes, barrier = shared_address(barriers[warp]);
  if (lane == 0) {
    for (int s = 0; s < STAGES; ++s) barrier_init(barrier + 8 * s, 1);
    barrier_init_fence();
    fence_proxy_async();
  }
  __syncwarp();
  wait_for_stream();
  const int number = *p.link.sequence + 1;
  Run run = run_of(p.n_tokens, 0, p.n_waves);
  int handled = 0;  // rows of this warp, of all waves
  auto load = [&](int i) {
    const int slot = (handled + i) % STAGES;
    barrier_expect(barrier + 8 * slot, p.row_bytes);
    bulk_load(slots + slot * p.row_bytes, p.x_TD + static_cast<long long>(run.first + warp + i * WARPS) * p.row_bytes,
              p.row_bytes, barrier + 8 * slot);
  };
  auto begin = [&] {
    const int mine = max(0, (run.last - run.first - warp + WARPS - 1) / WARPS);
    if (lane == 0) {
      for (int i = 0; i < AHEAD && i < mine; ++i) load(i);
    }
    return mine;
  };
  int mine = begin();  // tokens of this warp in this wave
#if PLAN
  plan(p, run.first, run.last);
#endif
  if (threadIdx.x < world) wait_for(p.link, CONSUMED, threadIdx.x, *p.used[0], CONSUMPTION);
  __syncthreads();
  // All blocks are on the GPU, and need nothing else to come to their end: owners may begin, and wait while they compute.
  if (p.n_waves > 1 && last_block(p.done + WAVES) && threadIdx.x < world)
    post(p.link, ARRIVED, threadIdx.x, arrival(number, CHOICES));

  char* const slab = lane < world ? p.slab_ND[lane] : nullptr;
  for (int wave = 0;; mine = begin()) {
    for (int i = 0; i < mine; ++i) {
      const int t = run.first + warp + i * WARPS, slot = (handled + i) % STAGES;
      const int ordinal = lane < world ? p.ordinal_TW[t * world + lane] : -1;
#if PLAN
      const int expert = lane < p.top_k ? p.expert_TK[t * p.top_k + lane] : 0;
      const float gate = lane < p.top_k ? p.gate_TK[t * p.top_k + lane] : 0.0f;
#endif
      if (i + AHEAD < mine) {
        // The slot's last row left AHEAD rows ago.
        tma_store_wait<STAGES - AHEAD - 1>();
        __syncwarp();
        if (lane == 0) load(i + AHEAD);
      }
      barrier_wait(barrier + 8 * slot, (handled + i) / STAGES & 1);
      if (ordinal >= 0) bulk_store(slab + static_cast<long long>(ordinal) * p.row_bytes, slots + slot * p.row_bytes, p.row_bytes);
      tma_store_commit();
#if PLAN
      send_choices(p, ordinal, expert, gate);
#endif
    }
    bulk_store_wait();
    const bool posts = last_block(p.done + wave) && threadIdx.x < world;
    if (++wave < p.n_waves) {
      if (posts) post(p.link, ARRIVED, threadIdx.x, arrival(number, wave));
      handled += mine;
      run = run_of(p.n_tokens, wave, p.n_waves);
      continue;
    }
    if (!posts) return;
#if PLAN
    send_ends(p, threadIdx.x);
#endif
    post(p.link, ARRIVED, threadIdx.x, arrival(number, ALL));
    if (threadIdx.x < 2 && p.used[threadIdx.x] != nullptr) *p.used[threadIdx.x] = number;
    return;
  }
}

#else

// The plan alone, with experts and gates, which the dispatch of the rows announces.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) plan_tokens(const __grid_constant__ Params p) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, world = p.link.world;
  wait_for_stream();
  const Run run = run_of(p.n_tokens, 0, 1);
  plan(p, run.first, run.last);
  if (threadIdx.x < world) wait_for(p.link, CONSUMED, threadIdx.x, *p.used[0], CONSUMPTION);
  __syncthreads();
  for (int t = run.first + warp; t < run.last; t += WARPS) {
    const int ordinal = lane < world ? p.ordinal_TW[t * world + lane] : -1;
    const int expert = lane < p.top_k ? p.expert_TK[t * p.top_k + lane] : 0;
    const float gate = lane < p.top_k ? p.gate_TK[t * p.top_k + lane] : 0.0f;
    send_choices(p, ordinal, expert, gate);
  }
  if (last_block(p.done) && threadIdx.x < world) send_ends(p, threadIdx.x);
}

#endif  // ROWS

#elif defined(GATES) && defined(SEND)

struct Params {
  Link link;
  const uint4* y_RD;
  const int* row_SK;         // -1: no row of this rank
  const int* count_W;        // rows that came from each source, up to the end of the wave
  const int* ready_S;        // READY: the wave with which a slab row may return
  const float* partial_PR;   // P parts of each row's gate gradient
  char* returned_ND[MOST_RANKS];    // at each source, this owner's part
  float* returned_gate_NK[MOST_RANKS];
  unsigned* done;
  int most_tokens, top_k, row_pieces, n_partials, n_rows;  // N, K, 16-byte pieces of a row, P, R
  int wave, ends;  // READY: the wave; whether nothing returns after this
};

// Dynamic shared memory: two rows a warp. A warp takes one slab row at a time; neighbours go to different sources.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) return_rows(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) uint4 rows[];
  constexpr int AT_ONCE = 4;  // pieces of a row that a lane sums beside each other
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, world = p.link.world;
  wait_for_stream();
  int most = 0;
  for (int w = 0; w < world; ++w) most = max(most, p.count_W[w]);
  int turn = 0;
  auto send = [&](int source, int ordinal) {
    const int* const row_K = p.row_SK + (static_cast<long long>(source) * p.most_tokens + ordinal) * p.top_k;
    const int row = lane < p.top_k ? row_K[lane] : -1;
    const unsigned here = __ballot_sync(FULL, row >= 0);
    uint4* const slot = rows + (warp * 2 + turn) * p.row_pieces;
    tma_store_wait<1>();  // of what left this slot
    __syncwarp();
    for (int first = 0; first < p.row_pieces; first += 32 * AT_ONCE) {
      const int column = first + lane;
      float sum[AT_ONCE][8] = {};
      for (unsigned left = here; left;) {
        // Two rows at a time, so that twice as many loads are under way; the second may be none.
        const int a = __ffs(left) - 1;
        left &= left - 1;
        const int b = left ? __ffs(left) - 1 : a;
        const bool two = left != 0;
        left &= left - 1;
        const uint4* const from_a = p.y_RD + static_cast<long long>(__shfl_sync(FULL, row, a)) * p.row_pieces;
        const uint4* const from_b = p.y_RD + static_cast<long long>(__shfl_sync(FULL, row, b)) * p.row_pieces;
        uint4 piece_a[AT_ONCE], piece_b[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
          const int at = smaller(column + 32 * i, p.row_pieces - 1);
          piece_a[i] = __ldcs(from_a + at);
          if (two) piece_b[i] = __ldcs(from_b + at);
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
          add(sum[i], piece_a[i]);
          if (two) add(sum[i], piece_b[i]);
        }
      }
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        if (column + 32 * i < p.row_pieces)
          slot[column + 32 * i] = make_uint4(pack_bf16(sum[i][0], sum[i][1]), pack_bf16(sum[i][2], sum[i][3]),
                                             pack_bf16(sum[i][4], sum[i][5]), pack_bf16(sum[i][6], sum[i][7]));
      }
    }
    fence_proxy_async();
    __syncwarp();
    if (lane == 0)
      bulk_store(p.returned_ND[source] + static_cast<long long>(ordinal) * p.row_pieces * 16, shared_address(slot),
                 p.row_pieces * 16);
    tma_store_commit();
    turn ^= 1;
#if GATES
    if (row >= 0) {
      float sum = 0.0f;
      const float* from = p.partial_PR + row;
      for (int n = 0; n < p.n_partials; ++n, from += p.n_rows) sum += *from;
      p.returned_gate_NK[source][static_cast<long long>(ordinal) * p.top_k + lane] = sum;
    }
#endif
  };
  const int stride = gridDim.x * WARPS;
  auto returns = [&](int item) {
    const int source = item % world, ordinal = item / world;
    if (item >= most * world || ordinal >= p.count_W[source]) return false;
#if READY
    return p.ready_S[static_cast<long long>(source) * p.most_tokens + ordinal] == p.wave;
#else
    return true;
#endif
  };
  bool next = returns(blockIdx.x * WARPS + warp);
  for (int item = blockIdx.x * WARPS + warp; item < most * world; item += stride) {
    const bool now = next;
    next = returns(item + stride);  // asked for early: most rows of a wave are told apart while others are sent
    if (now) send(item % world, item / world);
  }
  bulk_store_wait();
  if (p.ends && last_block(p.done) && threadIdx.x < world) post(p.link, RETURNED, threadIdx.x, *p.link.sequence + 1);
}

#elif defined(GATES)

struct Params {
  Link link;
  const int* ordinal_TW;
  const uint4* returned_WND;
  const float* returned_gate_WNK;
  const int* expert_TK;
  uint4* out_TD;
  float* dgate_TK;
  unsigned* done;
  int n_tokens, most_tokens, top_k, n_local, row_pieces;
  int waits;  // whether no await_words came before
};

// A warp takes a token. Few tokens are few blocks, which then may wait themselves.
extern "C" __global__ void __launch_bounds__(WARPS * 32, 3) collect_rows(const __grid_constant__ Params p) {
  constexpr int AT_ONCE = 8 / RANKS;  // pieces of a token that a lane sums beside each other
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, world = p.link.world;
  wait_for_stream();
  const int number = *p.link.sequence + 1;
  if (p.waits && threadIdx.x < world) await_sums(p.link, blockIdx.x == 0, threadIdx.x, number, GATES ? GRADIENT_RETURN : RETURN);
  __syncthreads();
  for (int t = blockIdx.x * WARPS + warp; t < p.n_tokens; t += gridDim.x * WARPS) {
    const int ordinal = lane < world ? p.ordinal_TW[t * world + lane] : -1;
    int from_W[RANKS];
#pragma unroll
    for (int w = 0; w < RANKS; ++w) from_W[w] = __shfl_sync(FULL, ordinal, w);
    for (int column = lane; column < p.row_pieces; column += 32 * AT_ONCE) {
      uint4 piece[AT_ONCE][RANKS];
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
#pragma unroll
        for (int w = 0; w < RANKS; ++w) {
          piece[i][w] = make_uint4(0, 0, 0, 0);
          if (from_W[w] >= 0)
            piece[i][w] = __ldcs(p.returned_WND + (static_cast<long long>(w) * p.most_tokens + from_W[w]) * p.row_pieces +
                                 smaller(column + 32 * i, p.row_pieces - 1));
        }
      }
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        float sum[8] = {};
#pragma unroll
        for (int w = 0; w < RANKS; ++w) add(sum, piece[i][w]);
        if (column + 32 * i < p.row_pieces)
          __stcs(p.out_TD + static_cast<long long>(t) * p.row_pieces + column + 32 * i,
                 make_uint4(pack_bf16(sum[0], sum[1]), pack_bf16(sum[2], sum[3]), pack_bf16(sum[4], sum[5]),
                            pack_bf16(sum[6], sum[7])));
      }
    }
#if GATES
    const int owner = lane < p.top_k ? p.expert_TK[t * p.top_k + lane] / p.n_local : 0;
    const int from = __shfl_sync(FULL, ordinal, owner);
    if (lane < p.top_k)
      p.dgate_TK[t * p.top_k + lane] =
          __ldcs(p.returned_gate_WNK + (static_cast<long long>(owner) * p.most_tokens + from) * p.top_k + lane);
#endif
  }
  if (last_block(p.done) && threadIdx.x == 0) *p.link.sequence = number;
}

#elif defined(TAIL)

struct Params {
  const int* end;  // the number of routed rows
  uint4* a;
  uint4* b;
  int a_pieces, b_pieces, n_rows;  // 16-byte pieces of a row; rows of both
};

// Zeros in the TAIL rows after the last routed one, as far as there are rows.
extern "C" __global__ void __launch_bounds__(256) clear_tail(const __grid_constant__ Params p) {
  const int row = *p.end + blockIdx.x;
  if (row >= p.n_rows) return;
  const uint4 zero = make_uint4(0, 0, 0, 0);
  for (int i = threadIdx.x; i < p.a_pieces; i += blockDim.x) p.a[static_cast<long long>(row) * p.a_pieces + i] = zero;
  for (int i = threadIdx.x; i < p.b_pieces; i += blockDim.x) p.b[static_cast<long long>(row) * p.b_pieces + i] = zero;
}

#else

struct Params {
  Link link;
  int phase, part;
};

// One warp: what follows it in the stream finds all that this phase brings.
extern "C" __global__ void __launch_bounds__(32) await_words(const __grid_constant__ Params p) {
  // A return must not fill the GPU with blocks that stand there until this wait ends, so nothing is let go ahead here.
  asm volatile("griddepcontrol.wait;" ::: "memory");
  if (threadIdx.x >= p.link.world) return;
  const Phase phase = static_cast<Phase>(p.phase);
  const int number = *p.link.sequence + 1;
  if (phase == RETURN || phase == GRADIENT_RETURN)
    await_sums(p.link, true, threadIdx.x, number, phase);
  else
    wait_for(p.link, ARRIVED, threadIdx.x, arrival(number, p.part), phase);
}

#endif
