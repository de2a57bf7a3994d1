// Hopper's asynchronous machinery in PTX: mbarriers, TMA, cp.async, wgmma, register reallocation.
// PTX ISA 8.x, "Asynchronous Warpgroup Level Matrix Instructions" and "Data Movement and Conversion Instructions".
// No header of the CUDA toolkit is needed, so that NVRTC compiles this anywhere in a second.
#pragma once
#include "bf16.cuh"

typedef unsigned long long u64;

struct alignas(64) TensorMap {
  u64 opaque[16];
};

__device__ __forceinline__ u32 shared_address(const void* pointer) {
  return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// --- mbarriers ------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "AGAIN:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra END;\n"
      "bra AGAIN;\n"
      "END:\n}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// A place in a ring of N stages, and the parity of its barriers there. From one counter: with two, ptxas keeps neither in
// uniform registers, and each wgmma then waits for its descriptors.
template <int N>
struct Ring {
  u32 n = 0;

  __device__ __forceinline__ u32 stage() const { return n % N; }
  __device__ __forceinline__ u32 stage_before() const { return (n - 1) % N; }
  __device__ __forceinline__ u32 parity() const { return n / N & 1; }
  __device__ __forceinline__ void advance() { ++n; }
};

// --- copies into shared memory --------------------------------------------------------------------------------------

__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ __forceinline__ void tma_load(u32 to, const TensorMap* map, u32 barrier, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(x), "r"(y)
      : "memory");
}

__device__ __forceinline__ void tma_load(u32 to, const TensorMap* map, u32 barrier, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(
          to),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// A piece that is one run of memory; both places and `bytes` in multiples of 16.
__device__ __forceinline__ void bulk_load(u32 to, const void* from, u32 bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

// --- copies out of shared memory ------------------------------------------------------------------------------------

// What was written by the threads must be fenced first (fence_proxy_async), and must stay until the copy has read it.
__device__ __forceinline__ void tma_store(const TensorMap* map, u32 from, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(from), "r"(x),
               "r"(y)
               : "memory");
}

__device__ __forceinline__ void tma_store(const TensorMap* map, u32 from, int x, int y, int z) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map), "r"(from),
               "r"(x), "r"(y), "r"(z)
               : "memory");
}

// Adds fp32 to what is there, each element once; numbers below fp32's normal range count as 0.
__device__ __forceinline__ void tma_add(const TensorMap* map, u32 from, int x, int y, int z) {
  asm volatile("cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
               "r"(from), "r"(x), "r"(y), "r"(z)
               : "memory");
}

// A piece that is one run of memory, anywhere that this GPU maps; both places and `bytes` in multiples of 16.
__device__ __forceinline__ void bulk_store(void* to, u32 from, u32 bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes) : "memory");
}

// Makes a group of the thread's copies since the last one.
__device__ __forceinline__ void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until all but the thread's last PENDING groups have read their sources.
template <int PENDING>
__device__ __forceinline__ void tma_store_wait() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

// Waits until all that the thread copied is where it belongs.
__device__ __forceinline__ void bulk_store_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// --- copies by the threads themselves -------------------------------------------------------------------------------

// `base` + `offset` bytes. In assembly, so that the compiler keeps one 32-bit offset for each of a loop's copies and not a
// 64-bit address.
__device__ __forceinline__ u64 address_at(const void* base, u32 offset) {
  u64 address;
  asm volatile("mad.wide.u32 %0, %1, 1, %2;" : "=l"(address) : "r"(offset), "l"(base));
  return address;
}

// 16 bytes by the thread itself; zeros where `valid` is false, and then nothing is read.
template <bool ALWAYS>
__device__ __forceinline__ void copy_async_16(u32 to, u64 from, bool valid) {
  if (ALWAYS) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
  }
}

// Arrives at a barrier once all copies that this thread has issued so far are there; the barrier's count includes it.
__device__ __forceinline__ void copy_async_arrive(u32 barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// For a thread that is about to end.
__device__ __forceinline__ void copy_async_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Orders ordinary accesses to shared memory, and cp.async's, before wgmma's and TMA's.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Orders ordinary accesses to global memory and bulk copies' with each other.
__device__ __forceinline__ void fence_proxy_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// --- warps ----------------------------------------------------------------------------------------------------------

// threadIdx.x % 32, read anew: what follows from it is not kept in registers from one tile to the next.
__device__ __forceinline__ int lane_now() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// threadIdx.x / 32, likewise.
__device__ __forceinline__ int warp_now() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread / 32;
}

template <int REGISTERS>
__device__ __forceinline__ void registers_grow() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ __forceinline__ void registers_shrink() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// --- numbers --------------------------------------------------------------------------------------------------------

