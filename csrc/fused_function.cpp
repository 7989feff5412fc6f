// Ops with a fused gradient as nodes of torch's graph, made without Python: a small product takes less time than a
// Function written in Python takes to call it. Transforms and tangents never come here (neuromod_ext/autograd.py).
#include "fused_function.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/python/pybind_utils.h>
#include <torch/csrc/utils/pybind.h>

#include <utility>
#include <vector>

namespace at::functorch {
TORCH_API Tensor unwrapIfDead(const Tensor& tensor);  // its header wants a JSON library that torch does not bring
}

namespace neuromod {
namespace {

namespace py = pybind11;
using at::Tensor;
using torch::autograd::variable_list;

/// An op(tensors..., options...) -> Tensor, and its gradient, op_backward(grad, tensors..., options..., bool[n] needed)
/// -> n tensors, or without `needed` one.
struct Fused {
  c10::OperatorHandle forward, backward;
  std::vector<size_t> differentiable;  // which tensors those gradients are of
  py::object formula;  // (tensors..., options...), grad, needed -> the gradients, differentiable in turn
};

using Options = std::vector<c10::IValue>;

void push(torch::jit::Stack& stack, at::TensorList tensors, const Options& options) {
  for (const Tensor& t : tensors) stack.push_back(t.defined() ? c10::IValue(t) : c10::IValue());
  stack.insert(stack.end(), options.begin(), options.end());
}

/// The op itself, whose derivative is somebody else's concern.
Tensor call(const Fused& op, at::TensorList tensors, const Options& options) {
  const at::AutoDispatchBelowAutograd guard;
  torch::jit::Stack stack;
  stack.reserve(tensors.size() + options.size());
  push(stack, tensors, options);
  op.forward.callBoxed(stack);
  return std::move(stack.front()).toTensor();
}

variable_list gradients(const Fused& op, const Tensor& grad, at::TensorList tensors, const Options& options,
                        const c10::List<bool>& needed) {
  const at::AutoDispatchBelowAutograd guard;
  torch::jit::Stack stack;
  stack.reserve(tensors.size() + options.size() + 2);
  stack.emplace_back(grad);
  push(stack, tensors, options);
  if (stack.size() < op.backward.schema().arguments().size()) stack.emplace_back(needed);
  op.backward.callBoxed(stack);
  variable_list grads;
  for (size_t i = 0; i < stack.size(); ++i) grads.push_back(needed[i] ? std::move(stack[i]).toTensor() : Tensor());
  return grads;
}

/// The same by the formula, where the gradients are differentiated, mapped or carry tangents.
variable_list gradients_by_formula(const Fused& op, const Tensor& grad, at::TensorList tensors, const Options& options,
                                   const c10::List<bool>& needed) {
  const py::gil_scoped_acquire gil;
  py::list args, flags;
  for (const Tensor& t : tensors) args.append(t.defined() ? py::cast(t) : py::none());
  for (const c10::IValue& option : options) args.append(torch::jit::toPyObject(option));
  for (const bool need : needed) flags.append(need);
  variable_list grads;
  for (const py::handle g : op.formula(args, grad, flags)) {
    grads.push_back(g.is_none() ? Tensor() : THPVariable_Unpack(g.ptr()));
  }
  return grads;
}

/// Whether somebody may ask for derivatives of what is computed now, or sees it as a tensor of another kind.
bool observed() {
  return at::GradMode::is_enabled() ||
         c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr;
}

variable_list without_missing(at::TensorList tensors) {
  variable_list there;
  there.reserve(tensors.size());
  for (const Tensor& t : tensors) {
    if (t.defined()) there.push_back(t);
  }
  return there;
}

/// The graph has an edge for each tensor that is there; of `tensors`, some may be missing.
struct FusedFunction : torch::autograd::Function<FusedFunction> {
  static Tensor forward(torch::autograd::AutogradContext* ctx, at::TensorList, const Fused* op,
                        const variable_list& tensors, const Options& options) {
    ctx->save_for_backward(tensors);
    ctx->saved_data["op"] = reinterpret_cast<int64_t>(op);
    if (!options.empty()) ctx->saved_data["options"] = c10::ivalue::Tuple::create(options);
    return call(*op, tensors, options);
  }

