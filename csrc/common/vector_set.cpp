#include <c10/util/Exception.h>

#include <cstdlib>
#include <cstring>
#include <vector>

#include "common/vector.h"

namespace neuromod {

extern const VectorSet vector_set_baseline;
#if defined(__x86_64__)
extern const VectorSet vector_set_avx2, vector_set_avx512;
#endif

namespace {

/// What this processor can run, best first.
std::vector<const VectorSet*> supported() {
  std::vector<const VectorSet*> sets;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    sets.push_back(&vector_set_avx512);
  if (avx2) sets.push_back(&vector_set_avx2);
#endif
  sets.push_back(&vector_set_baseline);
  return sets;
}

}  // namespace

/// The best there is, or the one the environment variable NEUROMOD_ISA names; chosen once.
const VectorSet& vector_set() {
  static const VectorSet& chosen = []() -> const VectorSet& {
    const auto sets = supported();
    const char* const named = std::getenv("NEUROMOD_ISA");
    if (!named || !*named) return *sets.front();
    std::string names;
    for (const VectorSet* set : sets) {
      if (std::strcmp(named, set->isa) == 0) return *set;
      names += (names.empty() ? "" : ", ") + std::string(set->isa);
    }
    TORCH_CHECK_VALUE(false, "neuromod_ext: expected NEUROMOD_ISA to be one that this processor has (", names,
                      "), got ", named, "; unset it");
  }();
  return chosen;
}

}  // namespace neuromod
