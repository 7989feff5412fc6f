// fly_hash and fly_readout, host side: schema, checks, allocation, registration.
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/floor_divide.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/sort.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <tuple>

#include "common/host.h"
#include "fly_hash/fly_hash.h"

namespace neuromod {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

void check_index(const char* op, const Tensor& index, const char* like_name, const Tensor& like, int64_t inputs) {
  const auto type = index.scalar_type();
  TORCH_CHECK_TYPE(type == at::kInt || type == at::kLong, op, ": expected index of dtype int32 or int64, got ",
                   dtype_name(type), "; convert it with .long()");
  TORCH_CHECK_VALUE(index.device() == like.device(), op, ": expected index on ", like.device().str(), " (where ",
                    like_name, " is), got ", index.device().str(), "; move one of them");
  check_rank(op, "index", index, 2, "[H, n]");
  TORCH_CHECK_VALUE(inputs <= kMostFlyInputs, op, ": expected input of at most ", kMostFlyInputs, " features, got ",
                    inputs);
}

void check_input(const char* op, const Tensor& input, const char* lead_name, const Tensor& lead) {
  if (&input == &lead) {
    check_floating(op, "input", input);
  } else {
    check_like(op, "input", input, lead_name, lead);
  }
  check_rank(op, "input", input, 2, "[B, I]");
}

void check_readout(const char* op, const Tensor& input, const Tensor& index, const Tensor& gain, const Tensor& readout,
                   const OptionalTensor& task, const char* like_name, const Tensor& like) {
  const int64_t units = index.size(0);
  check_like(op, "gain", gain, like_name, like);
  if (task) {
    check_rank(op, "gain", gain, 2, "[T, H]");
    check_shape(op, "gain", gain, "[T, H]", {gain.size(0), units});
  } else {
    check_shape(op, "gain", gain, "[H]", {units});
  }
  check_like(op, "readout", readout, like_name, like);
  check_rank(op, "readout", readout, 2, "[O, H]");
  check_shape(op, "readout", readout, "[O, H]", {readout.size(0), units});
  if (!task) return;
  TORCH_CHECK_TYPE(task->scalar_type() == at::kLong, op, ": expected task of dtype int64, got ",
                   dtype_name(task->scalar_type()), "; convert it with .long()");
  TORCH_CHECK_VALUE(task->device() == like.device(), op, ": expected task on ", like.device().str(), " (where ",
                    like_name, " is), got ", task->device().str(), "; move one of them");
  check_shape(op, "task", *task, "[B]", {input.size(0)});
}

/// With rows whose elements lie side by side.
Tensor dense_rows(const Tensor& t) { return t.size(-1) <= 1 || t.stride(-1) == 1 ? t : t.contiguous(); }

/// What the CUDA kernels of the gradients need beside their operands, and its owners.
struct Workspace {
  Workspace(FlyHashBackwardParams& p, const Tensor& index) {
    const FlyHashParams& f = p.forward;
    const auto options =
        index.options().dtype(f.dtype == DType::float64 ? at::ScalarType::Double : at::ScalarType::Float);
    mean = at::empty({f.batch}, options);
    p.mean = mean.mutable_data_ptr();
    if (p.grad_gain && f.task) {
      sums = at::empty({f.tasks, f.units}, options);
      p.sums = sums.mutable_data_ptr();
    }
    if (!p.grad_input) return;
    rows = at::empty({fly_hash_rows(f.batch), f.units}, options);
    p.rows = rows.mutable_data_ptr();
    // The units of each input, in order; an index out of range belongs to none.
    const auto [sorted, order] =
        at::sort(index.flatten().to(at::kLong), /*stable=*/true, /*dim=*/0, /*descending=*/false);
    starts = at::searchsorted(sorted, at::arange(f.inputs + 1, sorted.options()));
    members = at::floor_divide(order, std::max<int64_t>(f.arity, 1));
    p.starts = starts.const_data_ptr<int64_t>();
    p.members = members.const_data_ptr<int64_t>();
  }

  Tensor mean, sums, rows, starts, members;
};

/// Runs the gradients' kernel.
void run_backward(const char* op, FlyHashBackwardParams& p, const Tensor& index) {
  std::optional<Workspace> workspace;
  if (runs_cuda_kernels(index.device())) workspace.emplace(p, index);
  run(op, index.device(), NEUROMOD_KERNEL(fly_hash_backward), p);
}

/// What the kernels read, and its owners.
struct FlyOperands {
  FlyOperands(const Tensor& input_, const Tensor& index_, const Tensor& gain_ = {}, const Tensor& readout_ = {},
              const OptionalTensor& task_ = {})
      : input(dense_rows(input_)), index(index_.contiguous()), gain(gain_), readout(readout_) {
    p.dtype = to_dtype(input.scalar_type());
    p.long_index = index.scalar_type() == at::kLong;
    p.batch = input.size(0);
    p.inputs = input.size(1);
    p.units = index.size(0);
    p.arity = index.size(1);
    p.input = view(input);
    p.index = view(index);
    if (!readout_.defined()) return;
    if (!runs_cuda_kernels(input.device())) {  // read once for each block of samples: converted once
      const auto wide = accumulation_type(input.scalar_type());
      gain = gain.to(wide), readout = readout.to(wide);
    }
    gain = dense_rows(gain), readout = dense_rows(readout);
    p.outputs = readout.size(0);
    p.tasks = task_ ? gain.size(0) : 1;
    p.gain = view(gain);
    if (!task_) p.gain.stride[1] = p.gain.stride[0], p.gain.stride[0] = 0;
    p.readout = view(readout);
    if (task_) task = *task_, p.task = view(task);
  }

