// Grouped GEMM over rows sorted by expert: out[r] = epilogue(a[r] · weight[expert of r]), bf16 in, fp32 accumulation.
//
// Persistent and warp-specialised. Warpgroup 0 fills a ring of shared-memory stages: weights by TMA, rows by TMA or, when
// they are gathered by index, by cp.async. Warpgroups 1 and 2 multiply, and each writes its half of the tile while the
// other may still multiply. Tiles come from a schedule that is made on the GPU: blocks of 256 rows of one expert.
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
//   ARRIVAL    of rows that other ranks send: NONE, all are there; AWAITED, each tile waits for the wave that its rows come
//              with (exchange.cu); ONE_WAVE, the tiles of one wave alone
// Letters: R rows, N columns of the product, F expert width.
#include "tile_queue.cuh"

#define NONE 0
#define AWAITED 1
#define ONE_WAVE 2

#if ARRIVAL == AWAITED
#include "link.cuh"
#endif

#define STORE 0
#define SWIGLU 1
#define DSWIGLU 2

struct Params {
  TensorMap rows;       // (R, reduction), box 128 × 64; DSWIGLU: pre (R, 2 F), box 64 × 64
  TensorMap weight;     // (e, ·, ·), box 128 × 64 or, WEIGHT_MN, 64 × 64
  TensorMap out;        // STORE: (R, N); SWIGLU: activation (R, F); DSWIGLU: gated activation (R, F); box 16 × 64
  TensorMap out_row;    // the same, box 1 × 64
  TensorMap out_pre;    // (R, 2, F): pre-activation, or its gradient; box 16 × 1 × 64
  TensorMap out_pre_row;
  const bf16* source;   // (T, reduction)
  const int* order;     // (R): token · top_k + slot
  const int* token;     // (R)
  const float* gate;    // (T, top_k)
  const int* schedule;  // block count and counters, then (expert, first row, rows, wave) of each block
  unsigned* counter;    // of this product's tiles, in the schedule's head
  float* partial;       // DSWIGLU: (column tiles, R), each row's part of its gate's gradient
  int reduction;
  int columns;  // N, or F for SWIGLU and DSWIGLU
  int n_rows;  // R, the stride of `partial`
  int n_tiles;  // of a block of the schedule: its halves, if tiles are that low, times the column tiles
#if ARRIVAL == AWAITED
  Link link;
  int n_waves;
#elif ARRIVAL == ONE_WAVE
  const int* range;  // first block of the schedule, and the first after the last
#endif
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
constexpr int kPreSteps = EPILOGUE == DSWIGLU ? kRowGroups * TILE_N / 64 : 0;  // stages of pre-activations
constexpr int kBarriers = STAGES * kStage + 8 * kStaging;               // offset of the barriers
constexpr int kProducerRegisters = GATHER ? 56 : 40;  // a gather keeps an address a row
constexpr int kConsumerRegisters = (504 - kProducerRegisters) / 2;

static_assert(kParts <= 2, "a block has two halves");
static_assert(TILE_N % 128 == 0, "a box holds 128 rows of weights");
static_assert(EPILOGUE != SWIGLU || TILE_N == 256, "gate and up are a box each; chunks of staging alternate over tiles");

struct Tile {
  int expert, first, rows, column;  // rows 0: there are no more tiles
};

__device__ __forceinline__ Tile as_tile(int4 v) { return {v.x, v.y, v.z, v.w}; }

#if ARRIVAL == ONE_WAVE
__device__ __forceinline__ int first_block(const Params& p) { return p.range[0]; }
__device__ __forceinline__ int block_count(const Params& p) { return p.range[1] - p.range[0]; }
#else
__device__ __forceinline__ int first_block(const Params&) { return 0; }
__device__ __forceinline__ int block_count(const Params& p) { return p.schedule[0]; }
#endif

__device__ __forceinline__ int take_number(const Params& p) { return TileQueue::take(p.counter, block_count(p) * p.n_tiles); }

#if ARRIVAL == AWAITED
// What one thread does before it hands out a tile of wave `wave`. Dispatch is on all GPUs by now, and ends without them.
__device__ __forceinline__ void await_wave(const Params& p, int wave) {
  const int part = wave == p.n_waves - 1 ? ALL : wave + 1, wanted = arrival(*p.link.sequence + 1, part);
  for (int source = 0; source < p.link.world; ++source) wait_for(p.link, ARRIVED, source, wanted, DISPATCH);
}
#endif

// Tile `t`, or the next one that has rows. `waves` counts those that are known to be there.
__device__ __forceinline__ int4 look_up(const Params& p, int t, int& waves) {
  for (;; t = take_number(p)) {
    const int block = t / p.n_tiles, rest = t - block * p.n_tiles, n_columns = p.n_tiles / kParts;
    if (block >= block_count(p)) return make_int4(0, 0, 0, 0);
    const int part = rest >= n_columns;
    const int4 entry = reinterpret_cast<const int4*>(p.schedule)[kHead / 4 + first_block(p) + block];
    const int rows = min(TILE_M, entry.z - part * TILE_M);
    if (rows <= 0) continue;
#if ARRIVAL == AWAITED
    if (entry.w >= waves) {
      await_wave(p, entry.w);
      waves = entry.w + 1;
    }
#endif
    return make_int4(entry.x, entry.y + part * TILE_M, rows, (rest - part * n_columns) * kTileColumns);
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
  int waves = 0;
  if (thread == 0) queue.send(look_up(p, take_number(p), waves), 0);
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
        for (int i = 0; i < TILE_M / 128; ++i) {
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
    if (thread == 0) queue.send(look_up(p, next, waves), queue.n);
#if EPILOGUE == DSWIGLU
    // The pre-activations follow in the same ring: gate and up of 64 rows and 64 columns for each warpgroup.
#pragma unroll 1
    for (int step = 0; step < kPreSteps; ++step, ring.advance()) {
      const u32 ready = full + 8 * ring.stage();
      barrier_wait(empty + 8 * ring.stage(), ring.parity() ^ 1);
      if (thread == 0) {
        barrier_expect(ready, 4 * 8192);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int m = i / 2 * kRowGroups + step / (TILE_N / 64), c = step % (TILE_N / 64);
          tma_load(stages + ring.stage() * kStage + i * 8192, &p.rows, ready, i % 2 * p.columns + tile.column + c * 64,
                   tile.first + m * 64);
        }
      }
      if (GATHER) copy_async_arrive(ready);
    }
#endif
  }
  if (GATHER) copy_async_wait();
}

// Where a lane's 16 bytes of a swizzled chunk are: those of matrix fragments 8 · `j` columns in.
__device__ __forceinline__ u32 fragment_at(u32 lane, u32 j) {
  return lane % 16 * 128 + ((j + lane / 16 ^ lane % 8) << 4);
}

// A warp's chunk of 16 rows and 64 columns, of which `rows` rows exist, from shared to global memory: at once or, where
// another expert's rows follow, row by row. Every lane then has one more group of copies under way.
__device__ __forceinline__ void write_chunk(const TensorMap& whole, const TensorMap& single, u32 chunk, int column, int row,
                                            int rows) {
  const int lane = lane_now();
  if (rows >= 16) {
    if (lane == 0) tma_store(&whole, chunk, column, row);
  } else if (lane < rows) {
    tma_store(&single, chunk + lane * 128, column, row + lane);
  }
  tma_store_commit();
}

__device__ __forceinline__ void write_chunk(const TensorMap& whole, const TensorMap& single, u32 chunk, int column, int half,
                                            int row, int rows) {
  const int lane = lane_now();
  if (rows >= 16) {
    if (lane == 0) tma_store(&whole, chunk, column, half, row);
  } else if (lane < rows) {
    tma_store(&single, chunk + lane * 128, column, half, row + lane);
  }
  tma_store_commit();
}

#if EPILOGUE != DSWIGLU
// Matrix fragments to the warp's next chunk of staging, once its last copy has been read. Returns its address.
__device__ __forceinline__ u32 stage_chunk(u32 staging, int number, const u32 (&low)[8], const u32 (&high)[8]) {
  const u32 lane = lane_now(), chunk = staging + number % 2 * kChunk;
  tma_store_wait<1>();
  __syncwarp();
#pragma unroll
  for (int j = 0; j < 8; j += 2) store_matrix_x4(chunk + fragment_at(lane, j), low[j], high[j], low[j + 1], high[j + 1]);
  fence_proxy_async();
  __syncwarp();
  return chunk;
}

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
    const u32 chunk = stage_chunk(staging, c, low, high);
    write_chunk(p.out, p.out_row, chunk, tile.column + c * 64, row, rows);
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
        const u32 chunk = stage_chunk(staging, c * 3 + half, low, high);
        write_chunk(p.out_pre, p.out_pre_row, chunk, column, half, row, rows);
      }
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int g = c * 32 + j * 4, u = TILE_N / 4 + g;
      float a[4];
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        float s[2];
        sigmoid({acc[g + i], acc[g + i + 1]}, s);
        a[i] = acc[g + i] * s[0] * acc[u + i];
        a[i + 1] = acc[g + i + 1] * s[1] * acc[u + i + 1];
      }
      low[j] = pack_bf16(a[0], a[1]);
      high[j] = pack_bf16(a[2], a[3]);
    }
    const u32 chunk = stage_chunk(staging, KEEP_PRE ? c * 3 + 2 : c, low, high);
    write_chunk(p.out, p.out_row, chunk, column, row, rows);
  }
