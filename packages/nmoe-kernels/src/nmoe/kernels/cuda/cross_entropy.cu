// What cross-entropy does between its matrix products: -log softmax(logits)[target] of each row and, if wanted, its
// gradient, with one read of the logits. Macros: CLUSTER blocks that share a row, 1, 2, 4 or 8; THREADS of a block, a
// divisor of 1024; PER_LANE quads of a piece that a lane takes; MOST_QUADS of a slice. A quad is four elements.
//
// A row stays in shared memory between the pass that sums and the pass that writes. Each block of a cluster holds a
// slice of the row, in pieces of one bulk copy each. Piece i is warp i % WARPS's alone: its lanes wait for it, sum it,
// read it again to write its gradient, and one of them then fetches the same piece of the cluster's next row into its
// place. So no warp waits for another but where sums meet, once a row, and memory is busy while they do. Clusters take
// their rows in turn.
//
// Exponentials are powers of 2 of `logit * log2(e) - peak`; peaks are kept in that scale. A logit costs the special-
// function units one in each pass, and a piece one for each lane: 2.1 a logit in all. Memory at 4.3 TB/s brings each of
// 132 multiprocessors 3.1 logits a clock of 1.75 GHz: 6.4 of the 16 that its units give.
#include "sm90.cuh"

constexpr u32 WARPS = THREADS / 32;
constexpr u32 WIDTH = 4;
constexpr u32 PIECE = 32 * PER_LANE;
constexpr u32 PIECES = (MOST_QUADS + PIECE - 1) / PIECE;
constexpr u32 PARTS = CLUSTER * WARPS;
constexpr long long IGNORE = -100;
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;
constexpr float LOWEST = -3.4028234663852886e38f;  // unlike -inf, it can be taken from -inf

struct CrossEntropyParams {
  const float* logits;
  const long long* target;
  float* nll;
  bf16* dlogits;  // null: the losses alone
  u64 rows;
  u32 quads;  // of a row
  u32 slice;  // quads of a block; the last one of a cluster has what is left, which is not nothing
};

// --- PTX ------------------------------------------------------------------------------------------------------------

// Within 2 ulp; below fp32's normal range, 0.
__device__ __forceinline__ float power_of_2(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

// Volatile, so that they leave where they stand and not where they are used.
__device__ __forceinline__ long long load_early(const long long* from) {
  long long x;
  asm volatile("ld.global.s64 %0, [%1];" : "=l"(x) : "l"(from));
  return x;
}
__device__ __forceinline__ float load_early(const float* from) {
  float x;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(x) : "l"(from));
  return x;
}

// Two numbers into the shared memory of a block of the cluster, where `to` and `barrier` are as they are here; the
// barrier there counts their 8 bytes once they have come.
__device__ __forceinline__ void send(u32 to, u32 barrier, u32 block, float a, float b) {
  asm volatile(
      "{\n.reg .u32 there, barrier_there;\n"
      "mapa.shared::cluster.u32 there, %0, %2;\n"
      "mapa.shared::cluster.u32 barrier_there, %1, %2;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [there], {%3, %4}, [barrier_there];\n}\n" ::"r"(to),
      "r"(barrier), "r"(block), "f"(a), "f"(b)
      : "memory");
}

// As barrier_wait, for what other blocks have sent.
__device__ __forceinline__ void barrier_wait_cluster(u32 barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "AGAIN:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@done bra END;\n"
      "bra AGAIN;\n"
      "END:\n}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// --- sums of exponentials -------------------------------------------------------------------------------------------

// total * 2^peak; the peak is never NaN, and a total that is NaN stays so.
struct Sum {
  float peak, total;
};
constexpr Sum NOTHING = {LOWEST, 0.0f};

__device__ __forceinline__ float exponential(float logit, float peak) {
  return power_of_2(__fmaf_rn(logit, LOG2_E, -peak));
}

__device__ __forceinline__ void add_piece(Sum& sum, const float (&x)[PER_LANE][WIDTH]) {
  float top = LOWEST;  // passes over a NaN, which is not lost: it ends in the total
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i)
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) top = fmaxf(top, x[i][j]);
  const float peak = fmaxf(sum.peak, top * LOG2_E);
  float part[WIDTH] = {};
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i)
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) part[j] += exponential(x[i][j], peak);
  sum.total = __fmaf_rn(sum.total, power_of_2(sum.peak - peak), (part[0] + part[1]) + (part[2] + part[3]));
  sum.peak = peak;
}

