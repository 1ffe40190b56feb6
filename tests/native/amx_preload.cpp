// Preloaded into a process, this makes the CPU library take AMX for usable, and emulates it: the library's own answer
// (kernels/cpu/amx.cpp) is looked up by name, and is found here first.
#include <cstdio>

#include "amx.h"
#include "amx_emulator.h"

const char* dimkern::why_not_amx() { return nullptr; }

namespace {

struct Emulation {
  Emulation() { emulate_amx(); }
  ~Emulation() { std::fprintf(stderr, "%lld products emulated\n", static_cast<long long>(emulated_products())); }
} emulation;

}  // namespace
