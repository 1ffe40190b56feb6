// What row_sums of reference_kernels.py does, in CUDA C++: cp.async, ldmatrix, mma.sync, one 64×64 tile a block.
#include <cuda_bf16.h>
#include <stdint.h>

constexpr int TILE = 64, DEPTH = 32, STAGES = 3, WARPS = 4;
constexpr int ROW = DEPTH * 2;  // bytes of a row of a staged panel

// a row's four 16-byte pieces are permuted, so that ldmatrix meets every bank once
__device__ int place(int row, int piece) { return row * ROW + ((piece ^ (row >> 1 & 3)) << 4); }

__device__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ void load_matrices(uint32_t (&r)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}

// stage `step` of the panel's rows [first, first + TILE); rows and channels beyond the end are zeros
__device__ void stage(unsigned char* panel, const __nv_bfloat16* x, int first, int rows, int K, int step) {
  for (int n = threadIdx.x; n < TILE * 4; n += WARPS * 32) {
    const int row = n / 4, piece = n % 4, k = step * DEPTH + piece * 8;
    const bool inside = first + row < rows && k < K;
    const __nv_bfloat16* from = x + (inside ? static_cast<int64_t>(first + row) * K + k : 0);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(panel + place(row, piece))),
                 "l"(from), "r"(inside ? 16 : 0)
                 : "memory");
  }
}

// sums: (column tiles, R), each row's sum of exp(score) over the columns of other images. K is a multiple of 8.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
    row_sums(const __nv_bfloat16* g, const __nv_bfloat16* c, float* sums, int R, int C, int K, int L) {
  extern __shared__ __align__(128) unsigned char panels[];
  unsigned char* const g_panel = panels;
  unsigned char* const c_panel = panels + STAGES * TILE * ROW;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row0 = blockIdx.x * TILE, col0 = blockIdx.y * TILE, steps = (K + DEPTH - 1) / DEPTH;
  float s[8][4] = {};  // this warp's 16 rows, eight columns at a time

  for (int step = 0; step < STAGES - 1; ++step) {
    if (step < steps) {
      stage(g_panel + step * TILE * ROW, g, row0, R, K, step);
      stage(c_panel + step * TILE * ROW, c, col0, C, K, step);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
  for (int step = 0; step < steps; ++step) {
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
    __syncthreads();  // everyone's copies are there, and everyone is done with the stage that is filled next
    const int next = step + STAGES - 1;
    if (next < steps) {
      stage(g_panel + next % STAGES * TILE * ROW, g, row0, R, K, next);
      stage(c_panel + next % STAGES * TILE * ROW, c, col0, C, K, next);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
    const uint32_t g_at = shared_address(g_panel + step % STAGES * TILE * ROW);
    const uint32_t c_at = shared_address(c_panel + step % STAGES * TILE * ROW);
#pragma unroll
    for (int k = 0; k < DEPTH / 16; ++k) {
      uint32_t a[4], b[4];
      load_matrices(a, g_at + place(warp * 16 + lane % 16, 2 * k + lane / 16));
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        load_matrices(b, c_at + place(n * 16 + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float (&d)[4] = s[2 * n + half];
          asm volatile(
              "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
              "{%0, %1, %2, %3};"
              : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
              : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[2 * half]), "r"(b[2 * half + 1]));
        }
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = row0 + warp * 16 + lane / 4 + 8 * half;
    float sum = 0;
#pragma unroll
    for (int n = 0; n < 8; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int col = col0 + n * 8 + lane % 4 * 2 + e;
        if (col < C && col / L != row) sum += __expf(s[n][2 * half + e]);
      }
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (lane % 4 == 0 && row < R) sums[static_cast<int64_t>(blockIdx.y) * R + row] = sum;
  }
}
