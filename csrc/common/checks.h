// All wording of errors: `<op>: expected <argument> <requirement>, got <actual>[; <remedy>]`.
// neuromod_ext/_checks.py says the same words where no kernel runs (fake tensors, the reference); a test compares them.
#pragma once

#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "common/params.h"

namespace neuromod {

inline const char* dtype_name(at::ScalarType t) {
  switch (t) {
    case at::kDouble:
      return "float64";
    case at::kFloat:
      return "float32";
    case at::kBFloat16:
      return "bfloat16";
    case at::kHalf:
      return "float16";
    case at::kLong:
      return "int64";
    case at::kInt:
      return "int32";
    case at::kShort:
      return "int16";
    case at::kChar:
      return "int8";
    case at::kByte:
      return "uint8";
    case at::kBool:
      return "bool";
    case at::kComplexFloat:
      return "complex64";
    case at::kComplexDouble:
      return "complex128";
    default:
      return c10::toString(t);
  }
}

inline at::ScalarType accumulation_type(at::ScalarType t) { return t == at::kDouble ? at::kDouble : at::kFloat; }

inline DType to_dtype(at::ScalarType t) {
  switch (t) {
    case at::kDouble:
      return DType::float64;
    case at::kFloat:
      return DType::float32;
    case at::kBFloat16:
      return DType::bfloat16;
    default:
      return DType::float16;
  }
}

/// "[2, 3]"; -1 is printed as "...".
inline std::string shape_string(at::IntArrayRef sizes) {
  std::ostringstream s;
  s << '[';
  for (size_t i = 0; i < sizes.size(); ++i) {
    s << (i ? ", " : "");
    if (sizes[i] < 0) {
      s << "...";
    } else {
      s << sizes[i];
    }
  }
  s << ']';
  return s.str();
}

inline void check_floating(const char* op, const char* name, const at::Tensor& t) {
  const auto d = t.scalar_type();
  TORCH_CHECK_TYPE(d == at::kDouble || d == at::kFloat || d == at::kBFloat16 || d == at::kHalf, op, ": expected ", name,
                   " of dtype float64, float32, bfloat16 or float16, got ", dtype_name(d));
}

inline void check_accumulation_floating(const char* op, const char* name, const at::Tensor& t) {
  const auto d = t.scalar_type();
  TORCH_CHECK_TYPE(d == at::kDouble || d == at::kFloat, op, ": expected ", name, " of dtype float64 or float32, got ",
                   dtype_name(d), "; convert it with .float()");
}

/// `t` has the dtype and device of `like`.
inline void check_like(const char* op, const char* name, const at::Tensor& t, const char* like_name,
                       const at::Tensor& like) {
  TORCH_CHECK_TYPE(t.scalar_type() == like.scalar_type(), op, ": expected ", name, " of dtype ",
                   dtype_name(like.scalar_type()), " (that of ", like_name, "), got ", dtype_name(t.scalar_type()),
                   "; convert one of them");
  TORCH_CHECK_VALUE(t.device() == like.device(), op, ": expected ", name, " on ", like.device().str(), " (where ",
                    like_name, " is), got ", t.device().str(), "; move one of them");
}

/// `t` has the accumulation type of `like`, and its device.
inline void check_accumulation_like(const char* op, const char* name, const at::Tensor& t, const char* like_name,
                                    const at::Tensor& like) {
  const auto want = accumulation_type(like.scalar_type());
  TORCH_CHECK_TYPE(t.scalar_type() == want, op, ": expected ", name, " of dtype ", dtype_name(want),
                   " (in which sums over ", dtype_name(like.scalar_type()), " ", like_name, " run), got ",
                   dtype_name(t.scalar_type()), "; convert it with .to(torch.", dtype_name(want), ")");
  TORCH_CHECK_VALUE(t.device() == like.device(), op, ": expected ", name, " on ", like.device().str(), " (where ",
                    like_name, " is), got ", t.device().str(), "; move one of them");
}

inline void check_rank(const char* op, const char* name, const at::Tensor& t, int64_t rank, const char* symbols) {
  TORCH_CHECK_VALUE(t.dim() == rank, op, ": expected ", name, " of shape ", symbols, ", got ", shape_string(t.sizes()));
}

inline void check_min_rank(const char* op, const char* name, const at::Tensor& t, int64_t rank, const char* symbols) {
  TORCH_CHECK_VALUE(t.dim() >= rank, op, ": expected ", name, " of shape ", symbols, ", got ", shape_string(t.sizes()));
}

/// The shape equals `want`; one -1 in it stands for any number of dimensions.
inline void check_shape(const char* op, const char* name, const at::Tensor& t, const char* symbols,
                        at::IntArrayRef want) {
  const auto got = t.sizes();
  bool same = true;
  size_t head = 0;
  while (head < want.size() && want[head] >= 0) ++head;
  if (head == want.size()) {
    same = got == want;
  } else {
    const size_t tail = want.size() - head - 1;
    same = got.size() >= head + tail && got.slice(0, head) == want.slice(0, head) &&
           got.slice(got.size() - tail) == want.slice(head + 1);
  }
  TORCH_CHECK_VALUE(same, op, ": expected ", name, " of shape ", symbols, " = ", shape_string(want), ", got ",
                    shape_string(got));
}

/// `t`, which is written, has one place for each element, and holds it.
inline void check_not_expanded(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK_VALUE(!t.is_neg(), op, ": expected ", name, " without a pending negation, got one; call resolve_neg()");
  TORCH_CHECK_VALUE(at::has_internal_overlap(t) != at::MemOverlap::Yes, op, ": expected ", name,
                    " without overlapping elements, got an expanded one; clone it");
}

/// From where to where the elements of a tensor, which is not empty, lie.
inline std::pair<uintptr_t, uintptr_t> memory_span(const at::Tensor& t) {
  int64_t last = 1;  // element, counted from the first
  for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  const auto begin = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  return {begin, begin + static_cast<uintptr_t>(last) * t.itemsize()};
}

/// `t` lies apart from `written`; views that alternate in one piece of memory do not count as such.
inline void check_apart(const char* op, const char* name, const at::Tensor& t, const char* written_name,
                        const at::Tensor& written) {
  if (t.numel() == 0 || written.numel() == 0) return;
  const auto [begin, end] = memory_span(t);
  const auto [written_begin, written_end] = memory_span(written);
  TORCH_CHECK_VALUE(end <= written_begin || written_end <= begin, op, ": expected ", name,
                    " in memory of its own, got one that overlaps ", written_name, "; clone it");
}

inline void check_num_basis(const char* op, const char* name, int64_t num_basis) {
  TORCH_CHECK_VALUE(num_basis >= 1, op, ": expected ", name, " with at least one basis point (K >= 1), got K = 0");
}

}  // namespace neuromod
