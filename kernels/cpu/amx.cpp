#include "amx.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, and the state it is asked for

bool processor_has_it() {
  unsigned a, b, c, d;
  constexpr unsigned tile = 1u << 24, bf16 = 1u << 22;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & tile) && (d & bf16);
}

// XCR0's bits 17 and 18: the system saves tile configuration and tile data.
bool system_saves_it() {
  unsigned a, b, c, d;
  constexpr unsigned osxsave = 1u << 27, tiles = 3u << 17;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & osxsave)) return false;
  asm volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
  return (a & tiles) == tiles;
}

}  // namespace

const char* dimkern::why_not_amx() {
  if (!processor_has_it()) return "this processor lacks it";
  if (!system_saves_it()) return "this system does not save AMX's registers";
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return "Linux does not permit AMX's registers";
  return nullptr;
}
#else
const char* dimkern::why_not_amx() { return "AMX is used on Linux on x86-64 alone"; }
#endif