__device__ __forceinline__ void add_sum(Sum& sum, const Sum& other) {
  const float peak = fmaxf(sum.peak, other.peak);
  sum.total = __fmaf_rn(sum.total, power_of_2(sum.peak - peak), other.total * power_of_2(other.peak - peak));
  sum.peak = peak;
}

// The sum over a warp, the same bits in each lane.
__device__ __forceinline__ Sum warp_sum(const Sum& lane) {
  Sum sum = lane;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum.peak = fmaxf(sum.peak, __shfl_xor_sync(~0u, sum.peak, step));
  sum.total *= power_of_2(lane.peak - sum.peak);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum.total += __shfl_xor_sync(~0u, sum.total, step);
  return sum;
}

// --- a block's slice of its rows ------------------------------------------------------------------------------------

struct Slice {
  const float4* held;  // in shared memory: the row that is worked on, and pieces of the next
  const u64* full;     // barriers: a piece is there
  u64 begin;           // quads of a row before this slice
  u32 quads;

  __device__ __forceinline__ u32 left_from(u32 piece) const { return quads - piece * PIECE; }

  // By one lane of the piece's warp.
  __device__ __forceinline__ void fetch(const CrossEntropyParams& p, u64 row, u32 piece) const {
    const u32 bytes = min(left_from(piece), PIECE) * sizeof(float4);
    const u32 barrier = shared_address(full + piece);
    barrier_expect(barrier, bytes);
    const float* const from = p.logits + (row * p.quads + begin + piece * PIECE) * WIDTH;
    bulk_load(shared_address(held + piece * PIECE), from, bytes, barrier);
  }

  // What stands past the slice's end is -inf: it adds nothing.
  __device__ __forceinline__ void read(float (&x)[PER_LANE][WIDTH], u32 piece, u32 lane) const {
    if (left_from(piece) >= PIECE) {
#pragma unroll
      for (int i = 0; i < PER_LANE; ++i) read_quad(x[i], piece * PIECE + i * 32 + lane);
    } else {
#pragma unroll
      for (int i = 0; i < PER_LANE; ++i) {
        const u32 at = piece * PIECE + i * 32 + lane;
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) x[i][j] = __uint_as_float(0xff800000u);
        if (at < quads) read_quad(x[i], at);
      }
    }
  }

  __device__ __forceinline__ void read_quad(float (&x)[WIDTH], u32 at) const {
    const float4 quad = held[at];
    x[0] = quad.x, x[1] = quad.y, x[2] = quad.z, x[3] = quad.w;
  }

  // All lanes have read the piece for the last time: the next row's takes its place, if there is one.
  __device__ __forceinline__ void release(const CrossEntropyParams& p, u64 next, u32 piece, u32 lane) const {
    fence_proxy_async();  // what was read, before what the copy writes
    __syncwarp();
    if (lane == 0 && next < p.rows) fetch(p, next, piece);
  }
};

