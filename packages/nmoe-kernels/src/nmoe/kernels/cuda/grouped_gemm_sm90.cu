// Grouped GEMM over rows sorted by expert: out[r] = epilogue(a[r] · weight[expert of r]), bf16 in, fp32 accumulation.
//
// Persistent and warp-specialised. Warpgroup 0 fills a ring of shared-memory stages: weights by TMA, rows by TMA or, when
// they are gathered by index, by cp.async. Warpgroups 1 and 2 multiply, and each writes its half of the tile while the
// other may still multiply. Tiles come from a schedule made on the GPU (routing.cu): blocks of 256 rows of one expert.
//
// Compile-time choices (-D):
//   GATHER     1: row r of A is source[token[r]]; 0: row r of `rows`
//   WEIGHT_MN  0: weight rows run along the reduction (out, in); 1: along the output (in, out)
//   TILE_M     128 or 256 rows a CTA
//   TILE_N     128 or 256 columns of the product a CTA
//   STAGES     depth of the ring
//   EPILOGUE   STORE, SWIGLU, DSWIGLU
//   KEEP_PRE   SWIGLU: 1 writes the pre-activation too
//   SCALE      STORE: 1 multiplies each row by its gate
// Letters: R rows, N columns of the product, F expert width.
#include "tile_queue.cuh"

#define STORE 0
#define SWIGLU 1
#define DSWIGLU 2

struct Params {
  TensorMap rows;       // (R, reduction), box 128 × 64; DSWIGLU: pre (R, 2 F), box 64 × 64
  TensorMap weight;     // (e, ·, ·), box 128 × 64 or, WEIGHT_MN, 64 × 64
  const bf16* source;   // (T, reduction)
  const int* order;     // (R): token · top_k + slot
  const int* token;     // (R)
  const float* gate;    // (T, top_k)
  const int* schedule;  // block count and counters, then (expert, first row, rows, 0) of each block
  unsigned* counter;    // of this product's tiles, in the schedule's head
  bf16* out;            // STORE: (R, N); SWIGLU: activation (R, F); DSWIGLU: gated activation (R, F)
  bf16* out_pre;        // (R, 2, F): pre-activation, or its gradient
  float* partial;       // DSWIGLU: (column tiles, R), each row's part of its gate's gradient
  int reduction;
  int columns;  // N, or F for SWIGLU and DSWIGLU
  int n_rows;  // R, the stride of `partial`
  int n_tiles;  // of a block of the schedule: its halves, if tiles are that low, times the column tiles
};

