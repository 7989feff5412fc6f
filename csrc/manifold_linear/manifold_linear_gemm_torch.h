// Plans expand_gemm and fold_gemm of manifold_linear on CUDA: torch's matrix products (cuBLAS there), between our
// kernels. The same code runs on the CPU's tensors in the emulated library, with torch's products for the CPU.
#pragma once

#include <ATen/core/Tensor.h>

#include "manifold_linear/manifold_linear.h"

namespace neuromod {

/// The operands of a call, as its params see them; those that are not there are undefined.
struct ManifoldLinearTensors {
  at::Tensor input, output;  // [B T, I], [B T, O], rows dense and apart
  at::Tensor basis, coeff, bias;
};

// Plan expand_gemm. y: the products x P_k^T of a chunk of rows, stored, are mixed by a kernel. dx: a kernel stores c g
// for all k, which are multiplied with P as a [K O, I] matrix. dP (+=, if `accumulate`): for each k, c_k g is stored
// and multiplied with x. What is stored is rounded to the dtype.
void expand_gemm_forward(const char* op, const ManifoldLinearTensors& t, const ManifoldLinearParams& p);
void expand_gemm_grad_input(const char* op, const ManifoldLinearTensors& t, const ManifoldLinearParams& p,
                            const at::Tensor& grad_input);
void expand_gemm_grad_basis(const char* op, const ManifoldLinearTensors& t, const ManifoldLinearParams& p,
                            const at::Tensor& grad_basis, bool accumulate);

// Plan fold_gemm: the weights of a chunk of samples, blended and stored, times their rows.
void fold_gemm_forward(const char* op, const ManifoldLinearTensors& t, const ManifoldLinearParams& p);
void fold_gemm_grad_input(const char* op, const ManifoldLinearTensors& t, const ManifoldLinearParams& p,
                          const at::Tensor& grad_input);

}  // namespace neuromod
