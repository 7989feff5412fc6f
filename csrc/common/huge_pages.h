#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

namespace neuromod {

/// Asks for huge pages where a large block has not been touched yet: one fault for 2 MiB instead of 512.
inline void advise_huge_pages(void* data, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr size_t page = size_t(2) << 20;
  const auto first = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const auto last = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace neuromod
