// What every CUDA build needs once.
#include "common/cuda_kernel.h"

namespace neuromod {

#if !defined(NEUROMOD_EMULATED)
const char* cuda_error_string(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }
#endif

}  // namespace neuromod
