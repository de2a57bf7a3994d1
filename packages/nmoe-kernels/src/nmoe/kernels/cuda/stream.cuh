// Elementwise passes over flat tensors that are read and written once: four elements of each stream a thread, so that
// every load and store of a warp is one dense piece of memory, whatever the element's size.
#pragma once
#include "bf16.cuh"

typedef unsigned long long u64;
constexpr int WIDTH = 4;  // elements of a thread's piece

struct Float4 {
  float at[WIDTH];
};
struct Bits4 {  // of 16-bit elements
  u32 at[WIDTH];
};

// Volatile, so that loads leave where they stand and not after a later branch.
__device__ __forceinline__ Float4 load4(const float* from) {
  Float4 x;
  asm volatile("ld.global.cs.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.at[0]), "=f"(x.at[1]), "=f"(x.at[2]), "=f"(x.at[3])
               : "l"(from));
  return x;
}
__device__ __forceinline__ Bits4 load4(const unsigned short* from) {
  u32 low, high;
  asm volatile("ld.global.cs.v2.u32 {%0, %1}, [%2];" : "=r"(low), "=r"(high) : "l"(from));
  return {{low & 0xffffu, low >> 16, high & 0xffffu, high >> 16}};
}
__device__ __forceinline__ void store4(float* to, const Float4& x) {
  __stcs(reinterpret_cast<float4*>(to), make_float4(x.at[0], x.at[1], x.at[2], x.at[3]));
}
__device__ __forceinline__ void store4(unsigned short* to, const Bits4& x) {
  __stcs(reinterpret_cast<uint2*>(to), make_uint2(x.at[0] | x.at[1] << 16, x.at[2] | x.at[3] << 16));
}

// Operations that the compiler may not fuse: each rounds by itself, as one of PyTorch's does.
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float sub(float a, float b) { return __fsub_rn(a, b); }
__device__ __forceinline__ float mul(float a, float b) { return __fmul_rn(a, b); }

// A master of bf16 bits and a signed 16-bit residual: see nmoe/kernels/reference/master.py.
__device__ __forceinline__ float join_master(u32 weight, u32 residual) {
  return __uint_as_float((weight << 16) + static_cast<u32>(static_cast<int>(static_cast<short>(residual))));
}
__device__ __forceinline__ u32 master_weight(float master) { return (__float_as_uint(master) + 0x8000u) >> 16; }
__device__ __forceinline__ u32 master_residual(float master) {  // what rounding left, whose upper half is all sign
  return __float_as_uint(master) & 0xffffu;
}
