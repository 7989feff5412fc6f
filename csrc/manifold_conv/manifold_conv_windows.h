// What a correlation sees of an array, arranged so that tile products can read it.
//
// The windows of a block of pixels are a matrix with a row for each (channel, horizontal tap): the array's lines that
// the block needs, one after another, each shifted and thinned out for that tap. Any other tap then is an offset into
// the row, at which the block's pixels lie side by side; rows of pixels share the lines they have in common. Copies of
// the array are as many as horizontal taps, not as all taps. Where that leaves products too little depth, rows are
// (channel, tap), and there is one product.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <vector>

#include "common/scratch.h"
#include "common/tile_product.h"
#include "manifold_conv/manifold_conv.h"

namespace neuromod {

/// One dimension of a correlation: out[first + q stride] = sum over its taps of w[index] in[q step + offset], q <
/// count.
struct Axis {
  struct Tap {
    int64_t index, offset;
  };
  int64_t in, out;  // sizes of the arrays
  int64_t count, step, first, stride;
  std::vector<Tap> taps;
};
using Axes = std::array<Axis, 3>;

/// The convolution along one dimension.
inline Axis forward_axis(const ManifoldConvParams& p, int d) {
  Axis axis{p.in_size[d], p.out_size[d], p.out_size[d], p.stride[d], 0, 1, {}};
  for (int64_t i = 0; i < p.kernel[d]; ++i) axis.taps.push_back({i, i * p.dilation[d] - p.padding[d]});
  return axis;
}

inline Axes forward_axes(const ManifoldConvParams& p) {
  return {forward_axis(p, 0), forward_axis(p, 1), forward_axis(p, 2)};
}

/// From the gradient of y to that of every stride-th pixel of x, from `first` on: those see the same taps.
inline Axis gradient_axis(const ManifoldConvParams& p, int d, int64_t first) {
  const int64_t stride = p.stride[d];
  Axis axis{
      p.out_size[d], p.in_size[d], ceil_div(std::max<int64_t>(p.in_size[d] - first, 0), stride), 1, first, stride, {}};
  for (int64_t i = 0; i < p.kernel[d]; ++i) {
    const int64_t distance = first + p.padding[d] - i * p.dilation[d];
    if (distance % stride == 0) axis.taps.push_back({i, distance / stride});
  }
  return axis;
}

/// Pixels of one plane of a correlation's result: rows [row, row + rows), of each the columns [col, col + cols).
struct Block {
  int64_t plane, row, rows, col, cols;
};

/// The windows of blocks: their sizes and layout.
class Windows {
  static constexpr int64_t kBytes = int64_t(512) << 10;  // of a block's windows, more or less: part of a core's cache
  static constexpr int64_t kWide = 128;                  // more columns are taken in parts

 public:
  /// A line of the array, for the first pixel of the first block.
  struct Line {
    int64_t plane, row;
  };

  /// For `channels` channels of elements of `size` bytes; rows are (channel, tap) if products would lack depth
  /// otherwise.
  Windows(const Axes& axes, int64_t channels, int64_t size, int64_t least_depth)
      : axes(axes), merged_(channels * int64_t(axes[2].taps.size()) < least_depth), channels_(channels) {
    const int64_t width = axes[2].count;
    cols_ = width <= kWide ? width : ceil_div(ceil_div(width, ceil_div(width, kTile)), 16) * 16;
    const int64_t least = ceil_div(kTile, cols_);
    rows_ = axes[1].count;
    for (find_lines(); rows_ > least && depth() * length(cols_) * size > kBytes; find_lines())
      rows_ = std::max(least, ceil_div(rows_, 2));
  }

  int64_t channel_rows() const { return int64_t(axes[2].taps.size()) * (merged_ ? lead() : 1); }
  int64_t depth() const { return channels_ * channel_rows(); }
  /// Products whose sum is a pixel of the result.
  int64_t products() const { return merged_ ? 1 : lead(); }
  /// Where a product's pixels begin in a row whose lines are `pitch` apart.
  int64_t begin(int64_t product, int64_t pitch) const { return merged_ ? 0 : first_line_[product] * pitch; }
  /// The taps, one in each dimension, of a channel's row in a product.
  std::array<int64_t, 3> taps(int64_t product, int64_t row) const {
    const int64_t high = int64_t(axes[1].taps.size()), wide = int64_t(axes[2].taps.size());
    const int64_t tap = merged_ ? row / wide : product;
    return {tap / high, tap % high, row % wide};
  }

