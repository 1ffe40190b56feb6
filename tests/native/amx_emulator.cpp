// A handler of SIGILL decodes the instruction that faulted, carries it out on registers in memory, of each thread its
// own, and goes on behind it: what is tested is the machine code that ships. Semantics: Intel 64 and IA-32
// Architectures Software Developer's Manual, volume 2, of each instruction.
#include "amx_emulator.h"

#include <atomic>

#if defined(__x86_64__) && defined(__linux__)
#include <signal.h>
#include <ucontext.h>
#include <unistd.h>
#include <xmmintrin.h>

#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace {

constexpr int kTiles = 8, kRows = 16, kBytes = 64;

struct Registers {
  bool configured;
  std::uint8_t rows[kTiles];
  std::uint16_t bytes[kTiles];  // of a row
  unsigned char data[kTiles][kRows][kBytes];
};

// initial-exec: a handler may not allocate it
thread_local Registers registers __attribute__((tls_model("initial-exec")));
std::atomic<std::int64_t> products;

void demand(bool holds, const char* what) {
  if (holds) return;
  constexpr char prefix[] = "AMX emulator: ";
  for (const char* text : {prefix, what, "\n"}) {
    if (write(STDERR_FILENO, text, std::strlen(text)) < 0) break;
  }
  std::abort();
}

void configure(const unsigned char* from) {  // 64 bytes: palette, first row, 14 reserved, bytes of 16 tiles, rows of 16
  registers = {};
  demand(from[0] <= 1, "ldtilecfg: no such palette");
  if (from[0] == 0) return;
  demand(from[1] == 0, "ldtilecfg: a load that goes on in the middle is not emulated");
  for (int i = 2; i < 16; ++i) demand(from[i] == 0, "ldtilecfg: reserved bytes are not 0");
  for (int tile = 0; tile < 16; ++tile) {
    const int bytes = from[16 + 2 * tile] | from[17 + 2 * tile] << 8, rows = from[48 + tile];
    demand(tile < kTiles || (bytes == 0 && rows == 0), "ldtilecfg: more tiles than there are");
    demand(bytes <= kBytes && rows <= kRows, "ldtilecfg: a tile is too large");
    demand((bytes == 0) == (rows == 0), "ldtilecfg: rows without bytes, or bytes without rows");
    if (tile >= kTiles) continue;
    registers.bytes[tile] = static_cast<std::uint16_t>(bytes);
    registers.rows[tile] = static_cast<std::uint8_t>(rows);
  }
  registers.configured = true;
}

void demand_size(int tile) {
  demand(registers.configured, "a tile instruction without a configuration");
  demand(registers.rows[tile] != 0, "a tile without a size");
}

void load(int tile, const unsigned char* from, std::int64_t stride) {
  demand_size(tile);
  std::memset(registers.data[tile], 0, sizeof registers.data[tile]);
  for (int i = 0; i < registers.rows[tile]; ++i) {
    std::memcpy(registers.data[tile][i], from + i * stride, registers.bytes[tile]);
  }
}

void store(int tile, unsigned char* to, std::int64_t stride) {
  demand_size(tile);
  for (int i = 0; i < registers.rows[tile]; ++i) {
    std::memcpy(to + i * stride, registers.data[tile][i], registers.bytes[tile]);
  }
}

float as_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// First and second numbers of pairs apart, then their sums together, then to the register. Every operation is fused,
// rounds to nearest and takes and gives denormals as 0: what the processor does under an MXCSR that says so.
__attribute__((noinline, target("avx2,fma"))) void sum_products(int sum, int left, int right) {
  for (int i = 0; i < registers.rows[sum]; ++i) {
    float first[kBytes / 4] = {}, second[kBytes / 4] = {}, total[kBytes / 4];
    std::uint32_t a[kBytes / 4], b[kBytes / 4];
    std::memcpy(a, registers.data[left][i], sizeof a);
    for (int p = 0; p < registers.rows[right]; ++p) {
      std::memcpy(b, registers.data[right][p], sizeof b);
      for (int j = 0; j < kBytes / 4; ++j) {
        first[j] = __builtin_fmaf(as_float(a[p] << 16), as_float(b[j] << 16), first[j]);
        second[j] = __builtin_fmaf(as_float(a[p] & 0xffff0000u), as_float(b[j] & 0xffff0000u), second[j]);
      }
    }
    std::memcpy(total, registers.data[sum][i], sizeof total);
    for (int j = 0; j < kBytes / 4; ++j) total[j] += first[j] + second[j];
    std::memcpy(registers.data[sum][i], total, registers.bytes[sum]);
  }
}

