// score + map (MATHS.md §3) on mma.sync: a block of four warps scores 64 rows against 64 columns (a panel), turns the
// scores into weights while they are in registers, and leaves the panel's row statistics. Small tiles, because at the
// classic Deep InfoMax sizes (N <= 512) large ones leave most of a chip idle.
//
// The row reference needs neither a guess nor a second look: each panel's weights are relative to the panel's own
// maximum, rounded down to a multiple of 8 so that panels of a row mostly agree; `finish` brings the others in line.
#pragma once

#include <cstdint>

#include "dimkern/estimators.h"
#include "port.h"
#include "reduce.cuh"

namespace dimkern::gpu {

inline constexpr int kRows = 64, kCols = 64;  // pairs of a block
inline constexpr int kLine = 128;             // bytes of K in a stage, for each row and column
inline constexpr int kStages = 3;             // of the cp.async pipeline
inline constexpr int kSide = kRows * kLine;   // bytes of one operand's stage (kRows == kCols)
inline constexpr int kShared = kStages * 2 * kSide;
inline constexpr int kBlocksPerSM = 3;        // 48 KB each: what an A100 holds, an H100 four
inline constexpr int kMine = 4, kAcross = 8;  // rows of a thread, and its columns

// Batches are R = N * P rows (summaries) against M = N * L columns (locations), or a part of them.
struct Weigh {
  const void* g;       // (R, K)
  const void* c;       // (M, K)
  const float* scale;  // 0-d
  void* keep;          // (R, keep_row) weights relative to e^ref, or null: statistics only
  float* ref;          // (S, panels)
  float* sum;          // (S, panels) of psi over negatives; S is R, or the row tiles for the global family
  float* positives;    // (R, L)
  std::int64_t g_row, c_row, keep_row;  // elements from row to row
  std::int64_t R, M, P, L;
  std::int64_t row0, col0;  // where this part begins in the batch
  int line;                 // bytes of K, a multiple of 16
  float clip;               // of the soft clip; 0 for none
  float own;                // what -df of an own-image pair weighs besides a negative's phi: N - 1
};

// float16 runs out of range where float32 and bfloat16 do not.
template <class T>
inline constexpr bool narrow = false;
template <>
inline constexpr bool narrow<F16> = true;

// For weights whose largest is e^highest, a reference that leaves it within [e^2, e^10): float16 holds it and what is
// 19 nats smaller. A row without pairs is below every reference; an overflown one takes any.
DK_DEVICE float coarse(float highest) {
  const float ref = floorf((highest - 2.0f) * 0.125f) * 8.0f;
  return ref == __builtin_huge_valf() ? 0.0f : ref;
}

DK_DEVICE float soft_clip(float s, float clip) { return clip > 0.0f ? clip * tanhf(s / clip) : s; }

// The derivative of the soft clip at a score that is clipped already.
DK_DEVICE float slope(float s, float clip) { return clip > 0.0f ? 1.0f - (s / clip) * (s / clip) : 1.0f; }

// Where a 16-byte chunk of a row lies in a stage: eight rows of one chunk touch all banks once.
DK_DEVICE int chunk_at(int row, int chunk) { return row * kLine + ((chunk ^ (row & 7)) << 4); }

// The warps are 2 x 2, each with 32 x 32 pairs; a thread's share is the accumulator layout of mma.
struct Place {
  int lane = thread() & 31, warp_row = thread() >> 6, warp_col = (thread() >> 5) & 1;
  DK_DEVICE int row(int i) const { return warp_row * 32 + i * 8 + (lane >> 2); }
  DK_DEVICE int col(int j) const { return warp_col * 32 + (j >> 1) * 8 + (lane & 3) * 2 + (j & 1); }
};
using Accumulator = float[2][4][4];
template <class A>
DK_DEVICE auto& at(A& acc, int i, int j) {
  return acc[i >> 1][j >> 1][(i & 1) * 2 + (j & 1)];
}

// One line of K of the tile's rows and columns on its way to shared memory; beyond the edges there are zeros.
template <class T>
DK_DEVICE void fetch(const Weigh& w, unsigned char* stage, std::int64_t row0, std::int64_t col0, int line) {
  const int chunk = thread() & 7, byte = line * kLine + chunk * 16;
  const auto side = [&](unsigned char* to, const void* from, std::int64_t first, std::int64_t count,
                        std::int64_t stride) {
#pragma unroll
    for (int step = 0; step < kRows * 8 / kThreads; ++step) {
      const int row = (thread() >> 3) + step * (kThreads / 8);
      const bool present = first + row < count && byte < w.line;
      const std::int64_t offset = present ? (first + row) * stride * std::int64_t(sizeof(T)) + byte : 0;
      copy_async(to + chunk_at(row, chunk), static_cast<const unsigned char*>(from) + offset, present);
    }
  };
  side(stage, w.g, row0, w.R, w.g_row);
  side(stage + kSide, w.c, col0, w.M, w.c_row);
}

// score: acc += the products of the tile's summaries and locations.
template <class T>
DK_DEVICE void score(const Weigh& w, unsigned char* shared, std::int64_t row0, std::int64_t col0, Accumulator& acc) {
  const Place place;
  const int lane = place.lane, lines = (w.line + kLine - 1) / kLine;
  const int row = place.warp_row * 32 + (lane & 15), row_half = lane >> 4;
  const int col = place.warp_col * 32 + (lane & 7) + ((lane >> 4) << 3), col_half = (lane >> 3) & 1;
#pragma unroll
  for (int line = 0; line < kStages - 1; ++line) {
    if (line < lines) fetch<T>(w, shared + line * 2 * kSide, row0, col0, line);
    commit_async();
  }
  for (int line = 0; line < lines; ++line) {
    wait_async<kStages - 2>();
    sync_block();  // the line is there for all, and the stage that is fetched next has been read by all
    const int next = line + kStages - 1;
    if (next < lines) fetch<T>(w, shared + next % kStages * 2 * kSide, row0, col0, next);
    commit_async();
    const unsigned char* g = shared + line % kStages * 2 * kSide;
    const unsigned char* c = g + kSide;
#pragma unroll
    for (int step = 0; step < kLine / 32; ++step) {
      std::uint32_t a[2][4], b[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        load_matrices(a[i], g + chunk_at(row + i * 16, step * 2 + row_half));
        load_matrices(b[i], c + chunk_at(col + i * 16, step * 2 + col_half));
#pragma unroll
        for (int x = 0; x < 4; ++x) a[i][x] = operand(T{}, a[i][x]), b[i][x] = operand(T{}, b[i][x]);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) mma(T{}, acc[i][j], a[i], b[j >> 1] + (j & 1) * 2);
    }
  }
  wait_async<0>();
  sync_block();  // the statistics reuse the stages
}

// Each thread's rows reduced over the tile's columns, across the two warps that share them; all threads get theirs.
template <class Op>
DK_DEVICE void reduce_rows(float (&x)[kMine], Op op, float* shared) {
  const Place place;
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    x[i] = reduce_lanes<4>(x[i], op);
    if (place.lane % 4 == 0) shared[place.warp_col * kRows + place.row(i)] = x[i];
  }
  sync_block();
#pragma unroll
  for (int i = 0; i < kMine; ++i) x[i] = op(shared[place.row(i)], shared[kRows + place.row(i)]);
  sync_block();
}

