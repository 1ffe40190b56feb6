// What kernels/cuda/port.h needs of CUDA, for any C++20 compiler: a CUDA thread is a fiber, or with DK_THREADS a
// std::thread, so that the sanitizers see what it shares with others.
//
// Shared memory begins as NaN; cp.async poisons its target and delivers at the wait for its group; what a warp does
// together (shuffles, ldmatrix, mma) is exchanged through slots and a barrier. Blocks run one after another.
#pragma once

#include <dlfcn.h>
#include <stdlib.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

#if defined(DK_THREADS)
#include <condition_variable>
#include <mutex>
#include <thread>
#else
#include <ucontext.h>
#endif

#define DK_DEVICE inline
#define DK_KERNEL(threads, blocks) void
#define DK_SHARED(name) unsigned char* name = emulation::self->block->shared

namespace emulation {

struct Thread;
inline thread_local Thread* self = nullptr;

#if defined(DK_THREADS)
class Barrier {
 public:
  int count = 0;
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const unsigned mine = generation_;
    if (++arrived_ == count) {
      arrived_ = 0, ++generation_;
      all_.notify_all();
    } else {
      all_.wait(lock, [&] { return generation_ != mine; });
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable all_;
  int arrived_ = 0;
  unsigned generation_ = 0;
};
#else
void suspend();

class Barrier {
 public:
  int count = 0;
  void wait() {
    const unsigned mine = generation_;
    if (++arrived_ == count)
      arrived_ = 0, ++generation_;
    else
      while (generation_ == mine) suspend();
  }

 private:
  int arrived_ = 0;
  unsigned generation_ = 0;
};
#endif

struct Warp {
  Barrier barrier;
  // two sets by turns: a lane may be one exchange ahead of another, never two
  unsigned char slots[2][32][32];
};

struct Block {
  std::int64_t index, count;
  unsigned char* shared;
  Barrier barrier;
  std::vector<Warp> warps;
  explicit Block(int n) : warps(n) {}
};

struct Copy {
  void* to;
  const void* from;
  bool present;
};

struct Thread {
  int index;
  Block* block;
  unsigned exchanges = 0;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
#if !defined(DK_THREADS)
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
#endif
  int lane() const { return index % 32; }
  Warp& warp() const { return block->warps[index / 32]; }
};

// What every lane of the warp put in: 32 bytes each.
using Slots = unsigned char (*)[32];
template <class T>
Slots exchange(const T& mine) {
  static_assert(sizeof(T) <= 32);
  Slots slots = self->warp().slots[self->exchanges++ % 2];
  std::memcpy(slots[self->lane()], &mine, sizeof(T));
  self->warp().barrier.wait();
  return slots;
}
template <class T>
T read(const unsigned char* from) {
  T x;
  std::memcpy(&x, from, sizeof(T));
  return x;
}

// Called instead of running a kernel here where set: the kernel's mangled name, its grid and its parameters.
using Launcher = void (*)(const char* kernel, std::int64_t blocks, int threads, int shared, const void* params);
extern "C" {
inline Launcher dimkern_launcher = nullptr;
[[gnu::used]] inline void dimkern_set_launcher(Launcher launcher) { dimkern_launcher = launcher; }
}

#if !defined(DK_THREADS)
inline ucontext_t scheduler;
struct Body {
  void (*call)(const void*);
  const void* params;
};
inline Body body;
inline void suspend() { swapcontext(&self->context, &scheduler); }
inline void enter() {
  body.call(body.params);
  self->done = true;
  suspend();
}

// Rounds over the fibers that are not done, each round from another one.
inline void run_fibers(std::vector<Thread>& threads) {
  for (Thread& t : threads) {
    constexpr std::size_t size = 64 << 10;
    t.stack = std::make_unique<char[]>(size);
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack.get();
    t.context.uc_stack.ss_size = size;
    t.context.uc_link = nullptr;
    makecontext(&t.context, enter, 0);
  }
  std::size_t left = threads.size();
  for (std::uint32_t random = 1; left;) {
    random = random * 1664525u + 1013904223u;
    for (std::size_t i = 0; i < threads.size(); ++i) {
      Thread& t = threads[(i + (random >> 8)) % threads.size()];
      if (t.done) continue;
      self = &t;
      swapcontext(&scheduler, &t.context);
      left -= t.done;
    }
  }
  self = nullptr;
}
#endif

template <class Params>
void launch(void (*kernel)(Params), std::int64_t blocks, int threads, int shared, const Params& params) {
  if (dimkern_launcher) {
    Dl_info symbol{};
    dladdr(reinterpret_cast<void*>(kernel), &symbol);
    dimkern_launcher(symbol.dli_sname, blocks, threads, shared, &params);
    return;
  }
  for (std::int64_t index = 0; index < blocks; ++index) {
    Block block((threads + 31) / 32);
    block.index = index, block.count = blocks;
    block.barrier.count = threads;
    for (Warp& warp : block.warps) warp.barrier.count = 32;
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, shared)) abort();
    std::memset(memory, 0xFF, shared);
    block.shared = static_cast<unsigned char*>(memory);
    std::vector<Thread> all(threads);
    for (int t = 0; t < threads; ++t) all[t].index = t, all[t].block = &block;
#if defined(DK_THREADS)
    std::vector<std::thread> running;
    for (Thread& t : all) running.emplace_back([&t, kernel, &params] { self = &t, kernel(params); });
    for (std::thread& t : running) t.join();
#else
    static thread_local void (*called)(Params);
    called = kernel;
    body = {[](const void* p) { called(*static_cast<const Params*>(p)); }, &params};
    run_fibers(all);
#endif
    free(memory);
  }
}

}  // namespace emulation

