// Memory that is fetched while something else is computed, where the processor does not foresee what is read next.
#pragma once

#include <cstdint>
#include <type_traits>

namespace neuromod {

/// Fetches elements in a row, to be written if T is not const. GCC takes a function that does nothing else for one
/// without effect, and leaves out its calls: hence the empty asm. Unrolled, the fetches come so fast that a processor
/// drops some: hence a loop of its own.
template <class T>
[[gnu::noinline]] void prefetch(T* row, int64_t length) {
  constexpr int64_t line = 64 / sizeof(T);
  asm volatile("");
  for (int64_t i = 0; i < length; i += line) __builtin_prefetch(row + i, !std::is_const_v<T>);
}

}  // namespace neuromod