namespace {

constexpr int kSchedule = 256;  // rows of a block of the schedule
constexpr int kHead = 8;        // words before its first block
constexpr int kK = 64;          // reduction elements a stage: one 128-byte swizzle row
constexpr int kWarpgroups = 2;
constexpr int kRowGroups = TILE_M / 128;  // 64-row products a warpgroup
constexpr int kStageA = TILE_M * kK * 2;
constexpr int kStageB = TILE_N * kK * 2;
constexpr int kStage = kStageA + kStageB;
constexpr int kTileColumns = EPILOGUE == SWIGLU ? TILE_N / 2 : TILE_N;  // output columns a tile
constexpr int kParts = kSchedule / TILE_M;                              // tiles a block of the schedule
constexpr int kChunk = 16 * 128;                                        // a warp's 16 rows of 64 columns, swizzled
constexpr int kStaging = 2 * kChunk;                                    // one is filled while the other is read
constexpr int kBarriers = STAGES * kStage + 8 * kStaging;               // offset of the barriers
constexpr int kProducerRegisters = GATHER ? 56 : 40;  // a gather keeps an address a row
constexpr int kConsumerRegisters = (504 - kProducerRegisters) / 2;

static_assert(kParts <= 2, "a block has two halves");
static_assert(TILE_N % 128 == 0, "a box holds 128 rows of weights");

struct Tile {
  int expert, first, rows, column;  // rows 0: there are no more tiles
};

__device__ __forceinline__ Tile as_tile(int4 v) { return {v.x, v.y, v.z, v.w}; }

__device__ __forceinline__ int take_number(const Params& p) { return TileQueue::take(p.counter, p.schedule[0] * p.n_tiles); }

// Tile `t`, or the next one that has rows.
__device__ __forceinline__ int4 look_up(const Params& p, int t) {
  for (;; t = take_number(p)) {
    const int block = t / p.n_tiles, rest = t - block * p.n_tiles, n_columns = p.n_tiles / kParts;
    if (block >= p.schedule[0]) return make_int4(0, 0, 0, 0);
    const int part = rest >= n_columns;
    const int4 entry = reinterpret_cast<const int4*>(p.schedule)[kHead / 4 + block];
    const int rows = min(TILE_M, entry.z - part * TILE_M);
    if (rows > 0) return make_int4(entry.x, entry.y + part * TILE_M, rows, (rest - part * n_columns) * kTileColumns);
  }
}

__device__ __forceinline__ void load_weight(const Params& p, const Tile& tile, int k, u32 to, u32 full) {
  constexpr int kBoxes = WEIGHT_MN ? TILE_N / 64 : TILE_N / 128;
#pragma unroll
  for (int box = 0; box < kBoxes; ++box) {
    int x, y, z = tile.expert;
    if (WEIGHT_MN) {
      x = tile.column + box * 64, y = k;
    } else if (EPILOGUE == SWIGLU) {  // gate rows, then up rows
      x = k, y = tile.column, z = 2 * tile.expert + box;
    } else {
      x = k, y = tile.column + box * 128;
    }
    tma_load(to + box * (WEIGHT_MN ? 8192 : 16384), &p.weight, full, x, y, z);
  }
}

// One stage of gathered rows. A thread copies one 16-byte column of every 16th row.
constexpr int kGathered = TILE_M / 16;

template <bool WHOLE>
__device__ __forceinline__ void gather(u32 to, const char* from, const u32 (&offset)[kGathered], int rows) {
#pragma unroll
  for (int first = 0; first < kGathered; first += 8) {
    u64 at[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) at[i] = address_at(from, offset[first + i]);
#pragma unroll
    for (int i = 0; i < 8; ++i) copy_async_16<WHOLE>(to + (first + i) * 2048, at[i], 16 * (first + i) < rows);
  }
}

// Warpgroup 0; its first thread alone where no rows are gathered.
__device__ __forceinline__ void produce(const Params& p, u32 stages, u32 full, u32 empty, TileQueue queue) {
  const int thread = threadIdx.x;
  const int n_steps = (p.reduction + kK - 1) / kK;
  if (!GATHER && thread != 0) return;
  const int row = thread / 8, chunk = thread % 8;
  const u32 place = stages + row * 128 + ((chunk ^ (row & 7)) << 4);
  Ring<STAGES> ring;
  if (thread == 0) queue.send(look_up(p, take_number(p)), 0);
  while (true) {
    const Tile tile = as_tile(queue.receive());
    if (tile.rows == 0) break;
    const int next = thread == 0 ? take_number(p) : 0;  // waited for once this tile's copies are on their way
#if GATHER
    u32 offset[kGathered];  // bytes
#pragma unroll
    for (int i = 0; i < kGathered; ++i) {
      const int token = p.token[tile.first + min(row + 16 * i, tile.rows - 1)];
      offset[i] = u32(token) * u32(p.reduction * 2) + chunk * 16;
    }
#endif
    for (int step = 0; step < n_steps; ++step, ring.advance()) {
      const u32 a = ring.stage() * kStage, ready = full + 8 * ring.stage();
      barrier_wait(empty + 8 * ring.stage(), ring.parity() ^ 1);
      if (thread == 0) {
        barrier_expect(ready, GATHER ? kStageB : kStage);
        load_weight(p, tile, step * kK, stages + a + kStageA, ready);
#if !GATHER
#pragma unroll
        for (int i = 0; i < kRowGroups; ++i) {
          tma_load(stages + a + i * 16384, &p.rows, ready, step * kK, tile.first + i * 128);
        }
#endif
      }
#if GATHER
      const char* from = reinterpret_cast<const char*>(p.source) + step * (kK * 2);
      if (tile.rows == TILE_M && (step + 1) * kK <= p.reduction) {
        gather<true>(place + a, from, offset, 0);
      } else {
        gather<false>(place + a, from, offset, step * kK + chunk * 8 < p.reduction ? tile.rows - row : 0);
      }
      copy_async_arrive(ready);
#endif
    }
    if (thread == 0) queue.send(look_up(p, next), queue.n);
#if EPILOGUE == DSWIGLU
    // The pre-activations follow in the same ring: 64 columns of gate and up of 64 rows for each warpgroup.
#pragma unroll 1
    for (int quarter = 0; quarter < kRowGroups * (TILE_N / 64); ++quarter, ring.advance()) {
      const int m = quarter / (TILE_N / 64), c = quarter % (TILE_N / 64);
      const u32 ready = full + 8 * ring.stage();
      barrier_wait(empty + 8 * ring.stage(), ring.parity() ^ 1);
      if (thread == 0) {
        barrier_expect(ready, 4 * 8192);
#pragma unroll
        for (int group = 0; group < kWarpgroups; ++group) {
          const int y = tile.first + (group * kRowGroups + m) * 64;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            tma_load(stages + ring.stage() * kStage + (group * 2 + half) * 8192, &p.rows, ready,
                     half * p.columns + tile.column + c * 64, y);
          }
        }
      }
      if (GATHER) copy_async_arrive(ready);
    }
#endif
  }
  if (GATHER) copy_async_wait();
}

