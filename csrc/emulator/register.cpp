// What the emulated library has beside the ops: the order in which it runs the lanes of a warp.
#include <torch/library.h>

#include "emulator/emulator.h"

namespace neuromod::emulator {
namespace {

TORCH_LIBRARY_FRAGMENT(neuromod_emulated, library) {
  library.def("set_reversed_lanes(bool reversed) -> ()",
              [](bool reversed) { set_lane_order(reversed ? LaneOrder::reversed : LaneOrder::forward); });
}

}  // namespace
}  // namespace neuromod::emulator
