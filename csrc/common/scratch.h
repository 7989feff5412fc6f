// Scratch memory of the CPU kernels: each thread keeps one block and hands out its parts in the order of a stack, so a
// training loop neither allocates nor faults pages. A thread keeps at most kKeptBytes; more comes from the heap and
// goes back to it at once.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>

#include "common/huge_pages.h"

namespace neuromod {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kKeptBytes = 0;  // every piece gets borders that the sanitizer watches
#else
constexpr size_t kKeptBytes = size_t(16) << 20;
#endif

class ScratchStack {
 public:
  static ScratchStack& mine() {
    thread_local ScratchStack stack;
    return stack;
  }
  ~ScratchStack() { release(block_); }

  /// `bytes` is a multiple of kAlignment.
  void* take(size_t bytes) {
    if (used_ + bytes > kKeptBytes) return fresh(bytes);
    wanted_ = std::max(wanted_, used_ + bytes);
    if (used_ == 0 && size_ < wanted_) {
      release(block_);
      block_ = nullptr, size_ = 0;
      block_ = static_cast<char*>(fresh(wanted_));
      size_ = wanted_;
    }
    if (used_ + bytes > size_) return fresh(bytes);
    used_ += bytes;
    return block_ + used_ - bytes;
  }
  void give_back(void* data, size_t bytes) {
    if (data >= block_ && data < block_ + size_) {
      used_ -= bytes;
    } else {
      release(data);
    }
  }

  static constexpr size_t kAlignment = 64;

 private:
  ScratchStack() = default;
  static void* fresh(size_t bytes) {
    void* const data = ::operator new(bytes, std::align_val_t{kAlignment});
    advise_huge_pages(data, bytes);
    return data;
  }
  static void release(void* data) { ::operator delete(data, std::align_val_t{kAlignment}); }

  char* block_ = nullptr;
  size_t size_ = 0, used_ = 0, wanted_ = 0;
};

/// Uninitialised scratch memory, aligned to a cache line; lives and dies on one thread, as a local variable.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : bytes_((sizeof(T) * static_cast<size_t>(count) + ScratchStack::kAlignment - 1) / ScratchStack::kAlignment *
               ScratchStack::kAlignment),
        data_(bytes_ > 0 ? static_cast<T*>(ScratchStack::mine().take(bytes_)) : nullptr) {}
  ~Scratch() {
    if (data_) ScratchStack::mine().give_back(data_, bytes_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* data() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  size_t bytes_;
  T* data_;
};

}  // namespace neuromod