// Where a lane's 16 bytes of a swizzled chunk are: as rows of matrix fragments 8 · `j` columns in, and as rows of memory.
__device__ __forceinline__ u32 fragment_at(u32 lane, u32 j) {
  return lane % 16 * 128 + ((j + lane / 16 ^ lane % 8) << 4);
}
__device__ __forceinline__ u32 line_at(u32 lane, u32 i) {
  return (i * 4 + lane / 8) * 128 + ((lane % 8 ^ (i * 4 + lane / 8) % 8) << 4);
}

// A warp's 16 rows of 64 columns, as fragments, to rows of global memory, 16 bytes a lane. Successive calls alternate
// between two chunks of staging: then one wait of the warp a call is enough.
__device__ __forceinline__ void write_chunk(u32 chunk, const u32 (&low)[8], const u32 (&high)[8], bf16* out, long stride,
                                            int rows, int columns) {
  const u32 lane = lane_now(), line = lane / 8;
  const int column = lane % 8 * 8;
#pragma unroll
  for (int j = 0; j < 8; j += 2) store_matrix_x4(chunk + fragment_at(lane, j), low[j], high[j], low[j + 1], high[j + 1]);
  __syncwarp();
  uint4 v[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = load_shared_16(chunk + line_at(lane, i));
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = i * 4 + line;
    if (row < rows && column < columns) store_global_16(out + row * stride + column, v[i]);
  }
}

#if EPILOGUE != DSWIGLU
// 16 rows of the product, of which `rows` exist. acc[4 j + i]: row lane / 4 (+ 8 for i > 1), column 8 j + 2 (lane % 4) + i % 2.
__device__ __forceinline__ void finish(const Params& p, const Tile& tile, float (&acc)[TILE_N / 2], u32 staging, int row,
                                       int rows, float gate_low, float gate_high) {
  if (rows <= 0) return;
#if EPILOGUE == STORE
#pragma unroll
  for (int c = 0; c < TILE_N / 64; ++c) {
    u32 low[8], high[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int i = c * 32 + j * 4;
      low[j] = pack_bf16(acc[i] * gate_low, acc[i + 1] * gate_low);
      high[j] = pack_bf16(acc[i + 2] * gate_high, acc[i + 3] * gate_high);
    }
    const int column = tile.column + c * 64;
    write_chunk(staging + c % 2 * kChunk, low, high, p.out + long(row) * p.columns + column, p.columns, rows,
                p.columns - column);
  }
#else
#pragma unroll
  for (int c = 0; c < kTileColumns / 64; ++c) {
    const int column = tile.column + c * 64;
    u32 low[8], high[8];
    if (KEEP_PRE) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const int i = half * TILE_N / 4 + c * 32 + j * 4;
          low[j] = pack_bf16(acc[i], acc[i + 1]);
          high[j] = pack_bf16(acc[i + 2], acc[i + 3]);
        }
        write_chunk(staging + (c + half) % 2 * kChunk, low, high, p.out_pre + (2l * row + half) * p.columns + column, 2l * p.columns, rows,
                    p.columns - column);
      }
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int g = c * 32 + j * 4, u = TILE_N / 4 + g;
      float a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = acc[g + i] * sigmoid(acc[g + i]) * acc[u + i];
      low[j] = pack_bf16(a[0], a[1]);
      high[j] = pack_bf16(a[2], a[3]);
    }
    write_chunk(staging + (KEEP_PRE ? c : c + 1) % 2 * kChunk, low, high, p.out + long(row) * p.columns + column, p.columns,
                rows, p.columns - column);
  }
#endif
}
#endif