// 1 / (1 + e^-x) of two numbers, within 4 ulp of fp32; what is below -43 counts as -43, whose sigmoid is 2e-19. One
// reciprocal serves both: the special-function units, which give 16 results a clock, are what an epilogue waits for.
__device__ __forceinline__ void sigmoid(const float (&x)[2], float (&s)[2]) {
  float d[2], r;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(d[i]) : "f"(fminf(x[i] * -1.4426950408889634f, 62.0f)));
    d[i] += 1.0f;
  }
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(d[0] * d[1]));
  s[0] = r * d[1];
  s[1] = r * d[0];
}

// --- matrix fragments through shared memory -------------------------------------------------------------------------

__device__ __forceinline__ void store_matrix_x4(u32 to, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

__device__ __forceinline__ void load_matrix_x4(u32 from, u32& a, u32& b, u32& c, u32& d) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
               : "r"(from)
               : "memory");
}

__device__ __forceinline__ uint4 load_shared_16(u32 from) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(from) : "memory");
  return v;
}

__device__ __forceinline__ void store_shared_8(u32 to, float a, float b) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(a), "f"(b) : "memory");
}

// --- wgmma ----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// No use of the accumulator may move above the wait before this: the wait itself does not name it.
template <int N>
__device__ __forceinline__ void keep_after_wait(float (&acc)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(acc[i])::"memory");
}

// Descriptor of an operand tile in the 128-byte swizzle. A unit is 64 bf16 by 8: 1024 bytes.
// Reduction contiguous: units follow each other every 8 rows; the other stride is not used.
// Reduction strided: units follow each other every 8 steps of the reduction; `next_64` bytes lead to the next 64 columns.
__device__ __forceinline__ u64 wgmma_descriptor(u32 address, u32 next_64) {
  return (u64(1) << 62) | (u64(1024 >> 4) << 32) | (u64(next_64 >> 4) << 16) | ((address >> 4) & 0x3fff);
}

#define NMOE_ACC4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define NMOE_ACC16(d, i) NMOE_ACC4(d, i), NMOE_ACC4(d, i + 4), NMOE_ACC4(d, i + 8), NMOE_ACC4(d, i + 12)

#define NMOE_D32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NMOE_D64 NMOE_D32 ", " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NMOE_D96 NMOE_D64 ", " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define NMOE_D128 NMOE_D96 ", " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// D (64 x N, fp32) += A (64 x 16) B (16 x N), both in shared memory; N from the accumulator's size.
template <int TRANSPOSE_A, int TRANSPOSE_B>
__device__ __forceinline__ void wgmma(float (&d)[32], u64 a, u64 b, int accumulate) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" NMOE_D32 "}, "
               "%32, %33, p, 1, 1, %35, %36;\n}\n"
               : NMOE_ACC16(d, 0), NMOE_ACC16(d, 16)
               : "l"(a), "l"(b), "r"(accumulate), "n"(TRANSPOSE_A), "n"(TRANSPOSE_B));
}

template <int TRANSPOSE_A, int TRANSPOSE_B>
__device__ __forceinline__ void wgmma(float (&d)[64], u64 a, u64 b, int accumulate) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" NMOE_D64 "}, "
               "%64, %65, p, 1, 1, %67, %68;\n}\n"
               : NMOE_ACC16(d, 0), NMOE_ACC16(d, 16), NMOE_ACC16(d, 32), NMOE_ACC16(d, 48)
               : "l"(a), "l"(b), "r"(accumulate), "n"(TRANSPOSE_A), "n"(TRANSPOSE_B));
}

template <int TRANSPOSE_A, int TRANSPOSE_B>
__device__ __forceinline__ void wgmma(float (&d)[96], u64 a, u64 b, int accumulate) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %98, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 {" NMOE_D96 "}, "
               "%96, %97, p, 1, 1, %99, %100;\n}\n"
               : NMOE_ACC16(d, 0), NMOE_ACC16(d, 16), NMOE_ACC16(d, 32), NMOE_ACC16(d, 48), NMOE_ACC16(d, 64), NMOE_ACC16(d, 80)
               : "l"(a), "l"(b), "r"(accumulate), "n"(TRANSPOSE_A), "n"(TRANSPOSE_B));
}

template <int TRANSPOSE_A, int TRANSPOSE_B>
__device__ __forceinline__ void wgmma(float (&d)[128], u64 a, u64 b, int accumulate) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" NMOE_D128 "}, "
               "%128, %129, p, 1, 1, %131, %132;\n}\n"
               : NMOE_ACC16(d, 0), NMOE_ACC16(d, 16), NMOE_ACC16(d, 32), NMOE_ACC16(d, 48), NMOE_ACC16(d, 64), NMOE_ACC16(d, 80), NMOE_ACC16(d, 96), NMOE_ACC16(d, 112)
               : "l"(a), "l"(b), "r"(accumulate), "n"(TRANSPOSE_A), "n"(TRANSPOSE_B));
}
