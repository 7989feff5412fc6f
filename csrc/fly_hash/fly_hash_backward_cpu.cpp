// The gradients of fly_hash and fly_readout on the CPU; units are gathered anew.
//
// Parameters: a thread takes a slice of units through all samples. Where a block's samples share the gain, its products
// are added lane by lane, and the lanes after every panel of blocks; else (tasks, or a last block that is not full)
// they are transposed and added sample by sample. Both orders depend on sizes and on whether there are tasks, on
// nothing else.
//
// Input: a thread takes a block of samples through all units, in order; the mean over the units is subtracted at the
// end, from each input as often as units have it.
#include "common/dispatch.h"
#include "fly_hash/fly_hash_panel.h"

namespace neuromod {
namespace {

constexpr int64_t kSlice = 512;

/// The gradients of gain and readout, in the accumulation type, over all panels.
template <class T>
class ParameterGradients {
 public:
  using A = acc_t<T>;
  static constexpr int64_t kBlock = FlyPanel<T>::kBlock, kHalf = kBlock / 2;

  ParameterGradients(const FlyHashBackwardParams& p, const FlyReadout<A>& factors)
      : p_(p),
        f_(p.forward),
        factors_(factors),
        gain_(p.grad_gain ? f_.tasks * f_.units : 0),
        readout_(p.grad_readout ? f_.outputs * f_.units : 0) {
    std::fill_n(gain_.data(), p.grad_gain ? f_.tasks * f_.units : 0, A(0));
    std::fill_n(readout_.data(), p.grad_readout ? f_.outputs * f_.units : 0, A(0));
  }

  void add(const FlyPanel<T>& panel, const A* grad) {
    const double seconds = 1e-9 * double(kSlice * panel.blocks * (f_.arity + f_.outputs + 8));
    parallel(ceil_div(f_.units, kSlice), seconds, [&](int64_t slice) {
      const int64_t begin = slice * kSlice, end = std::min(begin + kSlice, f_.units);
      const int64_t full = p_.grad_gain && !f_.task ? panel.full_blocks() : 0;
      if (full > 0) add_lanes(panel, full, begin, end, grad);
      for (int64_t block = 0; block < panel.blocks; ++block) {
        const A* const g = grad + block * f_.outputs * kBlock;
        for (int64_t first = begin; first < end; first += kFlyChunk) {
          const int64_t units = std::min(kFlyChunk, end - first);
          if (p_.grad_gain && block >= full) add_to_gain(panel, block, first, units, g);
          if (p_.grad_readout) add_to_readout(panel, block, first, units, g);
        }
      }
    });
  }

  void store() const {
    if (p_.grad_gain) vectors<T>().narrow(f_.tasks * f_.units, gain_.data(), p_.grad_gain.template at<T>(0));
    if (p_.grad_readout) vectors<T>().narrow(f_.outputs * f_.units, readout_.data(), p_.grad_readout.template at<T>(0));
  }

 private:
  void add_lanes(const FlyPanel<T>& panel, int64_t blocks, int64_t begin, int64_t end, const A* grad) {
    const Scratch<A> lanes((end - begin) * kHalf);
    std::fill_n(lanes.data(), (end - begin) * kHalf, A(0));
    for (int64_t block = 0; block < blocks; ++block)
      panel.add_products(block, begin, end, factors_, grad + block * f_.outputs * kBlock, lanes.data());
    for (int64_t first = begin; first < end; first += kFlyChunk) {
      const int64_t units = std::min(kFlyChunk, end - first);
      const A* rows[kFlyChunk];
      for (int64_t u = 0; u < units; ++u) rows[u] = lanes.data() + (first - begin + u) * kHalf;
      FlyChunk<A> by_lane;
      vectors<A>().transpose(units, kHalf, rows, by_lane.at, kFlyChunk);
      for (int64_t l = 0; l < kHalf; ++l) vectors<A>().add(units, by_lane.at + l * kFlyChunk, gain_.data() + first);
    }
  }

  void add_to_gain(const FlyPanel<T>& panel, int64_t block, int64_t first, int64_t units, const A* grad) {
    FlyChunk<A> h, products, by_sample;
    panel.hash(block, first, units, false, h.at);
    fly_hash_vectors<T>().signal(units, f_.outputs, factors_.at(first), grad, products.at);
    vectors<A>().scale(units * kBlock, h.at, products.at, products.at);
    turn(units, products.at, by_sample.at);
    for (int64_t s = 0; s < panel.samples(block); ++s)
      vectors<A>().add(units, by_sample.at + s * kFlyChunk, gain_.data() + panel.task(block, s) * f_.units + first);
  }

