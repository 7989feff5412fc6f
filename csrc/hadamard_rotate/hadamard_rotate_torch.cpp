// hadamard_rotate and hadamard_rotate_, host side: schema, checks, allocation, registration.
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "common/host.h"
#include "hadamard_rotate/hadamard_rotate.h"

namespace neuromod {
namespace {

using at::Tensor;

/// Of how many elements the rotations are: the first ones, by the largest power of two in n; and twice the others or
/// more, but no more than the first ones; none if there are no others.
std::array<int, 2> hadamard_levels(int64_t n) {
  std::array<int, 2> levels{0, -1};
  while (n >> (levels[0] + 1)) ++levels[0];
  const int64_t others = n - (int64_t(1) << levels[0]);
  if (others == 0) return levels;
  for (levels[1] = 0; levels[1] < levels[0] && (int64_t(1) << levels[1]) < 2 * others;) ++levels[1];
  return levels;
}

void check_signs(const char* op, const Tensor& signs, int64_t n, const Tensor& weights, const char* name) {
  TORCH_CHECK_TYPE(signs.scalar_type() == at::kChar, op, ": expected signs of dtype int8, got ",
                   dtype_name(signs.scalar_type()));
  TORCH_CHECK_VALUE(signs.device() == weights.device(), op, ": expected signs on ", weights.device().str(), " (where ",
                    name, " is), got ", signs.device().str(), "; move one of them");
  const auto [first, last] = hadamard_levels(n);
  check_shape(op, "signs", signs, "[p + q]", {(int64_t(1) << first) + (last < 0 ? 0 : int64_t(1) << last)});
}

/// The rotations, of arguments that were checked; in the pieces' `in` is what the first one reads.
void rotate(const char* op, const Tensor& like, int64_t vectors, std::vector<HadamardPiece> pieces, const Tensor& signs,
            bool inverse) {
  const int64_t n = pieces.back().end;
  const auto [first, last] = hadamard_levels(n);
  const Tensor dense_signs = signs.contiguous();
  HadamardRotateParams p{};
  p.dtype = to_dtype(like.scalar_type());
  p.vectors = vectors;
  p.pieces = pieces.data();
  p.num_pieces = static_cast<int64_t>(pieces.size());
  p.inverse = inverse;
  const auto run_one = [&](bool second) {
    p.levels = second ? last : first;
    p.first = second ? n - (int64_t(1) << last) : 0;
    p.signs = dense_signs.const_data_ptr<int8_t>() + (second ? int64_t(1) << first : 0);
    run(op, like.device(), NEUROMOD_KERNEL(hadamard_rotate), p);
    for (HadamardPiece& piece : pieces) piece.in = piece.out, piece.in_stride = piece.out_stride;
  };
  const bool both = last >= 0;
  run_one(both && inverse);
  if (both) run_one(!inverse);
}

Tensor hadamard_rotate(const Tensor& weights, const Tensor& signs, bool inverse) {
  constexpr auto op = "hadamard_rotate";
  check_accumulation_floating(op, "weights", weights);
  check_min_rank(op, "weights", weights, 1, "[..., n]");
  const int64_t n = weights.size(-1);
  TORCH_CHECK_VALUE(n > 0, op, ": expected weights of shape [..., n] with n >= 1, got ", shape_string(weights.sizes()));
  check_signs(op, signs, n, weights, "weights");
  const Tensor out = empty_result(weights.sizes(), weights.options());
  if (out.numel() == 0) return out;
  const Tensor matrix = weights.reshape({weights.numel() / n, n});
  const Tensor rows = n == 1 || matrix.stride(1) == 1 ? matrix : matrix.contiguous();
  const auto levels = hadamard_levels(n);
  if (levels[1] >= 0) {  // what the rotation that comes first leaves alone
    const int64_t begin = inverse ? 0 : int64_t(1) << levels[0], end = inverse ? n - (int64_t(1) << levels[1]) : n;
    out.view({-1, n}).narrow(1, begin, end - begin).copy_(rows.narrow(1, begin, end - begin));
  }
  rotate(op, weights, rows.size(0), {{rows.const_data_ptr(), out.mutable_data_ptr(), rows.stride(0), n, 0, n}}, signs,
         inverse);
  return out;
}

/// What is written has one place for each element.
void check_memory(const char* op, at::TensorList weights) {
  std::vector<std::array<uintptr_t, 3>> spans;  // from where to where, and whose
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& t = weights[i];
    check_not_expanded(op, ("weights[" + std::to_string(i) + "]").c_str(), t);
    if (t.numel() == 0) continue;
    const auto [begin, end] = memory_span(t);
    spans.push_back({begin, end, i});
  }
  std::sort(spans.begin(), spans.end());
  for (size_t i = 1; i < spans.size(); ++i)
    TORCH_CHECK_VALUE(spans[i - 1][1] <= spans[i][0], op, ": expected weights[", spans[i][2],
                      "] in memory of its own, got one that overlaps weights[", spans[i - 1][2], "]; clone it");
}

void hadamard_rotate_(at::TensorList weights, const Tensor& signs, bool inverse) {
  constexpr auto op = "hadamard_rotate_";
  int64_t n = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const std::string name = "weights[" + std::to_string(i) + "]";
    check_accumulation_floating(op, name.c_str(), weights[i]);
    if (i > 0) check_like(op, name.c_str(), weights[i], "weights[0]", weights[0]);
    n += weights[i].numel();
  }
  TORCH_CHECK_VALUE(n > 0, op, ": expected weights with at least one element, got none");
  check_signs(op, signs, n, weights[0], "weights[0]");
  check_memory(op, weights);
  // Layouts that are not dense are worked on as copies and written back whole; so is, on CUDA, more than one tensor.
  std::vector<Tensor> dense;
  for (const Tensor& t : weights) dense.push_back(t.contiguous().view({-1}));
  if (dense.size() > 1 && runs_cuda_kernels(weights[0].device())) dense = {at::cat(dense)};
  std::vector<HadamardPiece> pieces;
  int64_t begin = 0;
  for (const Tensor& t : dense) {
    if (t.numel() == 0) continue;
    void* const data = t.mutable_data_ptr();
    pieces.push_back({data, data, 0, 0, begin, begin + t.numel()});
    begin += t.numel();
  }
  rotate(op, weights[0], 1, pieces, signs, inverse);
  begin = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& t = weights[i];
    const Tensor from = dense.size() == weights.size() ? dense[i] : dense[0].narrow(0, begin, t.numel());
    begin += t.numel();
    if (from.const_data_ptr() != t.const_data_ptr()) t.copy_(from.view(t.sizes()));
    mark_written(t);
  }
}

TORCH_LIBRARY_FRAGMENT(NEUROMOD_LIBRARY, library) {
  library.def("hadamard_rotate(Tensor weights, Tensor signs, bool inverse=False) -> Tensor");
  library.def("hadamard_rotate_(Tensor(a!)[] weights, Tensor signs, bool inverse=False) -> ()");
}
NEUROMOD_IMPL("hadamard_rotate", &hadamard_rotate)
NEUROMOD_IMPL("hadamard_rotate_", &hadamard_rotate_)

}  // namespace
}  // namespace neuromod
