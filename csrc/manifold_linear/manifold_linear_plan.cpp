#include "manifold_linear/manifold_linear_plan.h"

#include <ATen/Context.h>
#include <c10/util/Exception.h>
#include <torch/version.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <map>
#include <utility>

#include "common/dtype_name.h"
#include "common/precision.h"
#include "common/processor.h"
#include "common/vector.h"
#include "manifold_linear/manifold_linear_cuda_plan.h"

namespace neuromod {
namespace {

// Seconds per element on one core, from benchmarks/speed/plan_costs.py and from which plan was the fastest of problems
// of many shapes. Only ratios matter, and these differ between three kinds of processors: measured on a Xeon with AMX,
// for which MKL is made; on an EPYC (Zen 5) with AVX-512 alone; and there, for processors without AVX-512, with all
// libraries kept from it.
struct Costs {
  double product;  // one multiply-add in plan expand, mixed
  double fold;     // the same in plan fold, whose products are stored as they come
  double gemm;     // the same by torch's matrix product
  double blend;    // one term of one element of a blended weight
  double spread;   // one term of one element of a sample's gradient, on its way to dP and dc
  double turn;     // one element of a blended weight, packed as a whole
  double dots;     // one multiply-add of rows of P with rows of x in plan stream, of long ones
  double stream;   // the same backward, of one row with one
  double pack;     // one element of P as the right operand of a product
  double read;     // one element of P from memory
  double call;     // of torch's matrix product
  double start;    // of plan expand, beside that
  double once;     // one element of P, packed for plan fold, or of dP, written by it
  double turned;   // one element of P, transposed as torch's matrix product packs it
  double packed;   // the same, packed as it lies
};

namespace xeon {
constexpr Costs float64{4.2e-11, 3.1e-11, 3.1e-11, 1.2e-10, 3.5e-10, 6.7e-10, 3e-11, 1.4e-10,
                        1.8e-11, 9.5e-11, 4.7e-6,  2.4e-6,  1.3e-9,  4.3e-10, 1e-10};
constexpr Costs float32{1.6e-11, 1.2e-11, 1.4e-11, 2.8e-11, 1.5e-10, 1.2e-10, 1.5e-11, 5e-11,
                        6.4e-11, 8.3e-11, 3.6e-6,  0,       4.7e-10, 3.7e-10, 4.5e-11};
constexpr Costs bfloat16{4.2e-12, 3.1e-12, 3e-12,  7.8e-11, 1.1e-10, 2.5e-10, 2.1e-11, 5.3e-11,
                         3.8e-10, 3.5e-11, 1.4e-5, 9.1e-6,  7.9e-10, 3.8e-10, 3.8e-10};
constexpr Costs float16{1.7e-11, 1.4e-11, 1.2e-11, 3.7e-11, 3.1e-10, 1.8e-10, 2.8e-11, 2.3e-11,
                        9e-13,   5.1e-11, 1.2e-5,  7.7e-6,  3.7e-10, 9e-13,   9e-13};
}  // namespace xeon

namespace epyc {
constexpr Costs float64{2.5e-11, 2.8e-11, 4.3e-11, 1.4e-10, 3.5e-10, 8e-10,   2.4e-11, 6.2e-11,
                        1.4e-10, 2e-10,   2e-6,    3e-6,    9e-10,   1.4e-10, 1.4e-10};
constexpr Costs float32{1.1e-11, 7.8e-12, 3.5e-11, 4.2e-11, 5.2e-11, 9.1e-11, 1.15e-11, 4.2e-11,
                        8e-11,   7.1e-11, 1.5e-6,  1e-6,    4.3e-10, 8e-11,   8e-11};
constexpr Costs pairs{5.8e-12, 4.6e-12, 7.5e-12, 3.2e-11, 9e-11,   8e-11,   1.9e-11, 2.2e-11,
                      8.5e-11, 5.7e-11, 1.5e-5,  1e-6,    3.1e-10, 8.5e-11, 8.5e-11};
constexpr Costs widened{1.4e-11, 1.2e-11, 9.7e-11, 1e-10, 1.1e-10, 3e-11,   4.2e-11, 8e-11,
                        3.2e-11, 6.3e-11, 9.4e-6,  1e-6,  5.3e-10, 3.2e-11, 3.2e-11};
}  // namespace epyc

namespace avx2 {
constexpr Costs float64{3.5e-11, 4.0e-11, 4.3e-11, 1.2e-10, 2.4e-10, 4e-10, 3.4e-11, 6.5e-11,
                        2e-10,   2.3e-10, 2.3e-6,  2.6e-6,  6e-10,   2e-10, 2e-10};
constexpr Costs float32{1.7e-11, 1.5e-11, 2.4e-11, 5e-11,  1.1e-10, 1.2e-10, 1.75e-11, 3.1e-11,
                        5e-11,   1.3e-10, 1e-6,    2.6e-6, 3.7e-10, 5e-11,   5e-11};
constexpr Costs widened{2.6e-11, 2.1e-11, 9.3e-11, 9e-11, 1.4e-10, 3.3e-10, 2.3e-11, 3e-11,
                        3e-11,   8e-11,   1e-5,    1e-6,  4.5e-10, 3e-11,   3e-11};
}  // namespace avx2

/// The kind of processor that this one is most like.
enum class Kind { xeon, epyc, avx2 };
Kind kind() {
  if (std::string(vector_set().isa) != "avx512") return Kind::avx2;
  return torch_product_outruns_tiles() ? Kind::xeon : Kind::epyc;
}

Costs costs(DType dtype) {
  const auto of_kind = [](const Costs& on_xeon, const Costs& on_epyc, const Costs& on_avx2) {
    return kind() == Kind::xeon ? on_xeon : kind() == Kind::epyc ? on_epyc : on_avx2;
  };
  switch (dtype) {
    case DType::float64:
      return of_kind(xeon::float64, epyc::float64, avx2::float64);
    case DType::float32:
      return of_kind(xeon::float32, epyc::float32, avx2::float32);
    case DType::bfloat16:
      if (half_tiles<BFloat16>() == HalfTiles::matrix_unit) return xeon::bfloat16;
      if (half_tiles<BFloat16>() == HalfTiles::pairs) return epyc::pairs;
      return of_kind(epyc::widened, epyc::widened, avx2::widened);
    case DType::float16:
      break;
  }
  return of_kind(xeon::float16, epyc::widened, avx2::widened);
}

constexpr double kAlign = 16;             // forward, few rows of a product take as long as so many
constexpr double kBackwardAlign = 8;      // backward, likewise
constexpr double kDotEnd = 64;            // multiply-adds in the time that it takes to end a dot product
constexpr double kDotLength = 512;        // of long ones, which are taken in pieces
constexpr int64_t kMostStreamRows = 8;    // backward, beyond which plan stream only repeats what it reads
constexpr double kLeastGemmRows = 8;      // two take MKL as long, but on a Xeon; one is another routine
constexpr int64_t kMostSlimRows = 32;     // that MKL adds to dP in one go
constexpr double kSlimBytes = 8 << 20;    // of dP, up to which it adds more rows in one go
constexpr double kMostBytes = 128 << 20;  // of a new dP, beyond which it never does
constexpr int64_t kMostPairRows = 256;    // beyond which torch's product of bfloat16 pairs is slower than tiles
constexpr Plan kPlans[] = {Plan::expand, Plan::fold, Plan::stream, Plan::fold_gemm, Plan::expand_gemm};

/// Whether torch's matrix product keeps the kernels' promise: full products, where torch's user has allowed it less in
/// float32, and one rounding, where a half type's bias would be rounded before it is added.
bool gemm_is_exact(const ManifoldLinearParams& p, Pass pass) {
  if (p.dtype == DType::float32) {
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 13
    const auto precision = at::globalContext().float32Precision(at::Float32Backend::MKLDNN, at::Float32Op::MATMUL);
    return precision != at::Float32Precision::BF16 && precision != at::Float32Precision::TF32;
#else
    return at::globalContext().float32MatmulPrecision() == at::Float32MatmulPrecision::HIGHEST;
#endif
  }
  return p.dtype == DType::float64 || pass != Pass::forward || !p.bias;
}

/// Whether a plan can be had for a problem.
bool possible(const ManifoldLinearParams& p, Pass pass, Plan plan) {
  switch (plan) {
    case Plan::fold_gemm:
      return gemm_is_exact(p, pass);
    case Plan::expand_gemm:
      if (p.dtype == DType::bfloat16)  // an update rounds what plan expand rounds; AMX multiplies tiles faster
        return half_tiles<BFloat16>() == HalfTiles::pairs && at::globalContext().userEnabledMkldnn() &&
               pass == Pass::update && p.tokens == 1 && !p.index && p.batch <= kMostPairRows;
      return p.dtype != DType::float16 && gemm_is_exact(p, pass) && (p.tokens == 1 || p.index);
    default:
      return true;
  }
}

/// Whether MKL writes dP more than once, as it does on a Xeon.
bool gemm_writes_twice(const ManifoldLinearParams& p, Pass pass) {
  const double bytes = double(p.num_basis * p.out_features * p.in_features) * (p.dtype == DType::float64 ? 8 : 4);
  if (kind() != Kind::xeon || p.index || bytes <= kSlimBytes) return false;
  return p.rows() > kMostSlimRows || (pass == Pass::backward && bytes > kMostBytes);
}

double multiplied_by_gemm(double rows) {
  return rows <= 1 || kind() == Kind::xeon ? rows : std::max(rows, kLeastGemmRows);
}

double seconds(const ManifoldLinearParams& p, Pass pass, Plan plan) {
  const Costs cost = costs(p.dtype);
  const bool backward = pass != Pass::forward, update = pass == Pass::update;
  const double products = pass == Pass::backward ? 2 : 1;
  const double terms = double(p.num_local), samples = double(p.batch), rows = double(p.rows());
  const double points = std::min(samples * terms, double(p.num_basis));          // basis points that act on any sample
  double element = points * cost.read;                                           // for each element of a weight
  const double segment_calls = p.index ? products * points * cost.call / 4 : 0;  // small products, side by side
  const double length = std::clamp(double(p.in_features), 1.0, kDotLength);
  double once = 0;
  switch (plan) {
    case Plan::expand: {
      const double segments = p.index ? std::clamp(samples, 1.0, double(p.num_basis)) : 1;
      const double each = rows / segments, align = backward ? kBackwardAlign : kAlign;
      const double multiplied = segments * (p.index ? each + kAlign / 2 : std::ceil(each / align) * align) * terms;
      element += products * multiplied * cost.product + (backward ? points * cost.pack : 0);
      if (update) element += points * cost.read;  // once more, tile by tile
      once = cost.start / (backward ? 4 : 1) + segment_calls;
      break;
    }
    case Plan::fold:
      element += products * rows * cost.fold + (backward ? points * cost.once : 0);
      if (!update) element += samples < points ? samples * cost.turn : points * cost.once;
      element += samples * terms * (cost.blend + (backward ? cost.spread : 0));
      break;
    case Plan::stream:
      // Backward, three walks, two of which write; an update only mixes rows.
      element += rows * terms * (!backward ? cost.dots * (1 + kDotEnd / length) : (update ? 0.4 : 6) * cost.stream);
      break;
    case Plan::fold_gemm:
      element += rows * (update ? cost.fold : cost.gemm + (backward ? cost.fold : 0));
      element += samples * (terms * (cost.blend + (backward ? cost.spread : 0)) + cost.turn);
      element += backward ? points * cost.once : 0;
      once = samples * std::ceil(double(backward ? p.in_features : p.out_features) / 256) * cost.call;
      break;
    case Plan::expand_gemm:
      if (p.dtype == DType::bfloat16) {  // an update
        element += rows * terms * cost.product;
        once = 3 * cost.call;
        break;
      }
      element += products * multiplied_by_gemm(rows) * terms * cost.gemm;
      element += points * (backward ? products * cost.packed : cost.turned);
      if (backward && gemm_writes_twice(p, pass)) element += points * cost.once;
      once = segment_calls;
      break;
  }
  return element * double(p.out_features) * double(p.in_features) + once;
}

}  // namespace

const char* plan_name(Plan plan) {
  switch (plan) {
    case Plan::expand:
      return "expand";
    case Plan::fold:
      return "fold";
    case Plan::fold_gemm:
      return "fold_gemm";
    case Plan::expand_gemm:
      return "expand_gemm";
    case Plan::stream:
      break;
  }
  return "stream";
}

std::vector<PlanCost> plan_costs(const ManifoldLinearParams& p, Pass pass) {
  std::vector<PlanCost> plans;
  for (const Plan plan : kPlans) {
    if (plan == Plan::stream && pass != Pass::forward && p.rows() > kMostStreamRows) continue;
    if (!possible(p, pass, plan)) continue;
    plans.push_back({plan, seconds(p, pass, plan)});
  }
  std::stable_sort(plans.begin(), plans.end(), [](const auto& a, const auto& b) { return a.seconds < b.seconds; });
  return plans;
}

using Passes = std::map<std::string, std::vector<std::pair<std::string, double>>>;

Passes explain_cuda(ManifoldLinearParams& p) {
  p.tf32 = p.dtype == DType::float32 && tf32_allowed();
  const std::pair<const char*, CudaPass> names[] = {{"forward", CudaPass::forward},
                                                    {"grad_input", CudaPass::rows},
                                                    {"grad_basis", CudaPass::basis},
                                                    {"grad_input + grad_coeff", CudaPass::rows_and_dots},
                                                    {"grad_basis + grad_coeff", CudaPass::basis_and_dots}};
  Passes passes;
  for (const auto& [name, pass] : names) {
    auto& plans = passes[name];
    for (const auto& [plan, seconds] : cuda_plan_costs(p, pass, true))
      plans.emplace_back(cuda_plan_name(plan), seconds);
    const std::string taken = cuda_plan_name(cuda_plan(p, pass, true));
    std::stable_partition(plans.begin(), plans.end(), [&](const auto& each) { return each.first == taken; });
  }
  return passes;
}

/// See module.cpp. The plan that is forced stands first.
Passes explain_manifold_linear(const std::string& device, const std::string& dtype, int64_t batch, int64_t tokens,
                               int64_t num_basis, int64_t num_local, int64_t out_features, int64_t in_features) {
  ManifoldLinearParams p{};
  p.dtype = dtype_from_name("explain", dtype);
  p.batch = batch, p.tokens = tokens, p.num_basis = num_basis, p.num_local = num_local > 0 ? num_local : num_basis;
  p.out_features = out_features, p.in_features = in_features;
  int64_t anywhere = 0;
  if (num_local > 0) p.index.data = &anywhere;
  TORCH_CHECK_VALUE(device == "cpu" || device == "cuda", "explain: expected device cpu or cuda, got ", device);
  if (device == "cuda") return explain_cuda(p);
  Passes passes;
  const std::pair<const char*, Pass> names[] = {
      {"forward", Pass::forward}, {"backward", Pass::backward}, {"update", Pass::update}};
  for (const auto& [name, pass] : names) {
    auto& plans = passes[name];
    const Plan chosen = choose_plan(p, pass);
    plans.emplace_back(plan_name(chosen), seconds(p, pass, chosen));
    for (const auto& [plan, seconds] : plan_costs(p, pass))
      if (plan != chosen) plans.emplace_back(plan_name(plan), seconds);
  }
  return passes;
}

Plan choose_plan(const ManifoldLinearParams& p, Pass pass) {
  if (const char* const forced = std::getenv("NEUROMOD_PLAN")) {
    for (const Plan plan : kPlans)
      if (std::string(forced) == plan_name(plan)) {
        if (possible(p, pass, plan)) return plan;
        return plan == Plan::fold_gemm ? Plan::fold : Plan::expand;
      }
    TORCH_CHECK_VALUE(
        forced[0] == '\0',
        "manifold_linear: expected NEUROMOD_PLAN to be expand, fold, stream, fold_gemm or expand_gemm, got ", forced,
        "; unset it");
  }
  return plan_costs(p, pass).front().plan;
}

}  // namespace neuromod
