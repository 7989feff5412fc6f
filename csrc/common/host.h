// What the torch-facing host functions share: from a tensor to a View, from a call to the kernel of its device.
// One host function serves every backend: it checks, allocates, fills the params and calls
// run(op, device, NEUROMOD_KERNEL(stem), params).
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include <algorithm>
#include <type_traits>

#include "common/checks.h"
#include "common/huge_pages.h"
#include "common/params.h"

// NEUROMOD_KERNEL(stem): the CPU kernel and the CUDA launcher of an op, as far as this library has them. The library of
// CUDA kernels compiled for the emulator registers the same ops, on CPU tensors, under another name.
// NEUROMOD_CUDA_KERNEL(stem): the same of a kernel that the CPU has no use for.
#if defined(NEUROMOD_EMULATED)
#define NEUROMOD_LIBRARY neuromod_emulated
#define NEUROMOD_KERNEL(stem) nullptr, &launch_##stem
#define NEUROMOD_CUDA_KERNEL(stem) nullptr, &launch_##stem
#elif defined(NEUROMOD_CUDA)
#define NEUROMOD_LIBRARY neuromod_ext
#define NEUROMOD_KERNEL(stem) &stem##_cpu, &launch_##stem
#define NEUROMOD_CUDA_KERNEL(stem) nullptr, &launch_##stem
#else
#define NEUROMOD_LIBRARY neuromod_ext
#define NEUROMOD_KERNEL(stem) &stem##_cpu, nullptr
#define NEUROMOD_CUDA_KERNEL(stem) nullptr, nullptr
#endif

/// Registers a host function for the op of the same name on every device this library serves.
#define NEUROMOD_IMPL(name, host)                                                  \
  TORCH_LIBRARY_IMPL(NEUROMOD_LIBRARY, CPU, library) { library.impl(name, host); } \
  TORCH_LIBRARY_IMPL(NEUROMOD_LIBRARY, CUDA, library) { library.impl(name, host); }

/// An op that writes an argument in place sees negations that are pending: torch would carry them out in a copy, and
/// expects the op to return what it wrote.
#define NEUROMOD_IMPL_IN_PLACE(name, host) \
  NEUROMOD_IMPL(name, host)                \
  TORCH_LIBRARY_IMPL(NEUROMOD_LIBRARY, Negative, library) { library.impl(name, torch::CppFunction::makeFallthrough()); }

namespace neuromod {

const char* cuda_error_string(int status);  // defined beside the CUDA kernels (common/device.cu)

/// torch's current stream on `device`, read through the device-generic guard: no symbol of a CUDA build of torch is
/// needed, so one binary serves every torch.
inline stream_t current_stream(c10::Device device) {
  const c10::impl::VirtualGuardImpl guard(device.type());
  return static_cast<stream_t>(guard.getStreamNativeHandle(guard.getStream(device)));
}

/// Runs an op's kernel on the device of its tensors; called as run(op, device, NEUROMOD_KERNEL(stem), params).
template <class Params>
void run(const char* op, c10::Device device, std::common_type_t<void (*)(const Params&)> cpu,
         std::common_type_t<int (*)(const Params&, stream_t)> cuda, const Params& params) {
#if defined(NEUROMOD_EMULATED)
  (void)cpu, (void)device;
  const int status = cuda(params, nullptr);
  TORCH_CHECK(status == 0, op, ": the emulated launch failed with status ", status);
#else
  if (device.is_cpu()) return cpu(params);
  TORCH_CHECK_NOT_IMPLEMENTED(cuda != nullptr, op,
                              ": expected tensors on the CPU (this build has no CUDA kernels), got ", device.str(),
                              "; rebuild where nvcc is found, with NEUROMOD_CUDA=1");
#if defined(NEUROMOD_CUDA)
  const c10::DeviceGuard guard(device);
  const int status = cuda(params, current_stream(device));
  TORCH_CHECK(status == 0, op, ": the CUDA launch failed: ", cuda_error_string(status));
#endif
#endif
}

/// Tells autograd that a saved tensor is no longer what it was.
inline void mark_written(const at::Tensor& t) {
  if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
}

/// Whether kernels for tensors on `device` are CUDA kernels, emulated ones included.
inline bool runs_cuda_kernels([[maybe_unused]] c10::Device device) {
#if defined(NEUROMOD_EMULATED)
  return true;
#else
  return !device.is_cpu();
#endif
}

/// A fresh result; a large one on the CPU in huge pages, which spares most of the cost of touching it first.
inline at::Tensor empty_result(at::IntArrayRef sizes, at::TensorOptions options) {
  const at::Tensor t = at::empty(sizes, options);
  if (t.is_cpu() && t.nbytes() >= size_t(4) << 20) advise_huge_pages(t.mutable_data_ptr(), t.nbytes());
  return t;
}

/// A view of up to three dimensions that a kernel reads. `t` must outlive it.
inline View view(const at::Tensor& t) {
  View v;
  // One struct serves all contractions of a form, so its pointers are mutable; kernels write what their header names.
  v.data = const_cast<void*>(t.const_data_ptr());
  for (int64_t d = 0; d < t.dim(); ++d) v.stride[d] = t.stride(d);
  return v;
}

/// A view of up to three dimensions that a kernel writes.
inline View mutable_view(const at::Tensor& t) {
  View v = view(t);
  v.data = t.mutable_data_ptr();
  return v;
}

/// [K, n...] as a matrix whose rows are dense; copied only where they are not.
inline at::Tensor as_rows(const at::Tensor& t) {
  const at::Tensor rows = t.reshape({t.size(0), t.numel() / std::max<int64_t>(t.size(0), 1)});
  return rows.size(1) <= 1 || rows.stride(1) == 1 ? rows : rows.contiguous();
}

}  // namespace neuromod
