// Which instruction sets the tiles were built for, and which of them this processor runs.
#pragma once

#include <vector>

#include "tiles.h"

namespace dimkern {

struct Candidate {
  const char* name;
  const Isa* isa;       // null where the compiler does not know it
  const char* why_not;  // null where it runs, else the reason
};

// The fastest first; the last, "generic", always runs.
const std::vector<Candidate>& candidates();

}  // namespace dimkern
