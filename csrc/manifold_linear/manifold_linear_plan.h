// Which way the CPU kernels of manifold_linear go about a problem, and why.
#pragma once

#include <string>
#include <vector>

#include "manifold_linear/manifold_linear.h"

namespace neuromod {

/// How the work is arranged.
enum class Plan : int8_t {
  expand,       ///< every basis point's product with every row, mixed while in cache: L times the plain layer's work
  fold,         ///< each sample's weight, blended while in cache, times its rows: once the plain layer's work
  stream,       ///< P row by row, read once: few rows
  fold_gemm,    ///< fold with torch's matrix product of large blocks instead of tiles: very many tokens
  expand_gemm,  ///< expand with torch's matrix product of all rows, once scaled: large layers
};

enum class Pass : int8_t {
  forward,
  backward,
  update,  ///< the gradient of P alone, added to what stands there
};

struct PlanCost {
  Plan plan;
  double seconds;  // on one thread, by the cost model
};

/// The cost of every plan, cheapest first; from sizes, and what precision torch's matrix product has.
std::vector<PlanCost> plan_costs(const ManifoldLinearParams& p, Pass pass);

/// The cheapest plan, or the one the environment variable NEUROMOD_PLAN names; fold or expand where torch's product in
/// their place would be less exact, or cannot take the problem.
Plan choose_plan(const ManifoldLinearParams& p, Pass pass);

const char* plan_name(Plan plan);

// Plans fold and fold_gemm.
void manifold_linear_fold_forward(const ManifoldLinearParams& p, Plan plan);
void manifold_linear_fold_backward(const ManifoldLinearBackwardParams& q, Plan plan);
void manifold_linear_fold_outer(const ManifoldLinearBackwardParams& q);  // all but grad_input

// Plan expand_gemm, and what it is with local support.
void manifold_linear_expand_gemm_forward(const ManifoldLinearParams& p);
void manifold_linear_expand_gemm_backward(const ManifoldLinearBackwardParams& q);
void manifold_linear_segment_gemm_forward(const ManifoldLinearParams& p);
void manifold_linear_segment_gemm_backward(const ManifoldLinearBackwardParams& q);

}  // namespace neuromod