#endif
}
#endif

#if EPILOGUE == DSWIGLU
// 16 rows and 64 columns of the gradient of the activation before its gate, in acc[first …]. `pre` is the address of the
// warp's rows of gate in the ring, 8192 bytes before those of up; their gradients take their place on the way out.
__device__ __forceinline__ void finish_chunk(const Params& p, const float (&acc)[TILE_N / 2], int first, u32 pre,
                                             u32 chunk, float gate_low, float gate_high, float (&part)[2]) {
  constexpr int kWide = 4;  // times 8 columns at a time: more do not fit beside the accumulator
#pragma unroll
  for (int j0 = 0; j0 < 8; j0 += kWide) {
    u32 gate[kWide][2], up[kWide][2], activation[kWide][2];
#pragma unroll
    for (int j = 0; j < kWide; j += 2) {
      const u32 at = pre + fragment_at(lane_now(), j0 + j);
      load_matrix_x4(at, gate[j][0], gate[j][1], gate[j + 1][0], gate[j + 1][1]);
      load_matrix_x4(at + 8192, up[j][0], up[j][1], up[j + 1][0], up[j + 1][1]);
    }
#pragma unroll
    for (int j = 0; j < kWide; ++j) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float scale = h ? gate_high : gate_low;
        const float g[2] = {bf16_low(gate[j][h]), bf16_high(gate[j][h])};
        float s[2], dg[2], du[2], a[2];
        sigmoid(g, s);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float d = acc[first + (j0 + j) * 4 + h * 2 + i];
          const float u = i ? bf16_high(up[j][h]) : bf16_low(up[j][h]);
          const float silu = g[i] * s[i], gated = d * scale;
          a[i] = silu * u;
          part[h] += d * a[i];
          a[i] *= scale;
          dg[i] = gated * u * (s[i] + silu * (1 - s[i]));
          du[i] = gated * silu;
        }
        gate[j][h] = pack_bf16(dg[0], dg[1]);
        up[j][h] = pack_bf16(du[0], du[1]);
        activation[j][h] = pack_bf16(a[0], a[1]);
      }
    }
