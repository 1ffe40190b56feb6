// Whether this process may use AMX's tile registers for products of bfloat16.
#pragma once

namespace dimkern {

// Null if it may, else the reason. Asks Linux for the registers where the processor has them: once is enough, for all
// threads of the process. A function of its own file, so that tests may put one in its place (tests/native).
const char* why_not_amx();

}  // namespace dimkern
