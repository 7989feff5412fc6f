// manifold_conv, host side: schema, checks, allocation, registration.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "common/host.h"
#include "common/precision.h"
#include "manifold_conv/manifold_conv.h"
#include "manifold_conv/manifold_conv_cuda.h"

namespace neuromod {
namespace {

using at::IntArrayRef;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

struct ConvOptions {
  IntArrayRef stride, padding, dilation;
  int64_t groups;
};

/// The names of the dimensions of space: of an image "H, W", of its kernel "kH, kW".
std::string space_letters(int64_t dims, const char* prefix) {
  const std::string letters = dims == 1 ? "L" : std::string("DHW").substr(3 - dims);
  std::string names;
  for (const char letter : letters) names += std::string(names.empty() ? "" : ", ") + prefix + letter;
  return names;
}

void check_option(const char* op, const char* name, IntArrayRef values, int64_t dims, int64_t least) {
  bool right = int64_t(values.size()) == dims;
  for (const int64_t value : values) right = right && value >= least;
  TORCH_CHECK_VALUE(right, op, ": expected ", name, " of ", dims, dims == 1 ? " number" : " numbers", " >= ", least,
                    ", got ", values);
  for (const int64_t value : values)  // sizes are sums and products of these
    TORCH_CHECK_VALUE(value < int64_t(1) << 31, op, ": expected ", name, " below 2**31, got ", values);
}

/// The params of a call, without tensors; y's size is that of the output.
ManifoldConvParams conv_params(const char* op, const Tensor& input, const Tensor& basis, const Tensor& coeff,
                               const OptionalTensor& bias, const ConvOptions& options) {
  check_floating(op, "input", input);
  const int64_t dims = input.dim() - 2, groups = options.groups;
  TORCH_CHECK_VALUE(dims >= 1 && dims <= 3, op,
                    ": expected input of shape [B, C, ...] with one to three dimensions of space, got ",
                    shape_string(input.sizes()));
  check_like(op, "basis", basis, "input", input);
  check_rank(op, "basis", basis, 3 + dims, ("[K, O, C / groups, " + space_letters(dims, "k") + "]").c_str());
  check_num_basis(op, "basis", basis.size(0));
  check_accumulation_like(op, "coeff", coeff, "basis", basis);
  const int64_t B = input.size(0), C = input.size(1), K = basis.size(0), O = basis.size(1);
  TORCH_CHECK_VALUE(groups >= 1 && O % groups == 0, op, ": expected groups >= 1 that divides O = ", O, ", got ",
                    groups);
  check_rank(op, "coeff", coeff, 2, "[B, K]");
  check_shape(op, "coeff", coeff, "[B, K]", {B, K});
  TORCH_CHECK_VALUE(C == basis.size(2) * groups, op, ": expected input of ", basis.size(2) * groups,
                    " channels (basis.shape[2] * groups = ", basis.size(2), " * ", groups, "), got ", C);
  if (bias) {
    check_like(op, "bias", *bias, "basis", basis);
    check_shape(op, "bias", *bias, "[K, O]", {K, O});
  }
  check_option(op, "stride", options.stride, dims, 1);
  check_option(op, "padding", options.padding, dims, 0);
  check_option(op, "dilation", options.dilation, dims, 1);

  ManifoldConvParams p{};
  p.dtype = to_dtype(input.scalar_type());
  p.batch = B, p.num_basis = K, p.groups = groups, p.in_channels = C, p.out_channels = O;
  p.tf32 = p.dtype == DType::float32 && runs_cuda_kernels(input.device()) && tf32_allowed();
  std::vector<int64_t> padded, spans;
  for (int64_t d = 0; d < 3; ++d) {
    const int64_t i = d - (3 - dims);
    p.in_size[d] = i < 0 ? 1 : input.size(2 + i);
    p.kernel[d] = i < 0 ? 1 : basis.size(3 + i);
    p.stride[d] = i < 0 ? 1 : options.stride[i];
    p.padding[d] = i < 0 ? 0 : options.padding[i];
    p.dilation[d] = i < 0 ? 1 : options.dilation[i];
    if (i < 0) continue;
    padded.push_back(p.in_size[d] + 2 * p.padding[d]);
    spans.push_back(p.dilation[d] * (p.kernel[d] - 1) + 1);
  }
  for (int64_t i = 0; i < dims; ++i) {
    TORCH_CHECK_VALUE(basis.size(3 + i) >= 1, op,
                      ": expected basis with a kernel of at least 1 in every dimension, got ",
                      shape_string(basis.sizes().slice(3)));
    TORCH_CHECK_VALUE(spans[i] <= padded[i], op, ": expected basis with a kernel within the padded input ",
                      shape_string(padded), ", got one that spans ", shape_string(spans));
  }
  if (runs_cuda_kernels(input.device())) {  // which count pixels by int
    int64_t around = 1;
    for (const int64_t size : padded) around = size < (int64_t(1) << 30) / around ? around * size : int64_t(1) << 30;
    TORCH_CHECK_VALUE(around < int64_t(1) << 30, op,
                      ": expected input of fewer than 2^30 pixels with their padding on CUDA, got ",
                      shape_string(padded));
  }
  for (int64_t d = 0; d < 3; ++d) {
    const int64_t span = p.dilation[d] * (p.kernel[d] - 1) + 1;
    p.out_size[d] = (p.in_size[d] + 2 * p.padding[d] - span) / p.stride[d] + 1;
  }
  return p;
}

std::vector<int64_t> output_shape(const ManifoldConvParams& p, int64_t dims) {
  std::vector<int64_t> shape = {p.batch, p.out_channels};
  shape.insert(shape.end(), p.out_size + 3 - dims, p.out_size + 3);
  return shape;
}

/// A dense tensor as a view of its first two dimensions and the rest.
View planes(const Tensor& t) {
  View v;
  v.data = const_cast<void*>(t.const_data_ptr());  // see view()
  v.stride[0] = t.numel() / std::max<int64_t>(t.size(0), 1);
  v.stride[1] = v.stride[0] / std::max<int64_t>(t.size(1), 1);
  v.stride[2] = 1;
  return v;
}
View mutable_planes(const Tensor& t) {
  View v = planes(t);
  v.data = t.mutable_data_ptr();
  return v;
}

/// [n, groups * channels, pixels...] as rows [n, pixels, groups, channels], channels filled up with zeros to whole 16
/// bytes: what CUDA kernels read. A tensor that lies so already (channels_last) is not copied.
Tensor channel_rows(const Tensor& t, int64_t groups, const ManifoldConvParams& p) {
  const int64_t channels = t.size(1) / groups, filled = p.filled(channels);
  int64_t pixels = 1;
  for (int64_t d = 2; d < t.dim(); ++d) pixels *= t.size(d);
  const Tensor rows = t.reshape({t.size(0), groups, channels, pixels}).permute({0, 3, 1, 2});
  if (filled == channels && rows.is_contiguous() && reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 == 0)
    return rows;
  const Tensor copy = at::empty({t.size(0), pixels, groups, filled}, t.options());
  copy.narrow(3, 0, channels).copy_(rows);
  if (filled > channels) copy.narrow(3, channels, filled - channels).zero_();
  return copy;
}

/// The operands as the kernels take them; it keeps those that had to be copied.
class ConvOperands {
 public:
  ConvOperands(const Tensor& x, const Tensor& points, const Tensor& coeff, const OptionalTensor& beta,
               ManifoldConvParams& p)
      : cuda_(runs_cuda_kernels(x.device())) {
    p.input = pixels(x, p.groups, p);
    // P lies as [K, taps, O, channels], so taps stand for pixels and outputs for groups.
    p.basis =
        cuda_ ? planes(keep(channel_rows(points.flatten(1, 2), points.size(1), p))) : planes(keep(points.contiguous()));
    p.coeff = view(coeff);
    if (beta) p.bias = view(keep(beta->contiguous()));
  }

