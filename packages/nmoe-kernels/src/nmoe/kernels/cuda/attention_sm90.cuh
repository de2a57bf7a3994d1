// What attention's kernels share beside sm90.cuh: tiles of one head, powers of two, and wgmma of more shapes.
#pragma once
#include "sm90.cuh"

// --- tiles of four-dimensional tensors ------------------------------------------------------------------------------

__device__ __forceinline__ void tma_load(u32 to, const TensorMap* map, u32 barrier, int x, int y, int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}

__device__ __forceinline__ void tma_store(const TensorMap* map, u32 from, int x, int y, int z, int w) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
               "r"(from), "r"(x), "r"(y), "r"(z), "r"(w)
               : "memory");
}

// --- shared memory and threads --------------------------------------------------------------------------------------

__device__ __forceinline__ float2 load_shared_8(u32 from) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(from) : "memory");
  return v;
}

__device__ __forceinline__ void store_shared_4(u32 to, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(x) : "memory");
}

// Waits for the other threads of a warpgroup; `name` 1 to 15.
__device__ __forceinline__ void warpgroup_sync(int name) { asm volatile("bar.sync %0, 128;" ::"r"(name) : "memory"); }

// A number that all threads of a warp have, as the compiler then knows: it, and descriptors made of it, can stay in the
// warp's own registers.
__device__ __forceinline__ int uniform(int x) { return int(__reduce_or_sync(0xffffffff, unsigned(x))); }

// Where a lane's 16 bytes of a swizzled chunk of 16 rows are: those of matrix fragments 8 · `j` columns in.
__device__ __forceinline__ u32 fragment_at(u32 lane, u32 j) {
  return lane % 16 * 128 + ((j + lane / 16 ^ lane % 8) << 4);
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// An accumulator as a left operand: its columns 16 k to 16 k + 15 are, rounded and in pairs, the operand's k-th fragment, rows
// h of columns 8 j and then those of columns 8 (j + 1).
template <int N>
__device__ __forceinline__ void pack(const float (&x)[N], u32 (&left)[N / 2]) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i) left[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
}

// --- wgmma ----------------------------------------------------------------------------------------------------------

#define NMOE_NEW4(d, i) "=f"(d[i]), "=f"(d[i + 1]), "=f"(d[i + 2]), "=f"(d[i + 3])
#define NMOE_NEW16(d, i) NMOE_NEW4(d, i), NMOE_NEW4(d, i + 4), NMOE_NEW4(d, i + 8), NMOE_NEW4(d, i + 12)

// D (64 x N, fp32) = A (64 x 16) B (16 x N), both in shared memory with the reduction contiguous: what D had is not read,
// so that the compiler keeps it nowhere.
__device__ __forceinline__ void wgmma_first(float (&d)[32], u64 a, u64 b) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 0, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" NMOE_D32 "}, "
               "%32, %33, p, 1, 1, 0, 0;\n}\n"
               : NMOE_NEW16(d, 0), NMOE_NEW16(d, 16)
               : "l"(a), "l"(b));
}

__device__ __forceinline__ void wgmma_first(float (&d)[64], u64 a, u64 b) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 0, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" NMOE_D64 "}, "
               "%64, %65, p, 1, 1, 0, 0;\n}\n"
               : NMOE_NEW16(d, 0), NMOE_NEW16(d, 16), NMOE_NEW16(d, 32), NMOE_NEW16(d, 48)
               : "l"(a), "l"(b));
}

// D (64 x N, fp32) (+)= A (64 x 16) B (16 x N): A in registers, B in shared memory, with the reduction strided if TRANSPOSE_B
// is 1. In A, as in an accumulator's columns 16 k to 16 k + 15, a thread has words 0 and 2 of row lane / 4, and 1 and 3 of the
// row 8 below.
template <int TRANSPOSE_B = 1>
__device__ __forceinline__ void wgmma_registers(float (&d)[32], const u32* a, u64 b, int accumulate) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" NMOE_D32 "}, "
               "{%32, %33, %34, %35}, %36, p, 1, 1, %38;\n}\n"
               : NMOE_ACC16(d, 0), NMOE_ACC16(d, 16)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(TRANSPOSE_B));
}

__device__ __forceinline__ void wgmma_registers(float (&d)[64], const u32* a, u64 b, int accumulate) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" NMOE_D64 "}, "
               "{%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}\n"
               : NMOE_ACC16(d, 0), NMOE_ACC16(d, 16), NMOE_ACC16(d, 32), NMOE_ACC16(d, 48)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}
