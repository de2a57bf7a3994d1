// bf16 as bit patterns, two in a word: what every kernel here reads and writes.
#pragma once

typedef unsigned int u32;
typedef unsigned short bf16;

__device__ __forceinline__ bf16 round_bf16(float x) {
  bf16 rounded;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded) : "f"(x));
  return rounded;
}

// Round to nearest even, as above; `low` at the lower address.
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
  u32 packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ __forceinline__ float bf16_low(u32 packed) { return __uint_as_float(packed << 16); }
__device__ __forceinline__ float bf16_high(u32 packed) { return __uint_as_float(packed & 0xffff0000u); }