template <class T, class E>
DK_KERNEL(kThreads, kBlocksPerSM)
weigh(const Weigh w) {
  DK_SHARED(shared);
  float* scratch = reinterpret_cast<float*>(shared);
  const std::int64_t row_tiles = (w.R + kRows - 1) / kRows, panels = (w.M + kCols - 1) / kCols;
  const std::int64_t panel = block() / row_tiles, row_tile = block() % row_tiles;  // neighbours share locations
  const std::int64_t row0 = row_tile * kRows, col0 = panel * kCols;
  const Place place;
  Accumulator acc = {};
  score<T>(w, shared, row0, col0, acc);

  // own-image pairs by division: of row r, the L columns from image(r) * L on
  const int cols = static_cast<int>(w.M - col0 < kCols ? w.M - col0 : kCols), L = static_cast<int>(w.L);
  int first[kMine], rows[kMine];  // the first own column in this panel's terms; whether the row exists
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const std::int64_t row = row0 + place.row(i);
    const std::int64_t own = (w.row0 + row) / w.P * w.L - (w.col0 + col0);
    first[i] = static_cast<int>(own < -w.L ? -w.L : own > kCols ? kCols : own);
    rows[i] = row < w.R;
  }
  const auto is_own = [&](int i, int j) {
    return static_cast<unsigned>(place.col(j) - first[i]) < static_cast<unsigned>(L) && place.col(j) < cols;
  };
  const auto is_negative = [&](int i, int j) {
    return place.col(j) < cols && rows[i] &&
           !(static_cast<unsigned>(place.col(j) - first[i]) < static_cast<unsigned>(L));
  };

  const float scale = *w.scale;