__device__ __forceinline__ void store_quad(bf16* to, u32 low, u32 high) {
  *reinterpret_cast<uint2*>(to) = make_uint2(low, high);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1024 / THREADS)
    __cluster_dims__(CLUSTER, 1, 1)  // of one block too: st.async is for clusters alone
        cross_entropy(const __grid_constant__ CrossEntropyParams p) {
  extern __shared__ float4 held[];
  __shared__ u64 full[PIECES];
  // What each warp of the cluster has summed, and a barrier on which all of it counts: of the rows in turn. A warp
  // sends a row's sum only once it has read all of the row before: nothing is overwritten that is still to be read, and
  // no barrier gets bytes of two rows at once.
  __shared__ Sum parts[2][PARTS];
  __shared__ u64 all_there[2];

  const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const u32 block = blockIdx.x % CLUSTER;
  const u64 stride = gridDim.x / CLUSTER;
  if (threadIdx.x == 0) {
    for (u32 piece = 0; piece < PIECES; ++piece) barrier_init(shared_address(full + piece), 1);
    for (u32 turn = 0; turn < 2; ++turn) barrier_init(shared_address(all_there + turn), 1);
    barrier_init_fence();
  }
  cluster_sync();

  const u64 begin = static_cast<u64>(block) * p.slice;
  const Slice slice = {held, full, begin, min(p.slice, p.quads - static_cast<u32>(begin))};
  u64 row = blockIdx.x / CLUSTER;
  // The first row from here on that is scored, whose pieces are on their way.
  u64 scored = row;
  long long target = 0;
  while (scored < p.rows && (target = load_early(p.target + scored)) == IGNORE) scored += stride;
  if (lane == 0 && scored < p.rows)
    for (u32 piece = warp; piece * PIECE < slice.quads; piece += WARPS) slice.fetch(p, scored, piece);

  u32 count = 0;  // of scored rows so far
  for (; row < p.rows; row += stride) {
    const bool teller = block == 0 && threadIdx.x == 0;
    bf16* const dlogits = p.dlogits == nullptr ? nullptr : p.dlogits + (row * p.quads + slice.begin) * WIDTH;
    if (row != scored) {
      if (teller) p.nll[row] = 0.0f;
      if (dlogits != nullptr)
        for (u32 at = threadIdx.x; at < slice.quads; at += THREADS) store_quad(dlogits + at * WIDTH, 0, 0);
      continue;
    }
    // Asked for now, looked at after the sums.
    u64 next = row + stride;
    long long next_target = 0;
    if (next < p.rows) next_target = load_early(p.target + next);
    const bool has_target = target >= 0 && target < static_cast<long long>(p.quads) * WIDTH;
    float aim = __uint_as_float(0x7fffffffu);  // no id of the vocabulary: NaN
    if (teller && has_target) aim = load_early(p.logits + row * p.quads * WIDTH + target);

    float x[PER_LANE][WIDTH];
    Sum sum = NOTHING;
    for (u32 piece = warp; piece * PIECE < slice.quads; piece += WARPS) {
      barrier_wait(shared_address(full + piece), count & 1);
      slice.read(x, piece, lane);
      add_piece(sum, x);
    }

    const u32 turn = count & 1, barrier = shared_address(all_there + turn);
    sum = warp_sum(sum);
    if (threadIdx.x == 0) barrier_expect(barrier, PARTS * sizeof(Sum));
    if (lane < CLUSTER) send(shared_address(parts[turn] + block * WARPS + warp), barrier, lane, sum.peak, sum.total);
    while (next < p.rows && next_target == IGNORE) {
      next += stride;
      if (next < p.rows) next_target = load_early(p.target + next);
    }
    barrier_wait_cluster(barrier, count / 2 & 1);
    sum = NOTHING;
#pragma unroll
    for (u32 i = 0; i < PARTS; i += 32)
      if (i + lane < PARTS) add_sum(sum, parts[turn][i + lane]);
    sum = warp_sum(sum);
    if (teller) p.nll[row] = logf(sum.total) - LN_2 * __fmaf_rn(aim, LOG2_E, -sum.peak);

    if (dlogits == nullptr) {
      for (u32 piece = warp; piece * PIECE < slice.quads; piece += WARPS) slice.release(p, next, piece, lane);
    } else {
      const float share = 1.0f / sum.total;
      // In this slice, modulo 2^32: far beyond all that is compared with it where there is none.
      const u32 aimed_at = has_target ? static_cast<u32>(target) - static_cast<u32>(slice.begin) * WIDTH : ~0u;
      for (u32 piece = warp; piece * PIECE < slice.quads; piece += WARPS) {
        slice.read(x, piece, lane);
        slice.release(p, next, piece, lane);
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i)
#pragma unroll
          for (int j = 0; j < WIDTH; ++j) x[i][j] = exponential(x[i][j], sum.peak) * share;
        if (aimed_at / (PIECE * WIDTH) == piece) {
#pragma unroll
          for (int i = 0; i < PER_LANE; ++i)
#pragma unroll
            for (int j = 0; j < WIDTH; ++j)
              if (aimed_at == (piece * PIECE + i * 32 + lane) * WIDTH + j) x[i][j] -= 1.0f;
        }
#pragma unroll
        for (int i = 0; i < PER_LANE; ++i) {
          const u32 at = piece * PIECE + i * 32 + lane;
          if (at < slice.quads)
            store_quad(dlogits + at * WIDTH, pack_bf16(x[i][0], x[i][1]), pack_bf16(x[i][2], x[i][3]));
        }
      }
    }
    scored = next;
    target = next_target;
    ++count;
  }
  cluster_sync();  // a block's shared memory stays until all have sent
}
