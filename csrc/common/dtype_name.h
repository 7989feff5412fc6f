#pragma once

#include <c10/util/Exception.h>

#include <string>

#include "common/params.h"

namespace neuromod {

/// float64, float32, bfloat16 or float16, by name.
inline DType dtype_from_name(const char* op, const std::string& name) {
  if (name == "float64") return DType::float64;
  if (name == "float32") return DType::float32;
  if (name == "bfloat16") return DType::bfloat16;
  TORCH_CHECK_VALUE(name == "float16", op, ": expected dtype float64, float32, bfloat16 or float16, got ", name);
  return DType::float16;
}

}  // namespace neuromod
