#include "manifold_linear/manifold_linear_cuda_plan.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "manifold_linear/manifold_linear_segments.h"

namespace neuromod {
namespace {

// What the costs are made of. Predicted, not measured: an H100 SXM's published rates, of which tensor-core kernels by
// mma.sync reach about two thirds of what cuBLAS does by wgmma. benchmarks/speed/cuda_plan_costs.py measures them on a
// card. Choices depend on ratios, and must not differ between cards, so there is one table.
constexpr double kProcessors = 132;     // multiprocessors
constexpr double kMemory = 3.0e12;      // bytes a second, in a copy
constexpr double kGemmMemory = 2.6e12;  // of torch's product of few rows
constexpr double kL2 = 5.5e12;          // bytes a second
constexpr double kBlend = 5e12;   // terms of elements a second that are widened, multiplied and added in registers
constexpr double kLaunch = 2e-6;  // seconds of a kernel that does nothing
constexpr double kCall = 4e-6;    // of torch's product
struct Rates {
  double simt, tile, gemm;  // flop a second: plain kernels, tiles (fold too), torch's product
};
constexpr Rates kFloat64{3e12, 0, 50e12};
constexpr Rates kFloat32{8e12, 35e12, 48e12};
constexpr Rates kTf32{8e12, 250e12, 380e12};
constexpr Rates kHalf{8e12, 520e12, 790e12};

constexpr int64_t kBlocks = 128;           // about the multiprocessors of a large card: splits aim at so many
constexpr int64_t kCached = 32 << 20;      // bytes between torch's products and our kernels that stay in L2
constexpr int64_t kTemporary = 128 << 20;  // and as many as there may be of rows, where few make products inefficient

Rates rates(const ManifoldLinearParams& p) {
  if (p.dtype == DType::float64) return kFloat64;
  if (p.dtype == DType::float32) return p.tf32 ? kTf32 : kFloat32;
  return kHalf;
}

bool empty(const ManifoldLinearParams& p) { return p.rows() == 0 || p.out_features == 0 || p.in_features == 0; }

/// A product in tiles of a plan: splits until a card is full (twice over with small tiles, four times where P is read
/// once and only its bandwidth counts), but at least four slices each.
CudaProduct tiled(CudaPlan plan, int64_t rows, int64_t cols, int64_t steps, int64_t batches) {
  constexpr int64_t kLeastSteps = 4, kMostSplits = 16;
  const int64_t side = plan == CudaPlan::large ? 128 : 64;
  CudaProduct product{plan, ceil_div(rows, side), ceil_div(cols, side), 1};
  if (plan != CudaPlan::small && plan != CudaPlan::large) return product;
  const int64_t wanted = plan == CudaPlan::large ? kBlocks : rows <= side ? 4 * kBlocks : 2 * kBlocks;
  const int64_t tiles = std::max<int64_t>(product.tiles_down * product.tiles_across * batches, 1);
  product.splits = std::clamp(std::min(wanted / tiles, steps / kLeastSteps), int64_t(1), kMostSplits);
  return product;
}

/// y or dx (and dc): the product of each basis point that a tile meets over the whole depth, one after another.
int64_t mix_steps(const ManifoldLinearParams& p, int64_t depth) {
  return cuda_basis_met(p) * ceil_div(depth, slice_depth(p.dtype));
}

/// The product of one pass in tiles: its result is `batches` matrices of rows x cols, from `steps` slices.
struct Shape {
  int64_t rows, cols, steps, batches;
};
Shape shape(const ManifoldLinearParams& p, CudaPass pass) {
  switch (pass) {
    case CudaPass::forward:
      return {p.rows(), p.out_features, mix_steps(p, p.in_features), 1};
    case CudaPass::rows:
    case CudaPass::rows_and_dots:
      return {p.rows(), p.in_features, mix_steps(p, p.out_features), 1};
    default:
      break;
  }
  const int64_t rows = cuda_basis_met(p) < p.num_basis ? ceil_div(p.rows() * p.num_local, p.num_basis) : p.rows();
  return {p.out_features, p.in_features, ceil_div(rows, slice_depth(p.dtype)), p.num_basis};
}
CudaProduct tiled(const ManifoldLinearParams& p, CudaPass pass, CudaPlan plan) {
  const Shape s = shape(p, pass);
  return tiled(plan, s.rows, s.cols, s.steps, s.batches);
}

/// Seconds of `blocks` equal blocks, of which each multiprocessor works on `together` at a time to be at its best.
double on_card(double blocks, double together, double flop, double l2_bytes, double flop_rate) {
  const double turns = std::max(std::ceil(blocks / kProcessors), together);
  return turns * kProcessors * std::max(flop / flop_rate, l2_bytes / kL2);
}

/// What must be read and written at least.
double least_bytes(const ManifoldLinearParams& p) {
  const double R = double(p.rows()), O = double(p.out_features), I = double(p.in_features);
  return (double(p.num_basis) * O * I + R * (O + I)) * double(element_bytes(p.dtype));
}

double tile_seconds(const ManifoldLinearParams& p, CudaPass pass, CudaPlan plan) {
  const Shape s = shape(p, pass);
  if (plan == CudaPlan::simt) {
    const double flop = 2.0 * double(p.rows()) * double(p.num_basis) * double(p.out_features) * double(p.in_features);
    const double blocks = double(ceil_div(s.rows, 64) * ceil_div(s.cols, 64) * s.batches);
    const double passes = pass == CudaPass::rows_and_dots ? 2 : 1;
    const double seconds = flop / rates(p).simt * std::max(1.0, 2 * kProcessors / blocks);
    return passes * (std::max(seconds, least_bytes(p) / kMemory) + kLaunch);
  }
  const CudaProduct product = tiled(p, pass, plan);
  const bool large = plan == CudaPlan::large;
  const double side = large ? 128 : 64, steps = std::ceil(double(s.steps) / double(product.splits));
  const double blocks = double(product.tiles_down * product.tiles_across * product.splits * s.batches);
  const double flop = 2 * side * side * double(slice_depth(p.dtype)) * steps;
  double seconds = on_card(blocks, large ? 1 : 2, flop, 2 * side * 64 * steps, rates(p).tile);
  seconds = std::max(seconds, least_bytes(p) / kMemory) + kLaunch;
  if (product.splits > 1) seconds += 8 * double(product.splits * s.rows * s.cols * s.batches) / kL2 + kLaunch;
  return pass == CudaPass::rows_and_dots ? seconds + kLaunch : seconds;
}

/// torch's product of `count` times [m, depth] by [depth, n], in tiles of 128 x 256 or, where those are few, smaller.
double gemm_seconds(const ManifoldLinearParams& p, double count, double m, double n, double depth) {
  const double tiles = count * std::ceil(m / 128) * std::ceil(n / 256), turns = tiles / kProcessors;
  const double small = count * std::ceil(m / 64) * std::ceil(n / 64);
  const double full = turns >= 1 ? turns / std::ceil(turns) : std::min(1.0, small / (2 * kProcessors));
  const double padded = turns >= 1 ? tiles * 128 * 256 : small * 64 * 64;
  const double bytes = count * (m * depth + depth * n + m * n) * double(element_bytes(p.dtype));
  return std::max(2 * padded * depth / (rates(p).gemm * full), bytes / kGemmMemory) + kCall;
}

double expand_gemm_seconds(const ManifoldLinearParams& p, CudaPass pass) {
  const double K = double(p.num_basis), O = double(p.out_features), I = double(p.in_features);
  const double bytes = double(element_bytes(p.dtype));
  if (pass == CudaPass::basis) {  // one basis point after another
    const double R = double(p.rows());
    return K * (2 * R * O * bytes / (R * O * bytes > kCached ? kMemory : kL2) + kLaunch + gemm_seconds(p, 1, O, I, R));
  }
  const double rows = double(cuda_expand_gemm_rows(p, p.out_features)), chunks = double(p.rows()) / rows;
  const double product =
      pass == CudaPass::forward ? gemm_seconds(p, 1, rows, K * O, I) : gemm_seconds(p, 1, rows, I, K * O);
  return std::ceil(chunks) *
         (kLaunch + product + rows * O * (K + 1) * bytes / (rows * O * K * bytes > kCached ? kMemory : kL2));
}

/// Plan fold: y or dx.
double fold_seconds(const ManifoldLinearParams& p, CudaPass pass) {
  const bool forward = pass == CudaPass::forward;
  const double cols = double(forward ? p.out_features : p.in_features),
               depth = double(forward ? p.in_features : p.out_features);
  const double L = double(p.num_local), down = double(fold_tokens(p)), across = down == 64 ? 64 : 128;
  const double blocks = double(p.batch) * std::ceil(double(p.tokens) / down) * std::ceil(cols / across);
  const double slices = std::ceil(depth / 32), together = down == 64 ? 2 : 1;
  const double product =
      on_card(blocks, together, 2 * down * across * 32 * slices, (down + L * across) * 64 * slices, rates(p).tile);
  const double blend = on_card(blocks, together, L * across * 32 * slices, 0, kBlend);
  return std::max(product + blend, least_bytes(p) / kMemory) + kLaunch;
}

/// Plan fold: dP and dc.
double fold_outer_seconds(const ManifoldLinearParams& p) {
  const CudaProduct product = cuda_fold_outer(p);
  const double groups = std::ceil(double(p.num_basis) / kFoldOuterGroup), tile = kFoldOuterRows * kFoldOuterCols;
  const double blocks = double(product.tiles_down * product.tiles_across * product.splits) * groups;
  const double samples = std::ceil(double(p.batch) / double(product.splits)), slices = std::ceil(double(p.tokens) / 32);
  const double bytes = (kFoldOuterRows + kFoldOuterCols) * 64 * slices;
  double seconds = on_card(blocks, 1, 2 * tile * 32 * slices * samples, bytes * samples, rates(p).tile);
  seconds += on_card(blocks, 1, kFoldOuterGroup * tile * samples, 0, kBlend);
  const double partial = 8 * double(product.splits * p.num_basis * p.out_features * p.in_features) / kL2;
  return std::max(seconds, least_bytes(p) / kMemory) + kLaunch + (product.splits > 1 ? partial + kLaunch : 0);
}

/// Plan fold_gemm: y or dx.
double fold_gemm_seconds(const ManifoldLinearParams& p, CudaPass pass) {
  const double O = double(p.out_features), I = double(p.in_features), T = double(p.tokens);
  const double samples = double(cuda_fold_gemm_samples(p)), chunks = std::ceil(double(p.batch) / samples);
  const double blend = (samples + double(p.num_basis)) * O * I * double(element_bytes(p.dtype)) / kL2 + kLaunch;
  const bool forward = pass == CudaPass::forward;
  return chunks * (blend + gemm_seconds(p, samples, T, forward ? O : I, forward ? I : O));
}

double seconds(const ManifoldLinearParams& p, CudaPass pass, CudaPlan plan) {
  switch (plan) {
    case CudaPlan::expand_gemm:
      return expand_gemm_seconds(p, pass);
    case CudaPlan::fold:
      return pass == CudaPass::forward || pass == CudaPass::rows ? fold_seconds(p, pass) : fold_outer_seconds(p);
    case CudaPlan::fold_gemm:
      return fold_gemm_seconds(p, pass);
    default:
      return tile_seconds(p, pass, plan);
  }
}

/// Whether a plan can run a pass. dc is a sum of float32's precision, which no stored product of a 16-bit dtype has;
/// float16 might not hold the products that plan expand_gemm stores; basis points that do not act on a sample must not
/// touch it, where an index says so.
bool can_run(const ManifoldLinearParams& p, CudaPass pass, CudaPlan plan) {
  const bool dots = pass == CudaPass::rows_and_dots || pass == CudaPass::basis_and_dots;
  switch (plan) {
    case CudaPlan::simt:
      return pass != CudaPass::basis_and_dots;
    case CudaPlan::small:
    case CudaPlan::large:
      return pass != CudaPass::basis_and_dots && p.dtype != DType::float64 && !empty(p);
    case CudaPlan::fold:
      return is_half(p.dtype) && p.num_local <= kMostFolded && pass != CudaPass::rows_and_dots && !empty(p);
    case CudaPlan::expand_gemm:
      return !dots && !p.index && !empty(p) && (pass != CudaPass::forward || p.dtype != DType::float16);
    case CudaPlan::fold_gemm:
      break;
  }
  return (pass == CudaPass::forward || pass == CudaPass::rows) && !p.index && !empty(p);
}

constexpr CudaPlan kPlans[] = {CudaPlan::simt, CudaPlan::small,       CudaPlan::large,
                               CudaPlan::fold, CudaPlan::expand_gemm, CudaPlan::fold_gemm};
bool is_torch(CudaPlan plan) { return plan == CudaPlan::expand_gemm || plan == CudaPlan::fold_gemm; }

/// The plan a pass gets, and its cost, 0 for a forced one. Where the forced one cannot, the cheapest: for plan
/// fold_gemm that which folds, for kernels' plans one of kernels.
CudaPlanCost best(const ManifoldLinearParams& p, CudaPass pass, bool torch) {
  if (CudaPlan forced{}; forced_cuda_plan(forced)) {
    if (can_run(p, pass, forced) && (torch || !is_torch(forced))) return {forced, 0};
    if (forced == CudaPlan::fold_gemm && can_run(p, pass, CudaPlan::fold)) return {CudaPlan::fold, 0};
    torch = torch && is_torch(forced);
  }
  const auto plans = cuda_plan_costs(p, pass, torch);
  return plans.empty() ? CudaPlanCost{CudaPlan::simt, INFINITY} : plans.front();
}

int64_t partial_elements(const CudaProduct& product, int64_t rows, int64_t cols) {
  return product.splits > 1 ? product.splits * rows * partial_cols(cols) : 0;
}

/// Bytes of partial sums that launch_manifold_linear_backward needs: its kernels run one after another and share them.
int64_t partial_bytes(const ManifoldLinearBackwardParams& q) {
  const ManifoldLinearParams& p = q.p;
  const CudaBackwardPlan plan = cuda_backward_plan(q, false);
  int64_t elements = 0;
  if (q.grad_input && plan.rows != CudaPlan::fold)
    elements = partial_elements(cuda_grad_rows(p, plan.rows), p.rows(), p.in_features);
  if (q.grad_basis) {
    const CudaProduct product = plan.basis == CudaPlan::fold ? cuda_fold_outer(p) : cuda_grad_basis(p, plan.basis);
    elements = std::max(elements, partial_elements(product, p.num_basis * p.out_features, p.in_features));
  }
  int64_t bytes = 4 * elements;
  if (const int64_t splits = cuda_bias_splits(p); q.grad_bias && splits > 1)
    bytes = std::max(bytes, splits * p.num_basis * p.out_features * (p.dtype == DType::float64 ? 8 : 4));
  return ceil_div(bytes, 16) * 16;
}

}  // namespace

const char* cuda_plan_name(CudaPlan plan) {
  constexpr const char* names[] = {"simt", "small", "large", "fold", "expand_gemm", "fold_gemm"};
  return names[static_cast<int>(plan)];
}

bool forced_cuda_plan(CudaPlan& plan) {
  const char* const name = std::getenv("NEUROMOD_CUDA_PLAN");
  if (!name) return false;
  for (const CudaPlan each : kPlans)
    if (std::string(name) == cuda_plan_name(each)) return plan = each, true;
  return false;
}

std::vector<CudaPlanCost> cuda_plan_costs(const ManifoldLinearParams& p, CudaPass pass, bool torch) {
  std::vector<CudaPlanCost> plans;
  for (const CudaPlan plan : kPlans)
    if (can_run(p, pass, plan) && (torch || !is_torch(plan))) plans.push_back({plan, seconds(p, pass, plan)});
  std::stable_sort(plans.begin(), plans.end(), [](const auto& a, const auto& b) { return a.seconds < b.seconds; });
  return plans;
}

CudaPlan cuda_plan(const ManifoldLinearParams& p, CudaPass pass, bool torch) { return best(p, pass, torch).plan; }

CudaBackwardPlan cuda_backward_plan(const ManifoldLinearBackwardParams& q, bool torch) {
  const ManifoldLinearParams& p = q.p;
  const CudaPlanCost none{CudaPlan::simt, 0};
  const CudaPlanCost rows = q.grad_input ? best(p, CudaPass::rows, torch) : none;
  const CudaPlanCost basis = q.grad_basis ? best(p, CudaPass::basis, torch) : none;
  if (!q.grad_coeff) return {rows.plan, basis.plan, true};
  const CudaPlanCost rows_and_dots = best(p, CudaPass::rows_and_dots, torch);
  const CudaPlanCost basis_and_dots = best(p, CudaPass::basis_and_dots, torch);
  CudaPlan forced{};
  const bool folds = forced_cuda_plan(forced)
                         ? forced == CudaPlan::fold || forced == CudaPlan::fold_gemm
                         : rows.seconds + basis_and_dots.seconds < rows_and_dots.seconds + basis.seconds;
  if (folds && std::isfinite(basis_and_dots.seconds)) return {rows.plan, basis_and_dots.plan, false};
  const bool apart = torch && is_torch(rows.plan) && forced_cuda_plan(forced);  // dx is forced to go by itself
  return {apart ? rows.plan : rows_and_dots.plan, basis.plan, true};
}

CudaProduct cuda_forward(const ManifoldLinearParams& p, CudaPlan plan) { return tiled(p, CudaPass::forward, plan); }
CudaProduct cuda_grad_rows(const ManifoldLinearParams& p, CudaPlan plan) { return tiled(p, CudaPass::rows, plan); }
CudaProduct cuda_grad_basis(const ManifoldLinearParams& p, CudaPlan plan) { return tiled(p, CudaPass::basis, plan); }

CudaProduct cuda_fold_outer(const ManifoldLinearParams& p) {
  CudaProduct product{CudaPlan::fold, ceil_div(p.out_features, kFoldOuterRows), ceil_div(p.in_features, kFoldOuterCols),
                      1};
  const int64_t blocks = product.tiles_down * product.tiles_across * ceil_div(p.num_basis, kFoldOuterGroup);
  product.splits = std::clamp(std::min(kBlocks / std::max<int64_t>(blocks, 1), p.batch / 2), int64_t(1), int64_t(16));
  return product;
}

int64_t cuda_bias_splits(const ManifoldLinearParams& p) {
  const int64_t blocks = ceil_div(p.out_features, 32) * ceil_div(p.num_basis, kBiasGroup);
  return std::clamp(std::min(4 * kBlocks / std::max<int64_t>(blocks, 1), p.rows() / 128), int64_t(1), int64_t(256));
}

int64_t cuda_expand_gemm_rows(const ManifoldLinearParams& p, int64_t cols) {
  const int64_t row = std::max<int64_t>(p.num_basis * cols * element_bytes(p.dtype), 1);
  return std::min(p.rows(), std::max<int64_t>(kTemporary / row / 256 * 256, 256));
}

int64_t cuda_fold_gemm_samples(const ManifoldLinearParams& p) {
  const int64_t weight = std::max<int64_t>(p.out_features * p.in_features * element_bytes(p.dtype), 1);
  return std::clamp(kCached / weight, int64_t(1), std::max<int64_t>(p.batch, 1));
}

int64_t cuda_forward_workspace(const ManifoldLinearParams& p) {
  const CudaPlan plan = cuda_plan(p, CudaPass::forward, false);
  return plan == CudaPlan::fold ? 0 : 4 * partial_elements(cuda_forward(p, plan), p.rows(), p.out_features);
}

CudaDots cuda_dots(const ManifoldLinearBackwardParams& q) {
  const CudaBackwardPlan plan = cuda_backward_plan(q, false);
  if (!plan.dots_with_rows) {
    const CudaProduct product = cuda_fold_outer(q.p);
    return {product.tiles_down * product.tiles_across, 1, 1};
  }
  const CudaProduct product = cuda_grad_rows(q.p, plan.rows);
  return {plan.rows == CudaPlan::simt ? 1 : product.tiles_across, product.splits, q.p.tokens};
}

void* cuda_dots_begin(const ManifoldLinearBackwardParams& q) {
  return static_cast<char*>(q.p.workspace) + partial_bytes(q);
}

int64_t cuda_backward_workspace(const ManifoldLinearBackwardParams& q) {
  const CudaDots dots = cuda_dots(q);
  const int64_t elements = dots.tiles * dots.splits * q.p.batch * dots.each * q.p.num_local;
  return partial_bytes(q) + (q.grad_coeff ? elements * (q.p.dtype == DType::float64 ? 8 : 4) : 0);
}

}  // namespace neuromod