#if EPILOGUE == DSWIGLU
// 16 rows and 64 columns of the gradient of the activation before its gate, in acc[first …]. `pre` is the address of the
// warp's rows of gate in the ring, 8192 bytes before those of up; their gradients take their place on the way out.
__device__ __forceinline__ void finish_chunk(const Params& p, const float (&acc)[TILE_N / 2], int first, u32 pre,
                                             u32 chunk, int row, int rows, int column, float gate_low, float gate_high,
                                             float (&part)[2]) {
  const u32 lane = lane_now(), line = lane / 8;
  constexpr int kWide = 4;  // times 8 columns at a time: more do not fit beside the accumulator
#pragma unroll
  for (int j0 = 0; j0 < 8; j0 += kWide) {
    u32 gate[kWide][2], up[kWide][2], activation[kWide][2];
#pragma unroll
    for (int j = 0; j < kWide; j += 2) {
      const u32 at = pre + fragment_at(lane, j0 + j);
      load_matrix_x4(at, gate[j][0], gate[j][1], gate[j + 1][0], gate[j + 1][1]);
      load_matrix_x4(at + 8192, up[j][0], up[j][1], up[j + 1][0], up[j + 1][1]);
    }
#pragma unroll
    for (int j = 0; j < kWide; ++j) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float scale = h ? gate_high : gate_low;
        float dg[2], du[2], a[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float d = acc[first + (j0 + j) * 4 + h * 2 + i];
          const float g = i ? bf16_high(gate[j][h]) : bf16_low(gate[j][h]);
          const float u = i ? bf16_high(up[j][h]) : bf16_low(up[j][h]);
          const float s = sigmoid(g), silu = g * s, gated = d * scale;
          a[i] = silu * u;
          part[h] += d * a[i];
          a[i] *= scale;
          dg[i] = gated * u * (s + silu * (1 - s));
          du[i] = gated * silu;
        }
        gate[j][h] = pack_bf16(dg[0], dg[1]);
        up[j][h] = pack_bf16(du[0], du[1]);
        activation[j][h] = pack_bf16(a[0], a[1]);
      }
    }
#pragma unroll
    for (int j = 0; j < kWide; j += 2) {
      const u32 at = fragment_at(lane, j0 + j);
      store_matrix_x4(pre + at, gate[j][0], gate[j][1], gate[j + 1][0], gate[j + 1][1]);
      store_matrix_x4(pre + at + 8192, up[j][0], up[j][1], up[j + 1][0], up[j + 1][1]);
      store_matrix_x4(chunk + at, activation[j][0], activation[j][1], activation[j + 1][0], activation[j + 1][1]);
    }
  }
  __syncwarp();
  // In units of 16 bytes, without a sign: 64-bit addresses and the signs of quotients do not fit beside the accumulator.
  const u32 width = u32(p.columns) / 8, at = u32(column) / 8 + lane % 8;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    uint4 v[2][3];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      v[k][0] = load_shared_16(pre + line_at(lane, i + k));
      v[k][1] = load_shared_16(pre + line_at(lane, i + k) + 8192);
      v[k][2] = load_shared_16(chunk + line_at(lane, i + k));
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int r = (i + k) * 4 + line;
      if (r < rows && at < width) {
        const u32 to = u32(row + r) * width + at, to_pre = to + u32(row + r) * width;
        store_global_16(reinterpret_cast<uint4*>(p.out_pre) + to_pre, v[k][0]);
        store_global_16(reinterpret_cast<uint4*>(p.out_pre) + (to_pre + width), v[k][1]);
        store_global_16(reinterpret_cast<uint4*>(p.out) + to, v[k][2]);
      }
    }
  }
}

// Each row's part of its gate's gradient: the sum over this tile's columns, which four lanes hold.
__device__ __forceinline__ void finish_gates(const Params& p, const Tile& tile, float (&part)[2], int row, int rows) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int lanes = 1; lanes < 4; lanes *= 2) part[h] += __shfl_xor_sync(0xffffffff, part[h], lanes);
    const int r = lane / 4 + 8 * h;
    if (lane % 4 == 0 && r < rows) p.partial[u64(u32(tile.column) / kTileColumns) * p.n_rows + row + r] = part[h];
  }
}
#endif