namespace dimkern::gpu {

struct Stream {};

template <class Params>
void launch(void (*kernel)(Params), std::int64_t blocks, int threads, int shared, Stream, const Params& params) {
  emulation::launch(kernel, blocks, threads, shared, params);
}

inline int thread() { return emulation::self->index; }
inline std::int64_t block() { return emulation::self->block->index; }
inline std::int64_t blocks() { return emulation::self->block->count; }
inline void sync_block() { emulation::self->block->barrier.wait(); }
inline float shuffle_xor(float x, int mask) {
  const auto slots = emulation::exchange(x);
  return emulation::read<float>(slots[emulation::self->lane() ^ mask]);
}

inline void copy_async(void* to, const void* from, bool present) {
  std::memset(to, 0xFF, 16);
  emulation::self->open.push_back({to, from, present});
}
inline void commit_async() {
  emulation::self->groups.push_back(std::move(emulation::self->open));
  emulation::self->open.clear();
}
template <int pending>
void wait_async() {
  auto& groups = emulation::self->groups;
  for (; static_cast<int>(groups.size()) > pending; groups.pop_front())
    for (const emulation::Copy& copy : groups.front())
      copy.present ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16);
}

inline void load_matrices(std::uint32_t (&x)[4], const void* row) {
  const auto slots = emulation::exchange(row);
  const int lane = emulation::self->lane();
  for (int i = 0; i < 4; ++i) {
    const auto* from = emulation::read<const unsigned char*>(slots[i * 8 + lane / 4]);
    x[i] = emulation::read<std::uint32_t>(from + lane % 4 * 4);
  }
}

inline float float_of(std::uint32_t bits) { return emulation::read<float>(reinterpret_cast<unsigned char*>(&bits)); }
inline std::uint32_t bits_of(float x) { return emulation::read<std::uint32_t>(reinterpret_cast<unsigned char*>(&x)); }

inline float to_float(Bf16 x) { return float_of(std::uint32_t(x.bits) << 16); }
inline float to_float(F16 x) {
  return static_cast<float>(emulation::read<_Float16>(reinterpret_cast<unsigned char*>(&x)));
}
inline float to_float(Tf32 x) { return x.value; }

inline void from_float(Bf16& y, float x) {
  const std::uint32_t u = bits_of(x);
  y.bits = x != x ? 0x7FFF : static_cast<std::uint16_t>((u + 0x7FFF + ((u >> 16) & 1)) >> 16);
}
inline void from_float(F16& y, float x) {
  const auto half = static_cast<_Float16>(x);
  std::memcpy(&y, &half, 2);
}
inline void from_float(Tf32& y, float x) { y.value = x; }
template <class T>
void store_pair(T* to, float low, float high) {
  from_float(to[0], low);
  from_float(to[1], high);
}

inline std::uint32_t operand(Bf16, std::uint32_t x) { return x; }
inline std::uint32_t operand(F16, std::uint32_t x) { return x; }
inline std::uint32_t operand(Tf32, std::uint32_t x) { return (x + 0x1000) & 0xFFFFE000; }

// Element k of the 32 bytes of a row of `a`, or of a column of `b`, that the lanes of a group of four hold: words
// 0 and 1 of the lower and upper 16 bytes.
inline float element(Tf32, std::uint32_t word, int) { return float_of(word & 0xFFFFE000); }
template <class T>
float element(T, std::uint32_t word, int k) {
  return to_float(T{static_cast<std::uint16_t>(k % 2 ? word >> 16 : word)});
}

template <class T>
void mma(T, float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t* b) {
  struct Registers {
    std::uint32_t a[4], b[2];
  };
  const auto slots = emulation::exchange(Registers{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
  constexpr int half = 16 / sizeof(T), in_word = 4 / sizeof(T);  // elements of 16 bytes, of a register
  const int lane = emulation::self->lane();
  for (int e = 0; e < 4; ++e) {
    const int row = lane / 4, low = e / 2, col = lane % 4 * 2 + e % 2;
    float sum = 0;
    for (int k = 0; k < 2 * half; ++k) {
      const int holder = k % half / in_word, upper = k / half;
      const auto of_a = emulation::read<Registers>(slots[row * 4 + holder]);
      const auto of_b = emulation::read<Registers>(slots[col * 4 + holder]);
      sum += element(T{}, of_a.a[low + 2 * upper], k) * element(T{}, of_b.b[upper], k);
    }
    d[e] += sum;
  }
}

}  // namespace dimkern::gpu
