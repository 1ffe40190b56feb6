// The only place where device code touches what is CUDA's own: shared memory, warps, cp.async, ldmatrix, mma.
//
// With nvcc these are inline PTX for sm_80 and later. With DK_HOST any C++20 compiler builds the same kernels for the
// CPU, on the emulation that the tests bring (tests/simulator/cuda_host/emulation.h).
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(DK_HOST)
#include <cuda_runtime.h>
#define DK_DEVICE __device__ __forceinline__
#define DK_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define DK_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#endif

namespace dimkern::gpu {

// Elements as they lie in memory; arithmetic is in float.
struct Bf16 {
  std::uint16_t bits;
};
struct F16 {
  std::uint16_t bits;
};
struct Tf32 {  // a float whose products keep 10 bits of mantissa
  float value;
};

}  // namespace dimkern::gpu

#if defined(DK_HOST)
#include "emulation.h"
#else

namespace dimkern::gpu {

using Stream = cudaStream_t;

// Launches a kernel that takes one struct; an error is the caller's to find (cudaGetLastError).
template <class Params>
void launch(void (*kernel)(Params), std::int64_t blocks, int threads, int shared, Stream stream, const Params& params) {
  const void* argument = &params;
  cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), const_cast<void**>(&argument), shared,
                   stream);
}

DK_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
DK_DEVICE std::int64_t block() { return blockIdx.x; }
DK_DEVICE std::int64_t blocks() { return gridDim.x; }
DK_DEVICE void sync_block() { __syncthreads(); }
DK_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

DK_DEVICE std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes from global to shared memory, or zeros; they are there after the wait for their group.
DK_DEVICE void copy_async(void* to, const void* from, bool present) {
  const int bytes = present ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}
DK_DEVICE void commit_async() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending>
DK_DEVICE void wait_async() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Four 8x16-byte matrices: lane l names row l % 8 of matrix l / 8, and gets word l % 4 of row l / 4 of each.
DK_DEVICE void load_matrices(std::uint32_t (&x)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(row))
               : "memory");
}

// d (16 x 8) += a (16 x 32 bytes) * b (32 bytes x 8), by a warp.
#define DK_MMA(instruction)                                                                   \
  asm volatile(instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                               \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
DK_DEVICE void mma(Bf16, float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t* b) {
  DK_MMA("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32");
}
DK_DEVICE void mma(F16, float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t* b) {
  DK_MMA("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32");
}
DK_DEVICE void mma(Tf32, float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t* b) {
  DK_MMA("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32");
}
#undef DK_MMA

// What a register of an operand must hold: tf32 wants its float rounded, not cut.
DK_DEVICE std::uint32_t operand(Bf16, std::uint32_t x) { return x; }
DK_DEVICE std::uint32_t operand(F16, std::uint32_t x) { return x; }
DK_DEVICE std::uint32_t operand(Tf32, std::uint32_t x) {
  std::uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(__uint_as_float(x)));
  return y;
}

DK_DEVICE float to_float(Bf16 x) { return __uint_as_float(static_cast<std::uint32_t>(x.bits) << 16); }
DK_DEVICE float to_float(F16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
DK_DEVICE float to_float(Tf32 x) { return x.value; }

DK_DEVICE void from_float(Bf16& y, float x) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
DK_DEVICE void from_float(F16& y, float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
DK_DEVICE void from_float(Tf32& y, float x) { y.value = x; }

// Two neighbours in one store; `to` is aligned to both.
DK_DEVICE void store_pair(Bf16* to, float low, float high) {
  std::uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  *reinterpret_cast<std::uint32_t*>(to) = both;
}
DK_DEVICE void store_pair(F16* to, float low, float high) {
  std::uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  *reinterpret_cast<std::uint32_t*>(to) = both;
}
DK_DEVICE void store_pair(Tf32* to, float low, float high) { *reinterpret_cast<float2*>(to) = make_float2(low, high); }

}  // namespace dimkern::gpu

#endif  // !DK_HOST
