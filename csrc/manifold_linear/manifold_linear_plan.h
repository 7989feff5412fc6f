// Which way the CPU kernels of manifold_linear go about a problem, and why.
#pragma once

#include <string>
#include <vector>

#include "manifold_linear/manifold_linear.h"

namespace neuromod {

/// How the work is arranged.
enum class Plan : int8_t {
  expand,  ///< every basis point's product with every row, mixed while in cache: L times the plain layer's work
  fold,    ///< each sample's weight, blended while in cache, times its rows: once the plain layer's work
  stream,  ///< P row by row, read once: few rows
};

enum class Pass : int8_t { forward, backward };

struct PlanCost {
  Plan plan;
  double seconds;  // on one thread, by the cost model
};

/// The cost of every plan, cheapest first; from sizes alone.
std::vector<PlanCost> plan_costs(const ManifoldLinearParams& p, Pass pass);

/// The cheapest plan, or the one the environment variable NEUROMOD_PLAN names.
Plan choose_plan(const ManifoldLinearParams& p, Pass pass);

const char* plan_name(Plan plan);

}  // namespace neuromod
