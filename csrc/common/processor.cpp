#include "common/processor.h"

#include <ATen/Context.h>
#include <ATen/native/CPUBlas.h>

#include <exception>
#include <string>
#include <utility>
#include <vector>

#include "common/vector.h"

namespace neuromod {
namespace {

/// What f says while oneDNN is not switched off.
template <class F>
bool with_onednn(F f) {
  at::Context& context = at::globalContext();
  const bool enabled = context.userEnabledMkldnn();
  context.setUserEnabledMkldnn(true);
  const bool value = f();
  context.setUserEnabledMkldnn(enabled);
  return value;
}

bool has_matrix_unit(at::ScalarType type) {
  return with_onednn([&] { return at::native::cpublas::could_pack(type); });
}

/// torch tells of AMX alone, though its brgemm takes pairs wherever oneDNN has products of them: tried once.
bool multiplies_pairs() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx512bf16")) return false;
  const at::BFloat16 a[2] = {1, 2}, b[2] = {3, 4};
  float c = 0;
  try {
    at::native::cpublas::brgemm(1, 1, 2, 2, 1, 1, false, a, b, &c, true);
    at::native::cpublas::brgemm_release(true);
  } catch (const std::exception&) {  // oneDNN is kept from AVX-512
    return false;
  }
  return c == 11;
#else
  return false;
#endif
}

}  // namespace

template <>
HalfTiles half_tiles<BFloat16>() {
  static const HalfTiles tiles = has_matrix_unit(at::kBFloat16)  ? HalfTiles::matrix_unit
                                 : with_onednn(multiplies_pairs) ? HalfTiles::pairs
                                                                 : HalfTiles::widened;
  return tiles;
}

template <>
HalfTiles half_tiles<Float16>() {
  static const HalfTiles tiles = has_matrix_unit(at::kHalf) ? HalfTiles::matrix_unit : HalfTiles::widened;
  return tiles;
}

bool torch_has_tiles() {
#if defined(__x86_64__)
  static const bool avx2 = (__builtin_cpu_init(), __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"));
  return avx2 && at::globalContext().userEnabledMkldnn();
#else
  return false;
#endif
}

bool torch_product_outruns_tiles() {
#if defined(__x86_64__)
  static const bool value = (__builtin_cpu_init(), __builtin_cpu_is("intel") && __builtin_cpu_supports("avx512f"));
  return value;
#else
  return true;
#endif
}

/// For `python -m neuromod_ext info`.
std::vector<std::string> cpu_features() {
  std::vector<std::string> features;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) features.emplace_back("avx2");
  if (__builtin_cpu_supports("fma")) features.emplace_back("fma");
  if (__builtin_cpu_supports("avx512f")) features.emplace_back("avx512f");
  if (__builtin_cpu_supports("avx512bw")) features.emplace_back("avx512bw");
  if (__builtin_cpu_supports("avx512bf16")) features.emplace_back("avx512bf16");
#endif
  features.emplace_back(std::string(vector_set().isa) + " row operations");
  for (const auto& [tiles, name] :
       {std::pair(half_tiles<BFloat16>(), "bfloat16"), std::pair(half_tiles<Float16>(), "float16")}) {
    if (tiles == HalfTiles::matrix_unit) features.emplace_back(std::string(name) + " tiles");
    if (tiles == HalfTiles::pairs) features.emplace_back(std::string(name) + " pairs");
  }
  return features;
}

}  // namespace neuromod