  void add_to_readout(const FlyPanel<T>& panel, int64_t block, int64_t first, int64_t units, const A* grad) {
    FlyChunk<A> h, by_sample;
    panel.hash(block, first, units, true, h.at);
    turn(units, h.at, by_sample.at);
    vectors<A>().product(f_.outputs, units, panel.samples(block), grad, kBlock, 1, by_sample.at, kFlyChunk,
                         readout_.data() + first, f_.units, true);
  }

  /// [units, kBlock] to [kBlock, kFlyChunk]
  static void turn(int64_t units, const A* from, A* to) {
    const A* rows[kFlyChunk];
    for (int64_t u = 0; u < units; ++u) rows[u] = from + u * kBlock;
    vectors<A>().transpose(units, kBlock, rows, to, kFlyChunk);
  }

  const FlyHashBackwardParams& p_;
  const FlyHashParams& f_;
  const FlyReadout<A>& factors_;
  const Scratch<A> gain_, readout_;
};

/// dx of one block of samples; `grad` as in ParameterGradients, null for fly_hash.
template <class T>
void input_gradient(const FlyHashBackwardParams& p, const FlyIndex<acc_t<T>>& index, const FlyPanel<T>& panel,
                    const FlyReadout<acc_t<T>>& factors, int64_t block, const acc_t<T>* grad) {
  using A = acc_t<T>;
  constexpr int64_t kBlock = kFlyBlock<A>;
  const FlyHashParams& f = p.forward;
  const auto& ops = fly_hash_vectors<T>();
  const Scratch<A> x(f.inputs * kBlock);
  std::fill_n(x.data(), f.inputs * kBlock, A(0));
  FlyChunk<A> h, signal;
  alignas(64) A total[kBlock] = {};
  for (int64_t first = 0; first < f.units; first += kFlyChunk) {
    const int64_t units = std::min(kFlyChunk, f.units - first);
    panel.hash(block, first, units, false, h.at);
    if (grad) {
      ops.signal(units, f.outputs, factors.at(first), grad, signal.at);
      if (f.task) panel.modulate(block, first, units, signal.at);
      ops.mask(units, h.at, f.task ? nullptr : f.gain.at<const A>(0, first), signal.at);
    } else {
      panel.transpose(p.grad, units, block, signal.at, first);
      ops.mask(units, h.at, nullptr, signal.at);
    }
    ops.scatter(units, f.arity, index.data() + first * f.arity, signal.at, x.data(), total);
  }
  for (int64_t s = 0; s < kBlock; ++s) total[s] /= A(f.units);
  ops.subtract(f.inputs, index.count.data(), total, x.data());
  panel.store(block, x.data(), f.inputs, p.grad_input);
}

}  // namespace

void fly_hash_backward_cpu(const FlyHashBackwardParams& p) {
  const FlyHashParams& f = p.forward;
  const char* const op = f.readout ? "fly_readout_backward" : "fly_hash_backward";
  dispatch_dtype<Float16, BFloat16>(f.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    check_fly_tasks(op, f);
    const FlyIndex<A> index(op, f);
    FlyPanel<T> panel(f, index);
    const FlyReadout<A> factors(f, false);
    ParameterGradients<T> parameters(p, factors);
    const int64_t size = f.outputs * panel.kBlock;
    const Scratch<A> grads(f.readout ? kFlyPanel * size : 0);
    for (int64_t first = 0; first < f.batch; first += kFlyPanel * panel.kBlock) {
      panel.load(first);
      for (int64_t block = 0; f.readout && block < panel.blocks; ++block)
        panel.transpose(p.grad, f.outputs, block, grads.data() + block * size);
      if (p.grad_gain || p.grad_readout) parameters.add(panel, grads.data());
      if (p.grad_input) {
        parallel(panel.blocks, 1e-9 * double(f.units * (2 * f.arity + f.outputs + 8)), [&](int64_t block) {
          input_gradient<T>(p, index, panel, factors, block, f.readout ? grads.data() + block * size : nullptr);
        });
      }
    }
    parameters.store();
  });
}

}  // namespace neuromod
