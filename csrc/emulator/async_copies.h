// cp.async of one thread: copies that have not arrived until the thread waits for their group. Private to the emulator.
#pragma once

#include <cstring>
#include <vector>

#include "emulator/device_runtime.h"

namespace neuromod::emulator {

/// A copy reads its source when it is started, and its destination reads as NaN until it arrives, so that whoever looks
/// too early (no wait, no commit, no barrier after the wait) or still uses the old contents sees it.
class AsyncCopies {
 public:
  static constexpr unsigned kMostBytes = 16;

  void start(void* to, const void* from, unsigned bytes, unsigned valid, CallSite site) {
    Copy copy{static_cast<unsigned char*>(to), {}, bytes, groups_, site};
    if (valid > 0) std::memcpy(copy.data, from, valid);
    std::memset(to, 0xFF, bytes);
    copies_.push_back(copy);
  }

  void commit() { ++groups_; }

  /// The copies of all committed groups but the `newest` arrive; those of the open group never do.
  void wait(unsigned newest) {
    size_t arrived = 0;
    while (arrived < copies_.size() && copies_[arrived].group + newest < groups_) {
      const Copy& copy = copies_[arrived++];
      std::memcpy(copy.to, copy.data, copy.bytes);
    }
    copies_.erase(copies_.begin(), copies_.begin() + static_cast<std::ptrdiff_t>(arrived));
  }

  /// Where a copy was started that no wait completed, or null.
  const CallSite* pending() const { return copies_.empty() ? nullptr : &copies_.front().site; }

  void forget() {
    copies_.clear();
    groups_ = 0;
  }

 private:
  struct Copy {
    unsigned char* to;
    unsigned char data[kMostBytes];
    unsigned bytes;
    unsigned group;
    CallSite site;
  };

  std::vector<Copy> copies_;  // oldest first
  unsigned groups_ = 0;       // committed; the open one's number
};

}  // namespace neuromod::emulator