  int64_t most_cols() const { return cols_; }
  int64_t most_rows() const { return rows_; }
  /// Elements of a row.
  int64_t length(int64_t pitch) const { return (merged_ ? rows_ : int64_t(lines_.size())) * pitch; }
  /// Distance of rows: off powers of two, at which they would fall into the same lines of the cache.
  int64_t stride(int64_t pitch) const { return ceil_div(length(pitch), 32) * 32 + 16; }

  int64_t blocks() const { return axes[0].count * row_blocks() * col_blocks(); }
  Block block(int64_t i) const {
    const int64_t col = i % col_blocks() * cols_, row = i / col_blocks() % row_blocks() * rows_;
    return {i / (col_blocks() * row_blocks()), row, std::min(rows_, axes[1].count - row), col,
            std::min(cols_, axes[2].count - col)};
  }

  const Axes axes;
  const std::vector<Line>& lines() const { return lines_; }
  /// Whether a block's windows are the array's own lines, one after another: a kernel of one tap.
  bool are_whole_lines() const {
    for (const Axis& axis : axes)
      if (axis.step != 1 || axis.taps.size() != 1 || axis.taps[0].offset != 0 || axis.count > axis.in) return false;
    return cols_ == axes[2].in;
  }
  /// The lines that a channel's row holds: the first and the number.
  std::pair<int64_t, int64_t> line_range(int64_t row) const {
    if (!merged_) return {0, int64_t(lines_.size())};
    return {first_line_[row / int64_t(axes[2].taps.size())], rows_};
  }

 private:
  /// Taps in all dimensions but the last.
  int64_t lead() const { return int64_t(axes[0].taps.size() * axes[1].taps.size()); }
  int64_t row_blocks() const { return ceil_div(axes[1].count, rows_); }
  int64_t col_blocks() const { return ceil_div(axes[2].count, cols_); }

  /// Lines for blocks of rows_ rows. Vertical taps share lines if they are a multiple of the step apart.
  void find_lines() {
    const Axis& rows = axes[1];
    const int64_t step = rows.step, vertical = int64_t(rows.taps.size());
    const auto remainder = [=](int64_t offset) { return ((offset % step) + step) % step; };
    std::vector<int64_t> order(vertical);
    for (int64_t i = 0; i < vertical; ++i) order[i] = i;
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      const int64_t x = rows.taps[a].offset, y = rows.taps[b].offset;
      return std::pair(remainder(x), x) < std::pair(remainder(y), y);
    });
    lines_.clear();
    first_line_.assign(axes[0].taps.size() * vertical, 0);
    for (size_t d = 0; d < axes[0].taps.size(); ++d) {
      const int64_t plane = axes[0].taps[d].offset;
      int64_t next = 0;  // the row after the last line
      for (int64_t n = 0; n < vertical; ++n) {
        const int64_t offset = rows.taps[order[n]].offset, end = offset + rows_ * step;
        const bool shares = n > 0 && remainder(offset) == remainder(next) && offset < next;
        if (!shares) next = offset;
        first_line_[d * vertical + order[n]] = int64_t(lines_.size()) - (next - offset) / step;
        for (; next < end; next += step) lines_.push_back({plane, next});
      }
    }
  }

  const bool merged_;
  const int64_t channels_;
  int64_t rows_, cols_;
  std::vector<Line> lines_;
  std::vector<int64_t> first_line_;  // of every tap in all dimensions but the last
};

