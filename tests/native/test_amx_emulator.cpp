// The emulator against what the manual says of AMX: values by hand, and what has to be refused. Where the processor
// has AMX it is the processor that this tests.
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstring>

#include "amx.h"
#include "amx_emulator.h"

namespace {

int failures = 0;

void expect(bool holds, const char* what) {
  if (!holds) std::printf("%s: not so\n", what), ++failures;
}

struct Configuration {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t bytes[16] = {};
  std::uint8_t rows[16] = {};
  Configuration& with(int tile, int tile_rows, int tile_bytes) {
    rows[tile] = static_cast<std::uint8_t>(tile_rows), bytes[tile] = static_cast<std::uint16_t>(tile_bytes);
    return *this;
  }
  void load() const { asm volatile("ldtilecfg %0" ::"m"(*this)); }
};

// Sums of 3 rows and 2 columns over 4 inner indices: tiles 0 (sums), 1 (left), 2 (right: 2 rows of 2 pairs).
Configuration small() { return Configuration().with(0, 3, 8).with(1, 3, 8).with(2, 2, 8); }

std::uint16_t bf16(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<std::uint16_t>(bits >> 16);
}

float sums[4][3];  // a row and a column more than are multiplied

void multiply(const float (&left)[3][4], const float (&right)[4][2]) {
  std::uint16_t a[3][4], b[2][2][2];
  for (int i = 0; i < 3; ++i) {
    for (int k = 0; k < 4; ++k) a[i][k] = bf16(left[i][k]);
  }
  for (int k = 0; k < 4; ++k) {
    for (int j = 0; j < 2; ++j) b[k / 2][j][k % 2] = bf16(right[k][j]);
  }
  small().load();
  asm volatile(
      "tileloadd (%0,%3,1), %%tmm0\n\t tileloadd (%1,%4,1), %%tmm1\n\t tileloadd -8(%2,%4,1), %%tmm2\n\t"
      "tdpbf16ps %%tmm2, %%tmm1, %%tmm0\n\t tilestored %%tmm0, (%0,%3,1)\n\t tilerelease" ::"r"(sums),
      "r"(a), "r"(&b[0][0][0] + 4), "r"(sizeof sums[0]), "r"(sizeof a[0])
      : "memory");
}

void test_values() {
  for (auto& row : sums) {
    for (float& x : row) x = 0.5f;
  }
  const float left[3][4] = {{1, 2, 3, 4}, {0, -1, 0, 2}, {8, 0.25f, 0, 1}};
  const float right[4][2] = {{1, 10}, {100, -1}, {-2, 4}, {0.5f, 3}};
  multiply(left, right);
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 2; ++j) {
      float want = 0.5f;
      for (int k = 0; k < 4; ++k) want += left[i][k] * right[k][j];
      expect(sums[i][j] == want, "a sum of products");
    }
    expect(sums[i][2] == 0.5f, "a column beside the sums is left alone");
  }
  for (float x : sums[3]) expect(x == 0.5f, "a row below the sums is left alone");
}

void test_rounding() {
  const float big = 16777216;  // 2^24, beside which 1 is half a unit of the last place
  for (auto& row : sums) {
    for (float& x : row) x = 0;
  }
  sums[1][0] = 0x1p-130f, sums[2][0] = big + 2;
  const float left[3][4] = {{big, 1, 1, 1}, {0, 0, 0x1p-70f, 0}, {1, 0, 0, 0}};
  const float right[4][2] = {{1, 0x1p-130f}, {1, 0}, {1, 0}, {1, 0}};
  multiply(left, right);
  expect(sums[0][0] == big + 2, "first and second numbers of pairs are summed apart, ties go to the even");
  expect(sums[0][1] == 0, "a denormal operand is 0");
  expect(sums[1][0] == 0x1p-70f, "a denormal sum is 0");
  expect(sums[2][0] == big + 4, "of two nearest the even one");
  const float tiny[3][4] = {{0x1p-70f}}, also[4][2] = {{0x1p-70f}};
  sums[0][0] = 0;
  multiply(tiny, also);
  expect(sums[0][0] == 0, "a denormal product is 0");
}

template <class F>
void expect_refused(const char* what, F f) {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    const rlimit no_core{0, 0};
    setrlimit(RLIMIT_CORE, &no_core);
    f();
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  if (!WIFSIGNALED(status)) std::printf("%s: not refused\n", what), ++failures;
}

void multiply_as(const Configuration& configuration) {
  configuration.load();
  asm volatile("tdpbf16ps %tmm2, %tmm1, %tmm0");
}

void test_refusals() {
  expect_refused("no configuration", [] { asm volatile("tilezero %tmm0"); });
  expect_refused("a released configuration", [] {
    small().load();
    asm volatile("tilerelease\n\t tilezero %tmm0");
  });
  expect_refused("a tile without a size", [] {
    small().load();
    asm volatile("tilezero %tmm3");
  });
  expect_refused("rows that disagree", [] { multiply_as(small().with(0, 2, 8)); });
  expect_refused("columns that disagree", [] { multiply_as(small().with(0, 3, 4)); });
  expect_refused("inner sizes that disagree", [] { multiply_as(small().with(1, 3, 12)); });
  expect_refused("half a pair", [] { multiply_as(small().with(0, 3, 6).with(2, 2, 6)); });
  expect_refused("one tile twice", [] {
    small().with(2, 3, 8).load();
    asm volatile(".byte 0xc4, 0xe2, 0x6a, 0x5c, 0xc0");  // tdpbf16ps %tmm2, %tmm0, %tmm0: no assembler takes it
  });
  expect_refused("too many rows", [] { small().with(0, 17, 8).load(); });
  expect_refused("too many bytes", [] { small().with(0, 3, 68).load(); });
  expect_refused("rows without bytes", [] { small().with(5, 3, 0).load(); });
  expect_refused("a ninth tile", [] { small().with(8, 1, 8).load(); });
  expect_refused("a palette that does not exist", [] {
    Configuration none;
    none.palette = 9;
    none.load();
  });
  expect_refused("another illegal instruction", [] { asm volatile("ud2"); });
}

}  // namespace

int main() {
  const bool emulated = dimkern::why_not_amx() != nullptr;
  if (emulated) emulate_amx();
  test_values();
  test_rounding();
  test_refusals();
  std::printf("%s: %d failures\n", emulated ? "emulated" : "on AMX", failures);
  return failures ? 1 : 0;
}