#pragma unroll
    for (int j = 0; j < kWide; j += 2) {
      const u32 at = fragment_at(lane_now(), j0 + j);
      store_matrix_x4(pre + at, gate[j][0], gate[j][1], gate[j + 1][0], gate[j + 1][1]);
      store_matrix_x4(pre + at + 8192, up[j][0], up[j][1], up[j + 1][0], up[j + 1][1]);
      store_matrix_x4(chunk + at, activation[j][0], activation[j][1], activation[j + 1][0], activation[j + 1][1]);
    }
  }
  fence_proxy_async();
  __syncwarp();
}

// What finish_chunk left, from shared to global memory: as write_chunk.
__device__ __forceinline__ void write_gradients(const Params& p, u32 pre, u32 chunk, int column, int row, int rows) {
  const int lane = lane_now();
  if (rows >= 16) {
    if (lane == 0) {
      tma_store(&p.out_pre, pre, column, 0, row);
      tma_store(&p.out_pre, pre + 8192, column, 1, row);
      tma_store(&p.out, chunk, column, row);
    }
  } else if (lane < rows) {
    tma_store(&p.out_pre_row, pre + lane * 128, column, 0, row + lane);
    tma_store(&p.out_pre_row, pre + 8192 + lane * 128, column, 1, row + lane);
    tma_store(&p.out_row, chunk + lane * 128, column, row + lane);
  }
  tma_store_commit();
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
    if (tile.rows == 0) break;
    const int base = group * 64 * kRowGroups + warp * 16;  // first of this warp's rows in the tile
    if (tile.rows <= group * 64 * kRowGroups) {            // nothing to multiply: only hand the stages on
#pragma unroll 1  // unrolled, it would keep its counts in registers through the epilogue
      for (int step = 0; step < n_steps + kPreSteps; ++step, ring.advance()) {
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
      float gate_part[2] = {0, 0};
#pragma unroll
      for (int c = 0; c < TILE_N / 64; ++c, ring.advance()) {
        barrier_wait(full + 8 * ring.stage(), ring.parity());
        const u32 consumer = warp_now() - 4, chunk = stages + STAGES * kStage + consumer * kStaging + c % 2 * kChunk;
        const u32 pre = stages + ring.stage() * kStage + consumer / 4 * 16384 + consumer % 4 * 2048;
        finish_chunk(p, acc[m], c * 32, pre, chunk, gates[m][0], gates[m][1], gate_part);
        write_gradients(p, pre, chunk, tile.column + c * 64, row, rows);
        tma_store_wait<1>();  // what was under way before has left: chunk and stage are free
        __syncwarp();
        if (m + c > 0) release(ring.stage_before());
      }
      finish_gates(p, tile, gate_part, row, rows);
      if (m == kRowGroups - 1) {
        tma_store_wait<0>();
        __syncwarp();
        release(ring.stage_before());
      }
#else
      finish(p, tile, acc[m], staging, row, rows, gates[m][0], gates[m][1]);
#endif
    }
  }
  tma_store_wait<0>();
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