/// Packs the windows of one block, channel by channel.
template <class T>
class WindowPacker {
 public:
  /// Lines of a row will be `pitch` apart, filled up with zeros.
  WindowPacker(const Windows& windows, const Block& block, int64_t pitch)
      : windows_(windows),
        block_(block),
        pitch_(pitch),
        lines_(int64_t(windows.lines().size())),
        whole_(pitch == block.cols && windows.are_whole_lines()) {
    if (whole_) return;
    const Axis& axis = windows.axes[2];
    int64_t first = 0, last = 0;
    for (size_t j = 0; j < axis.taps.size(); ++j) {
      first = j == 0 ? axis.taps[j].offset : std::min(first, axis.taps[j].offset);
      last = j == 0 ? axis.taps[j].offset : std::max(last, axis.taps[j].offset);
    }
    width_ = block.cols + (last - first) / axis.step;
    for (const Axis::Tap& tap : axis.taps) {
      const int64_t left = block.col * axis.step + first + (tap.offset - first) % axis.step;
      size_t part = 0;
      while (part < parts_.size() && parts_[part].left != left) ++part;
      if (part == parts_.size()) {
        const auto until = [&](int64_t x) {
          return std::clamp<int64_t>(x > left ? ceil_div(x - left, axis.step) : 0, 0, width_);
        };
        parts_.push_back({left, until(0), until(axis.in)});
      }
      shift_.push_back(int64_t(part) * lines_ * width_ + (tap.offset - first) / axis.step);
    }
    staged_.emplace(int64_t(parts_.size()) * lines_ * width_ + kChunk);
    std::fill_n(staged_->data(), int64_t(parts_.size()) * lines_ * width_ + kChunk, T{});
  }

  /// A channel's rows, `stride` apart, from its plane.
  void pack(const T* plane, T* rows, int64_t stride) const {
    if (whole_) {
      const Axes& axes = windows_.axes;
      std::copy_n(plane + (block_.plane * axes[1].in + block_.row) * axes[2].in, block_.rows * block_.cols, rows);
      return;
    }
    for (size_t part = 0; part < parts_.size(); ++part)
      stage(plane, parts_[part], staged_->data() + part * lines_ * width_);
    for (int64_t row = 0; row < windows_.channel_rows(); ++row) {
      const auto [first, count] = windows_.line_range(row);
      const T* from = staged_->data() + shift_[row % shift_.size()] + first * width_;
      T* to = rows + row * stride;
      for (int64_t line = 0; line < count; ++line, from += width_, to += pitch_) {
        // Whole chunks: what stands past a line's end is overwritten by the next line, or never read.
        for (int64_t i = 0; i < block_.cols; i += kChunk) std::memcpy(to + i, from + i, kChunk * sizeof(T));
      }
      if (pitch_ == block_.cols) continue;
      to = rows + row * stride;
      for (int64_t line = 0; line < count; ++line)
        std::fill(to + line * pitch_ + block_.cols, to + (line + 1) * pitch_, T{});
    }
  }

 private:
  static constexpr int64_t kChunk = 32 / sizeof(T);

  /// Columns left + i step of the array, those of them that exist: begin <= i < end.
  struct Part {
    int64_t left, begin, end;
  };

  /// The columns of a part, side by side; zeros around them stay.
  void stage(const T* plane, const Part& part, T* to) const {
    const Axes& axes = windows_.axes;
    const int64_t step = axes[2].step, count = part.end - part.begin;
    if (count <= 0) return;
    for (const Windows::Line& line : windows_.lines()) {
      const int64_t d = block_.plane * axes[0].step + line.plane, h = block_.row * axes[1].step + line.row;
      if (d >= 0 && d < axes[0].in && h >= 0 && h < axes[1].in) {
        const T* const from = plane + (d * axes[1].in + h) * axes[2].in + part.left + part.begin * step;
        if (step == 1) {
          std::copy_n(from, count, to + part.begin);
        } else {
          for (int64_t i = 0; i < count; ++i) to[part.begin + i] = from[i * step];
        }
      }
      to += width_;
    }
  }

  const Windows& windows_;
  const Block block_;
  const int64_t pitch_, lines_;
  const bool whole_;
  int64_t width_;  // columns of a staged line
  std::vector<Part> parts_;
  std::vector<int64_t> shift_;  // where a horizontal tap begins in the staged lines
  std::optional<Scratch<T>> staged_;
};

}  // namespace neuromod
