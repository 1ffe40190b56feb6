#include "isas.h"

#include "amx.h"

namespace dimkern {

const std::vector<Candidate>& candidates() {
  static const std::vector<Candidate> all = [] {
    bool avx2 = false, avx512 = false, bf16 = false;
#if defined(__x86_64__)
    __builtin_cpu_init();
    avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#if defined(DIMKERN_HAS_AVX512_BF16)  // a compiler without it does not know the name either
    bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#endif
#endif
    const char* lacks = "this processor lacks it";
    return std::vector<Candidate>{{"amx_bf16", isa_amx_bf16(), bf16 ? why_not_amx() : lacks},
                                  {"avx512_bf16", isa_avx512_bf16(), bf16 ? nullptr : lacks},
                                  {"avx512", isa_avx512(), avx512 ? nullptr : lacks},
                                  {"avx2", isa_avx2(), avx2 ? nullptr : lacks},
                                  {"generic", isa_generic(), nullptr}};
  }();
  return all;
}

}  // namespace dimkern
