#pragma once

#include <pybind11/pybind11.h>

namespace neuromod {

void define_fused_function(pybind11::module_& m);

}  // namespace neuromod
