// Hands out a persistent kernel's tiles in order: one thread of a block takes the next from a counter of all blocks, and
// passes it on to the block's warps. Blocks that come along slowly take fewer; those at work at one time are neighbours,
// which share what L2 holds. Which block computes a tile has no influence on its bits.
#pragma once
#include "sm90.cuh"

struct TileQueue {
  u32 shared;  // two tiles of 16 bytes, two barriers that say that they are there, two that they have been read
  u32 n = 0;

  __device__ __forceinline__ explicit TileQueue(u32 shared) : shared(shared) {}

  // One thread of the block. `readers`: threads that call `receive` for each tile.
  __device__ __forceinline__ void init(u32 readers) const {
    for (int i = 0; i < 2; ++i) {
      barrier_init(shared + 32 + 8 * i, 1);
      barrier_init(shared + 48 + 8 * i, readers);
    }
  }

  // Number of the next tile; `total` or more: there is none. A launch asks total + gridDim.x times, and then the counter is
  // back at 0 for the next one.
  __device__ __forceinline__ static int take(unsigned* counter, int total) {
    return static_cast<int>(atomicInc(counter, static_cast<unsigned>(total) + gridDim.x - 1));
  }

  // Passes on tile `n`: by the thread that takes them, 0 first.
  __device__ __forceinline__ void send(int4 tile, u32 n) const {
    barrier_wait(shared + 48 + 8 * (n & 1), (n >> 1 & 1) ^ 1);
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(shared + 16 * (n & 1)), "r"(tile.x), "r"(tile.y),
                 "r"(tile.z), "r"(tile.w)
                 : "memory");
    barrier_arrive(shared + 32 + 8 * (n & 1));
  }

  __device__ __forceinline__ int4 receive() {
    barrier_wait(shared + 32 + 8 * (n & 1), n >> 1 & 1);
    const uint4 v = load_shared_16(shared + 16 * (n & 1));
    barrier_arrive(shared + 48 + 8 * (n & 1));
    ++n;
    return make_int4(v.x, v.y, v.z, v.w);
  }
};