// Warpgroups 1 and 2.
__device__ __forceinline__ void consume(const Params& p, u32 stages, u32 full, u32 empty, TileQueue queue) {
  const int group = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const u32 staging = stages + STAGES * kStage + (group * 4 + warp) * kStaging;
  const int n_steps = (p.reduction + kK - 1) / kK;
  constexpr int kChunks = EPILOGUE == DSWIGLU ? kRowGroups * (TILE_N / 64) : 0;  // stages of pre-activations
  constexpr bool kGated = EPILOGUE == DSWIGLU || (EPILOGUE == STORE && SCALE);
  constexpr u32 kNextA = 1;                        // not used by a K-major operand
  constexpr u32 kNextB = WEIGHT_MN ? 8192 : 1;
  constexpr int kDeeperA = 32 >> 4;                // 16 reduction elements on, in descriptor units
  constexpr int kDeeperB = (WEIGHT_MN ? 2048 : 32) >> 4;

  auto release = [&](u32 stage) {
    if (lane == 0) barrier_arrive(empty + 8 * stage);
  };

  Ring<STAGES> ring;
  while (true) {
    const Tile tile = as_tile(queue.receive());
    if (tile.rows == 0) return;
    const int base = group * 64 * kRowGroups + warp * 16;  // first of this warp's rows in the tile
    if (tile.rows <= group * 64 * kRowGroups) {            // nothing to multiply: only hand the stages on
#pragma unroll 1  // unrolled, it would keep its counts in registers through the epilogue
      for (int step = 0; step < n_steps + kChunks; ++step, ring.advance()) {
        barrier_wait(full + 8 * ring.stage(), ring.parity());
        __syncwarp();
        release(ring.stage());
      }
      continue;
    }
    int slots[kRowGroups][2];
#pragma unroll
    for (int m = 0; m < kRowGroups; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = base + m * 64 + lane / 4 + h * 8;
        slots[m][h] = kGated && row < tile.rows ? p.order[tile.first + row] : 0;
      }
    }
    float acc[kRowGroups][TILE_N / 2];
    u32 last = 0;
    for (int step = 0; step < n_steps; ++step, ring.advance()) {
      barrier_wait(full + 8 * ring.stage(), ring.parity());
      if (GATHER) fence_proxy_async();
      const u32 at = stages + ring.stage() * kStage;
      const u64 a = wgmma_descriptor(at + group * kRowGroups * 8192, kNextA);
      const u64 b = wgmma_descriptor(at + kStageA, kNextB);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kK / 16; ++k) {
#pragma unroll
        for (int m = 0; m < kRowGroups; ++m) {
          wgmma<0, WEIGHT_MN>(acc[m], a + m * (8192 >> 4) + k * kDeeperA, b + k * kDeeperB, step | k);
        }
      }
      wgmma_commit();
      wgmma_wait<1>();
      if (step > 0) release(last);
      last = ring.stage();
    }
    float gates[kRowGroups][2];  // asked for before the wait, and not kept through the loop
#pragma unroll
    for (int m = 0; m < kRowGroups; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) gates[m][h] = kGated ? p.gate[slots[m][h]] : 1.0f;
    }
    wgmma_wait<0>();
    release(last);
#pragma unroll
    for (int m = 0; m < kRowGroups; ++m) keep_after_wait(acc[m]);
#pragma unroll
    for (int m = 0; m < kRowGroups; ++m) {
      const int row = tile.first + base + m * 64, rows = min(16, tile.rows - base - m * 64);
#if EPILOGUE == DSWIGLU
      float part[2] = {0, 0};
#pragma unroll
      for (int c = 0; c < TILE_N / 64; ++c, ring.advance()) {
        barrier_wait(full + 8 * ring.stage(), ring.parity());
        const u32 pre = stages + ring.stage() * kStage + group * 16384 + warp * 2048;
        finish_chunk(p, acc[m], c * 32, pre, staging + c % 2 * kChunk, row, rows, tile.column + c * 64, gates[m][0],
                     gates[m][1], part);
        fence_proxy_async();
        __syncwarp();
        release(ring.stage());
      }
      finish_gates(p, tile, part, row, rows);
#else
      finish(p, tile, acc[m], staging, row, rows, gates[m][0], gates[m][1]);
#endif
    }
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(384, 1) grouped_gemm(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const u32 stages = shared_address(memory);
  const u32 full = stages + kBarriers, empty = full + 8 * STAGES;
  const TileQueue queue(empty + 8 * STAGES);
  if (threadIdx.x == 0) {
    prefetch_map(&p.weight);
    if (!GATHER || EPILOGUE == DSWIGLU) prefetch_map(&p.rows);
    for (int s = 0; s < STAGES; ++s) {
      barrier_init(full + 8 * s, GATHER ? 1 + 128 : 1);
      barrier_init(empty + 8 * s, kWarpgroups * 4);
    }
    queue.init(kWarpgroups * 128 + (GATHER ? 128 : 1));
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    registers_shrink<kProducerRegisters>();
    produce(p, stages, full, empty, queue);
  } else {
    registers_grow<kConsumerRegisters>();
    consume(p, stages, full, empty, queue);
  }
}
