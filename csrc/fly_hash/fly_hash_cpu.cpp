// fly_hash and fly_readout on the CPU.
//
// A lane is a sample: 32 of float are transposed into rows of inputs, and shifted so that the mean over the units is 0.
// A unit is then the sum of a few whole rows, rectified, and where the readout has ten rows it stays in registers until
// all outputs have it; the gain is multiplied into the readout. Order of summation: the mean over the inputs, each
// times the number of units it enters; a unit's inputs in two sums, of even and of odd places; outputs over slices of
// 2048 units, units in order, and then over the slices. No result depends on the other samples of its batch.
//
// Cost for each sample and unit: arity additions (the first is the rectifier), and one multiply-add for each output.
#include "common/dispatch.h"
#include "fly_hash/fly_hash_panel.h"

namespace neuromod {
namespace {

constexpr int64_t kSlice = 2048;

double unit_seconds(const FlyHashParams& p) { return 1e-9 * double(p.arity + p.outputs + 4); }  // of one block

template <class T>
void hash_panel(const FlyHashParams& p, const FlyPanel<T>& panel) {
  const int64_t chunks = ceil_div(p.units, kFlyChunk);
  parallel(panel.blocks * chunks, unit_seconds(p) * double(kFlyChunk), [&](int64_t i) {
    const int64_t block = i / chunks, first = i % chunks * kFlyChunk, units = std::min(kFlyChunk, p.units - first);
    FlyChunk<acc_t<T>> h;
    panel.hash(block, first, units, false, h.at);
    panel.store(block, h.at, units, p.output, first);
  });
}

template <class T>
void read_out_panel(const FlyHashParams& p, const FlyPanel<T>& panel, const FlyReadout<acc_t<T>>& readout) {
  using A = acc_t<T>;
  const int64_t slices = ceil_div(p.units, kSlice), size = p.outputs * panel.kBlock;
  const Scratch<A> partial(panel.blocks * slices * size);
  parallel(panel.blocks * slices, unit_seconds(p) * double(std::min(kSlice, p.units)), [&](int64_t i) {
    const int64_t block = i / slices, begin = i % slices * kSlice, end = std::min(begin + kSlice, p.units);
    A* const sum = partial.data() + i * size;
    std::fill_n(sum, size, A(0));
    panel.read_out(block, begin, end, readout, sum);
  });
  for (int64_t block = 0; block < panel.blocks; ++block) {
    A* const sum = partial.data() + block * slices * size;
    for (int64_t slice = 1; slice < slices; ++slice) vectors<A>().add(size, sum + slice * size, sum);
    panel.store(block, sum, p.outputs, p.output);
  }
}

}  // namespace

void fly_hash_cpu(const FlyHashParams& p) {
  const char* const op = p.readout ? "fly_readout" : "fly_hash";
  dispatch_dtype<Float16, BFloat16>(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    check_fly_tasks(op, p);
    const FlyIndex<acc_t<T>> index(op, p);
    FlyPanel<T> panel(p, index);
    const FlyReadout<acc_t<T>> readout(p, p.readout && !p.task);
    for (int64_t first = 0; first < p.batch; first += kFlyPanel * FlyPanel<T>::kBlock) {
      panel.load(first);
      p.readout ? read_out_panel(p, panel, readout) : hash_panel(p, panel);
    }
  });
}

}  // namespace neuromod