void multiply(int sum, int left, int right) {
  for (int tile : {sum, left, right}) demand_size(tile);
  demand(sum != left && sum != right && left != right, "tdpbf16ps: one tile twice");
  for (int tile : {sum, left, right}) demand(registers.bytes[tile] % 4 == 0, "tdpbf16ps: half a pair");
  demand(registers.rows[sum] == registers.rows[left], "tdpbf16ps: sums and left operand disagree on rows");
  demand(registers.bytes[sum] == registers.bytes[right], "tdpbf16ps: sums and right operand disagree on columns");
  demand(registers.bytes[left] == 4 * registers.rows[right], "tdpbf16ps: operands disagree on the inner size");
  const unsigned before = _mm_getcsr();
  constexpr unsigned masked = 0x1f80, flush = 0x8000, denormals_are_zero = 0x0040;
  _mm_setcsr(masked | flush | denormals_are_zero);
  sum_products(sum, left, right);
  _mm_setcsr(before);
  ++products;
}

// A VEX instruction of the map 0F38: its fields, and how far it reaches.
class Instruction {
 public:
  Instruction(const unsigned char* code, const greg_t* of_processor) : code_(code), general_(of_processor) {
    if (code[0] != 0xc4 || (code[1] & 0x1f) != 2) return;
    const bool wide = code[2] & 0x80, long_vector = code[2] & 4;
    known = !wide && !long_vector;
    opcode = code[3];
    prefix = code[2] & 3;  // 0: none, 1: 66, 2: F3, 3: F2
    modrm_ = code[4];
    reg = (modrm_ >> 3 & 7) | (code[1] & 0x80 ? 0 : 8);
    rm = (modrm_ & 7) | (code[1] & 0x20 ? 0 : 8);
    third = ~(code[2] >> 3) & 15;
    memory = modrm_ < 0xc0;
    has_sib = memory && (modrm_ & 7) == 4;
    length = 5;
    if (memory) decode_address();
  }

  bool known = false, memory = false, has_sib = false;
  int opcode = 0, prefix = 0, reg = 0, rm = 0, third = 0;
  std::int64_t length = 0, stride = 0;
  unsigned char* address = nullptr;  // without the stride where there is a SIB byte: an index is one

 private:
  std::int64_t general(int number) const {
    constexpr int order[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                             REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return general_[order[number]];
  }

  void decode_address() {
    const int mode = modrm_ >> 6;
    std::int64_t base = 0;
    bool far = mode == 2;
    if (has_sib) {
      const int sib = code_[length++], index = (sib >> 3 & 7) | (code_[1] & 0x40 ? 0 : 8);
      const bool no_base = mode == 0 && (sib & 7) == 5;
      if (index != 4) stride = general(index) << (sib >> 6);
      if (!no_base) base = general((sib & 7) | (code_[1] & 0x20 ? 0 : 8));
      far |= no_base;
    } else if (mode == 0 && (modrm_ & 7) == 5) {  // from the next instruction
      base = reinterpret_cast<std::int64_t>(code_) + length + 4;
      far = true;
    } else {
      base = general(rm);
    }
    if (far) {
      std::int32_t distance;
      std::memcpy(&distance, code_ + length, sizeof distance);
      base += distance, length += 4;
    } else if (mode == 1) {
      base += static_cast<signed char>(code_[length++]);
    }
    address = reinterpret_cast<unsigned char*>(base);
  }

  const unsigned char* code_;
  const greg_t* general_;
  int modrm_ = 0;
};

// Whether it is one of AMX's, which has then been carried out.
bool execute(const Instruction& x) {
  enum { none, p66, f3, f2 };
  if (!x.known) return false;
  const auto is = [&](int opcode, int prefix) { return x.opcode == opcode && x.prefix == prefix; };
  if (is(0x49, none) && x.memory && x.reg == 0) {
    configure(x.address + x.stride);
  } else if (is(0x49, none) && !x.memory && x.reg == 0 && x.rm == 0) {
    registers = {};
  } else if (is(0x49, f2) && !x.memory && x.rm == 0) {
    demand_size(x.reg);
    std::memset(registers.data[x.reg], 0, sizeof registers.data[x.reg]);
  } else if (is(0x4b, f2) && x.has_sib) {
    load(x.reg, x.address, x.stride);
  } else if (is(0x4b, f3) && x.has_sib) {
    store(x.reg, x.address, x.stride);
  } else if (is(0x5c, f3) && !x.memory) {
    multiply(x.reg, x.rm, x.third);
  } else {
    return false;
  }
  return true;
}

void on_illegal(int, siginfo_t*, void* context) {
  greg_t* general = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const Instruction x(reinterpret_cast<const unsigned char*>(general[REG_RIP]), general);
  if (execute(x)) {
    general[REG_RIP] += x.length;
  } else {
    signal(SIGILL, SIG_DFL);  // it faults again
  }
}

}  // namespace

void emulate_amx() {
  struct sigaction action{};
  action.sa_sigaction = on_illegal;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &action, nullptr);
}

bool emulated_tiles_live() { return registers.configured; }
extern "C" std::int64_t emulated_products() { return products; }
#else
void emulate_amx() {}
bool emulated_tiles_live() { return false; }
extern "C" std::int64_t emulated_products() { return 0; }
#endif