  static variable_list backward(torch::autograd::AutogradContext* ctx, const variable_list& grads) {
    const auto& op = *reinterpret_cast<const Fused*>(ctx->saved_data["op"].toInt());
    const auto saved = ctx->saved_data.find("options");
    const Options options = saved == ctx->saved_data.end() ? Options() : saved->second.toTupleRef().elements().vec();
    const variable_list tensors = ctx->get_saved_variables();
    std::vector<size_t> edge(tensors.size());
    size_t edges = 0;
    for (size_t i = 0; i < tensors.size(); ++i) {
      edge[i] = edges;
      edges += tensors[i].defined();
    }
    c10::List<bool> needed;
    for (const size_t i : op.differentiable) needed.push_back(tensors[i].defined() && ctx->needs_input_grad(edge[i]));
    const auto compute = observed() ? gradients_by_formula : gradients;
    variable_list found = compute(op, grads[0], tensors, options, needed);
    variable_list results(edges + 3);  // none for `op`, `tensors` and `options`
    for (size_t i = 0; i < found.size(); ++i) {
      if (needed[i]) results[edge[op.differentiable[i]]] = std::move(found[i]);
    }
    return results;
  }
};

Tensor apply(const Fused& op, const variable_list& tensors, const Options& options) {
  bool derivable = false;
  if (at::GradMode::is_enabled()) {
    for (const Tensor& t : tensors) derivable |= t.defined() && t.requires_grad();
  }
  if (!derivable) return call(op, tensors, options);
  return FusedFunction::apply(at::TensorList(without_missing(tensors)), &op, tensors, options);
}

Tensor call_from_python(const Fused& op, const py::args& args) {
  const auto& arguments = op.forward.schema().arguments();
  TORCH_CHECK_TYPE(args.size() <= arguments.size(), op.forward.schema().name(), ": expected at most ", arguments.size(),
                   " arguments, got ", args.size());
  variable_list tensors;
  Options options;
  tensors.reserve(args.size());
  for (size_t i = 0; i < args.size(); ++i) {
    const py::handle arg = args[i];
    if (arg.is_none()) {
      tensors.emplace_back();
    } else if (THPVariable_Check(arg.ptr())) {
      tensors.push_back(at::functorch::unwrapIfDead(THPVariable_Unpack(arg.ptr())));  // escaped from a transform
    } else {
      options.push_back(torch::jit::toIValue(arg, arguments[i].type()));
    }
  }
  tensors.resize(arguments.size() - options.size());  // those left out are missing
  const py::gil_scoped_release no_gil;
  return apply(op, tensors, options);
}

py::cpp_function fused_function(const std::string& name, std::vector<size_t> differentiable, py::object formula) {
  auto& dispatcher = c10::Dispatcher::singleton();
  // Never freed: a graph may outlive the interpreter's modules.
  const auto* const op = new Fused{dispatcher.findSchemaOrThrow(name.c_str(), ""),
                                   dispatcher.findSchemaOrThrow((name + "_backward").c_str(), ""),
                                   std::move(differentiable), std::move(formula)};
  return [op](const py::args& args) {
    HANDLE_TH_ERRORS
    return call_from_python(*op, args);
    END_HANDLE_TH_ERRORS_PYBIND
  };
}

}  // namespace

void define_fused_function(py::module_& m) {
  m.def("fused_function", &fused_function, py::arg("name"), py::arg("differentiable"), py::arg("formula"),
        "A function that calls an op and, if asked, its fused gradient: of the arguments at the positions "
        "`differentiable`. Where that gradient is differentiated in turn, `formula` takes its place: (arguments, grad, "
        "needed) -> gradients, None where not needed.");
}

}  // namespace neuromod
