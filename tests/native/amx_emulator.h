// AMX where the processor has none: its instructions are carried out when they fault, one by one.
#pragma once

#include <cstdint>

// From now on this process executes AMX's tile instructions for bfloat16. What a processor would refuse (a register
// without a size, sizes that do not fit) ends the process and says why. Needs Linux on x86-64 with AVX2.
void emulate_amx();

// Whether this thread's registers hold a configuration.
bool emulated_tiles_live();

// Products (tdpbf16ps) that were emulated so far, by all threads.
extern "C" std::int64_t emulated_products();