#pragma unroll
  for (int i = 0; i < kMine; ++i)
#pragma unroll
    for (int j = 0; j < kAcross; ++j) {
      float& s = at(acc, i, j);
      s = soft_clip(s * scale, w.clip);
      if (rows[i] && is_own(i, j)) w.positives[(row0 + place.row(i)) * w.L + (place.col(j) - first[i])] = s;
    }

  // map: phi in place of the scores, and the rows' sums of psi
  float ref[kMine] = {}, used[kMine] = {}, sum[kMine] = {};
  if constexpr (E::family != Family::pointwise) {
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      ref[i] = -__builtin_huge_valf();
#pragma unroll
      for (int j = 0; j < kAcross; ++j)
        if (is_negative(i, j)) ref[i] = Max{}(at(acc, i, j), ref[i]);
    }
    if constexpr (E::family == Family::row_lse) {
      reduce_rows(ref, Max{}, scratch);
    } else {  // the family's one sum wants one reference
      ref[0] = reduce_block(Max{}(Max{}(ref[0], ref[1]), Max{}(ref[2], ref[3])), Max{}, scratch);
      ref[1] = ref[2] = ref[3] = ref[0];
    }
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      ref[i] = coarse(ref[i]);
      used[i] = ref[i] == -__builtin_huge_valf() ? 0.0f : ref[i];
    }
  }
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < kMine; ++i)
#pragma unroll
    for (int j = 0; j < kAcross; ++j) {
      float& x = at(acc, i, j);
      const float s = x, steep = slope(s, w.clip);
      x = E::phi(s, used[i]);
      const float psi = E::shares_map ? x : E::psi(s, used[i]);
      sum[i] += is_negative(i, j) ? psi : 0.0f;
      x = is_negative(i, j) ? x * steep : 0.0f;
      if constexpr (E::family == Family::pointwise) {
        if (is_own(i, j)) x = -w.own * E::df(s) * steep;
        if constexpr (narrow<T>) largest = Max{}(x < 0.0f ? -x : x, largest);
      }
    }
  if constexpr (E::family == Family::pointwise && narrow<T>) {
    largest = reduce_block(largest, Max{}, scratch);
    const float tile_ref = coarse(logf(largest));
    const float factor = tile_ref == -__builtin_huge_valf() ? 1.0f : exp(-tile_ref);
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      ref[i] = tile_ref;
#pragma unroll
      for (int j = 0; j < kAcross; ++j) at(acc, i, j) *= factor;
    }
  }

  reduce_rows(sum, Sum{}, scratch);
  if constexpr (E::family == Family::global_lse) {
    const bool mine = place.lane % 4 == 0 && place.warp_col == 0;  // each row once
    const float all = reduce_block(mine ? (sum[0] + sum[1]) + (sum[2] + sum[3]) : 0.0f, Sum{}, scratch);
    if (thread() == 0) {
      w.ref[row_tile * panels + panel] = ref[0];
      w.sum[row_tile * panels + panel] = all;
    }
  } else if (place.lane % 4 == 0 && place.warp_col == 0) {
#pragma unroll
    for (int i = 0; i < kMine; ++i)
      if (rows[i]) {
        const std::int64_t statistic = (row0 + place.row(i)) * panels + panel;
        w.ref[statistic] = ref[i];
        w.sum[statistic] = sum[i];
      }
  }
  if (!w.keep) return;
#pragma unroll
  for (int i = 0; i < kMine; ++i)
#pragma unroll
    for (int j = 0; j < kAcross; j += 2) {
      const std::int64_t row = row0 + place.row(i), col = col0 + place.col(j);
      if (rows[i] && col < w.keep_row)
        store_pair(static_cast<T*>(w.keep) + row * w.keep_row + col, at(acc, i, j), at(acc, i, j + 1));
    }
}

}  // namespace dimkern::gpu