  Tensor input, index, gain, readout, task;
  FlyHashParams p{};
};

Tensor fly_hash(const Tensor& input, const Tensor& index) {
  constexpr auto op = "fly_hash";
  check_input(op, input, "input", input);
  check_index(op, index, "input", input, input.size(1));
  const Tensor out = empty_result({input.size(0), index.size(0)}, input.options());
  if (out.numel() == 0) return out;
  FlyOperands operands(input, index);
  operands.p.output = mutable_view(out);
  run(op, input.device(), NEUROMOD_KERNEL(fly_hash), operands.p);
  return out;
}

Tensor fly_readout(const Tensor& input, const Tensor& index, const Tensor& gain, const Tensor& readout,
                   const OptionalTensor& task) {
  constexpr auto op = "fly_readout";
  check_input(op, input, "input", input);
  check_index(op, index, "input", input, input.size(1));
  check_readout(op, input, index, gain, readout, task, "input", input);
  const Tensor out = at::empty({input.size(0), readout.size(0)}, input.options());
  if (out.numel() == 0) return out;
  if (index.size(0) == 0) return out.zero_();
  FlyOperands operands(input, index, gain, readout, task);
  operands.p.output = mutable_view(out);
  run(op, input.device(), NEUROMOD_KERNEL(fly_hash), operands.p);
  return out;
}

Tensor fly_hash_backward(const Tensor& grad_output, const Tensor& input, const Tensor& index) {
  constexpr auto op = "fly_hash_backward";
  check_floating(op, "grad_output", grad_output);
  check_input(op, input, "grad_output", grad_output);
  check_index(op, index, "grad_output", grad_output, input.size(1));
  check_shape(op, "grad_output", grad_output, "[B, H]", {input.size(0), index.size(0)});
  const Tensor grad_input = at::empty(input.sizes(), input.options());
  if (grad_input.numel() == 0) return grad_input;
  if (index.size(0) == 0) return grad_input.zero_();
  const Tensor grad = dense_rows(grad_output);
  const FlyOperands operands(input, index);
  FlyHashBackwardParams p{};
  p.forward = operands.p;
  p.grad = view(grad);
  p.grad_input = mutable_view(grad_input);
  run_backward(op, p, operands.index);
  return grad_input;
}

std::tuple<Tensor, Tensor, Tensor> fly_readout_backward(const Tensor& grad_output, const Tensor& input,
                                                        const Tensor& index, const Tensor& gain, const Tensor& readout,
                                                        const OptionalTensor& task, std::array<bool, 3> needed) {
  constexpr auto op = "fly_readout_backward";
  check_floating(op, "grad_output", grad_output);
  check_input(op, input, "grad_output", grad_output);
  check_index(op, index, "grad_output", grad_output, input.size(1));
  check_readout(op, input, index, gain, readout, task, "grad_output", grad_output);
  check_shape(op, "grad_output", grad_output, "[B, O]", {input.size(0), readout.size(0)});
  const auto result = [&](bool need, const Tensor& like) {
    return need ? at::empty(like.sizes(), input.options()) : at::empty({0}, input.options());
  };
  const Tensor grad_input = result(needed[0], input), grad_gain = result(needed[1], gain),
               grad_readout = result(needed[2], readout);
  const auto results = std::make_tuple(grad_input, grad_gain, grad_readout);
  if (input.size(0) == 0 || index.size(0) == 0 || readout.size(0) == 0) {
    for (const Tensor& t : {grad_input, grad_gain, grad_readout}) t.zero_();
    return results;
  }
  const Tensor grad = dense_rows(grad_output);
  const FlyOperands operands(input, index, gain, readout, task);
  FlyHashBackwardParams p{};
  p.forward = operands.p;
  p.grad = view(grad);
  const auto target = [](const Tensor& t) { return t.numel() ? mutable_view(t) : View{}; };
  p.grad_input = target(grad_input);
  p.grad_gain = target(task ? grad_gain : grad_gain.unsqueeze(0));
  p.grad_readout = target(grad_readout);
  run_backward(op, p, operands.index);
  return results;
}

TORCH_LIBRARY_FRAGMENT(NEUROMOD_LIBRARY, library) {
  library.def("fly_hash(Tensor input, Tensor index) -> Tensor");
  library.def("fly_hash_backward(Tensor grad_output, Tensor input, Tensor index) -> Tensor");
  library.def("fly_readout(Tensor input, Tensor index, Tensor gain, Tensor readout, Tensor? task=None) -> Tensor");
  library.def(
      "fly_readout_backward(Tensor grad_output, Tensor input, Tensor index, Tensor gain, Tensor readout, Tensor? task, "
      "bool[3] needed) -> (Tensor, Tensor, Tensor)");
}
NEUROMOD_IMPL("fly_hash", &fly_hash)
NEUROMOD_IMPL("fly_hash_backward", &fly_hash_backward)
NEUROMOD_IMPL("fly_readout", &fly_readout)
NEUROMOD_IMPL("fly_readout_backward", &fly_readout_backward)

}  // namespace
}  // namespace neuromod