  void grad_output(const Tensor& t, ManifoldConvParams& p) { p.output = pixels(t, p.groups, p); }

 private:
  View pixels(const Tensor& t, int64_t groups, const ManifoldConvParams& p) {
    return planes(keep(cuda_ ? channel_rows(t, groups, p) : t.contiguous()));
  }
  const Tensor& keep(Tensor t) { return kept_[count_++] = std::move(t); }

  bool cuda_;
  std::array<Tensor, 4> kept_;
  int count_ = 0;
};

Tensor manifold_conv(const Tensor& input, const Tensor& basis, const Tensor& coeff, const OptionalTensor& bias,
                     IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
  ManifoldConvParams p = conv_params("manifold_conv", input, basis, coeff, bias, {stride, padding, dilation, groups});
  const Tensor output = empty_result(output_shape(p, input.dim() - 2), input.options());
  if (output.numel() == 0) return output;
  const ConvOperands operands(input, basis, coeff, bias, p);
  p.output = mutable_planes(output);
  run("manifold_conv", input.device(), NEUROMOD_KERNEL(manifold_conv_forward), p);
  return output;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> manifold_conv_backward(const Tensor& grad_output, const Tensor& input,
                                                                  const Tensor& basis, const Tensor& coeff,
                                                                  const OptionalTensor& bias, IntArrayRef stride,
                                                                  IntArrayRef padding, IntArrayRef dilation,
                                                                  int64_t groups, std::array<bool, 4> needed) {
  constexpr auto op = "manifold_conv_backward";
  ManifoldConvParams p = conv_params(op, input, basis, coeff, bias, {stride, padding, dilation, groups});
  check_like(op, "grad_output", grad_output, "input", input);
  const int64_t dims = input.dim() - 2;
  check_shape(op, "grad_output", grad_output, ("[B, O, " + space_letters(dims, "") + "]").c_str(),
              output_shape(p, dims));

  const auto options = input.options();
  const auto result = [&](bool wanted, IntArrayRef sizes, at::TensorOptions as) {
    return wanted ? empty_result(sizes, as) : at::empty({0}, options);
  };
  const Tensor grad_input = result(needed[0], input.sizes(), options),
               grad_basis = result(needed[1], basis.sizes(), options);
  const Tensor grad_coeff = result(needed[2], coeff.sizes(), coeff.options());
  const Tensor grad_bias = result(needed[3], {p.num_basis, p.out_channels}, options);
  const std::tuple results{grad_input, grad_basis, grad_coeff, grad_bias};
  if (grad_output.numel() == 0) {
    for (const Tensor& t : {grad_input, grad_basis, grad_coeff, grad_bias}) t.zero_();
    return results;
  }
  ConvOperands operands(input, basis, coeff, bias, p);
  operands.grad_output(grad_output, p);
  ManifoldConvBackwardParams q{p, {}, {}, {}, {}};
  if (grad_input.numel() > 0) q.grad_input = mutable_planes(grad_input);
  if (grad_basis.numel() > 0) q.grad_basis = mutable_planes(grad_basis);
  if (grad_coeff.numel() > 0) q.grad_coeff = mutable_view(grad_coeff);
  if (grad_bias.numel() > 0) q.grad_bias = mutable_view(grad_bias);
  Tensor workspace;
  if (runs_cuda_kernels(input.device())) {
    workspace = at::empty({conv_workspace(q).bytes(p.dtype)}, options.dtype(at::kByte));
    q.p.workspace = workspace.mutable_data_ptr();
  }
  run(op, input.device(), NEUROMOD_KERNEL(manifold_conv_backward), q);
  return results;
}

TORCH_LIBRARY_FRAGMENT(NEUROMOD_LIBRARY, library) {
  library.def(
      "manifold_conv(Tensor input, Tensor basis, Tensor coeff, Tensor? bias, int[] stride, int[] padding, "
      "int[] dilation, int groups) -> Tensor");
  library.def(
      "manifold_conv_backward(Tensor grad_output, Tensor input, Tensor basis, Tensor coeff, Tensor? bias, "
      "int[] stride, int[] padding, int[] dilation, int groups, bool[4] needed) -> (Tensor, Tensor, Tensor, Tensor)");
}
NEUROMOD_IMPL("manifold_conv", &manifold_conv)
NEUROMOD_IMPL("manifold_conv_backward", &manifold_conv_backward)

}  // namespace
}  // namespace neuromod
