// Flags between the ranks of a host, which map each other's memory: words that one rank posts and another waits for.
//
// Exchanges are numbered from 1, on the device, alike on all ranks. A word holds the number of the last exchange of which
// it tells: that a source's rows have arrived, that an owner's sums have returned, or that an owner has read all that it
// was sent. ARRIVED counts in parts of an exchange, as rows may come in waves. Words only grow (in the sense of wrapping
// integers), so that nobody need ever reset one.
//
// Every wait has a deadline. Past it the missing rank is written into the record that the host reads, `healthy` becomes 0,
// and no later wait waits: the device comes to its end, and the host learns why.
#pragma once
#include "bf16.cuh"

typedef unsigned long long u64;

constexpr int MOST_RANKS = 8;
enum Word { ARRIVED, RETURNED, CONSUMED };
constexpr int WAVES = 2;
enum Part { CHOICES, /* c: the waves before c, */ ALL = 7, PARTS };
enum Phase { DISPATCH, RETURN, GRADIENT_DISPATCH, GRADIENT_RETURN, CONSUMPTION };

struct Link {
  int* words[MOST_RANKS];  // of each rank: (Word, W), by the rank that posts
  int* sequence;           // exchanges that have ended
  int* record;             // of faults, in host memory: code, rank, phase, and what was needed and what was there
  int* healthy;
  int* gave_up;  // 1 after a wait that passed its deadline
  long long timeout_ns;
  int rank, world;
};

__device__ __forceinline__ u64 nanoseconds() {
  u64 now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

__device__ __forceinline__ int load_acquire(const int* from) {
  int x;
  asm volatile("ld.acquire.sys.global.s32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
  return x;
}

__device__ __forceinline__ void store_release(int* to, int x) {
  asm volatile("st.release.sys.global.s32 [%0], %1;" ::"l"(to), "r"(x) : "memory");
}

__device__ __forceinline__ void fence_system() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

// What ARRIVED holds once part `part` of exchange `number` is there.
__device__ __forceinline__ int arrival(int number, int part) {
  return static_cast<int>(static_cast<unsigned>(number) * PARTS + part);
}

// Whether a word has not come to `number` yet. Unsigned: where a signed difference would wrap, compilers compare the two.
__device__ __forceinline__ bool is_before(int word, int number) {
  return static_cast<int>(static_cast<unsigned>(word) - static_cast<unsigned>(number)) < 0;
}

__device__ __forceinline__ void report_fault(const Link& link, int code, int a, int b, int c, int d) {
  *link.healthy = 0;
  volatile int* const record = link.record;
  if (record[0] != 0) return;  // the first fault is the one to tell
  record[1] = a, record[2] = b, record[3] = c, record[4] = d;
  fence_system();
  record[0] = code;
}

// One thread waits until `from` has posted `number` or a later one.
__device__ __forceinline__ void wait_for(const Link& link, Word word, int from, int number, Phase phase) {
  const int* const place = link.words[link.rank] + word * link.world + from;
  int seen = load_acquire(place);
  if (!is_before(seen, number)) return;
  const u64 start = nanoseconds();
  while (is_before(seen = load_acquire(place), number)) {
    if (*static_cast<volatile int*>(link.gave_up)) return;
    // Signed, as the timer is known to be read in two halves: it may seem to go back.
    if (static_cast<long long>(nanoseconds() - start) > link.timeout_ns) {
      if (atomicExch(link.gave_up, 1) == 0) report_fault(link, 1, from, phase, number, seen);
      return;
    }
    __nanosleep(32);
  }
}

__device__ __forceinline__ void post(const Link& link, Word word, int to, int number) {
  store_release(link.words[to] + word * link.world + link.rank, number);
}

// What a kernel that was launched early does first, before it touches memory: waits until the kernels ahead of it in its
// stream have ended. What follows may then be set up, as long as it waits likewise.
__device__ __forceinline__ void wait_for_stream() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Called by all threads of all blocks once each has written what it has to write, bulk copies waited for. True, in all
// threads of one block, for the block that is the last to come: what it posts then tells of what all have written, as
// causality order is transitive (PTX ISA, "Memory Consistency Model"): the release in `post` needs the system's scope alone.
__device__ __forceinline__ bool last_block(unsigned* done) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    const unsigned blocks = gridDim.x;
    unsigned before;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(done), "r"(blocks - 1) : "memory");
    last = before == blocks - 1;
  }
  __syncthreads();
  return last;
}
