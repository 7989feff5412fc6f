// Random problems for manifold_linear's CUDA kernels on the emulator: every plan, against sums in double. Without
// torch, so that python_tests/test_sanitized_kernels.py can build it with sanitizers; operands, results and workspace
// have their exact size, and whatever is accessed beyond them shows. Usage: fuzz CASES SEED.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulator/emulator.h"
#include "manifold_linear/manifold_linear_cuda_plan.h"
#include "manifold_linear/manifold_linear_segments.h"

namespace neuromod {
namespace {

using Random = std::mt19937;

int64_t pick(Random& random, std::vector<int64_t> options) { return options[random() % options.size()]; }

/// A matrix in memory of its exact size. Rows may lie apart, and begin at an address that is not aligned to 16 bytes.
class Matrix {
 public:
  Matrix(DType dtype, int64_t rows, int64_t cols, int64_t gap = 0, int64_t offset = 0)
      : dtype_(dtype), rows_(rows), cols_(cols), stride_(cols + gap), offset_(offset), bytes_(element_bytes(dtype)) {
    const int64_t elements = offset + (rows > 0 ? (rows - 1) * stride_ + cols : 0);
    memory_.reset(static_cast<unsigned char*>(std::malloc(static_cast<size_t>(elements * bytes_))));
    std::memset(memory_.get(), 0xFF, static_cast<size_t>(elements * bytes_));  // NaN
  }

  void fill(Random& random) {
    std::normal_distribution<double> normal;
    for (int64_t row = 0; row < rows_; ++row)
      for (int64_t col = 0; col < cols_; ++col) set(row, col, normal(random));
  }

  double at(int64_t row, int64_t col) const {
    unsigned char* const from = place(row, col);
    if (dtype_ == DType::float64) return read<double>(from);
    if (dtype_ == DType::float32) return read<float>(from);
    return dtype_ == DType::bfloat16 ? static_cast<float>(read<__nv_bfloat16>(from))
                                     : static_cast<float>(read<__half>(from));
  }

  void set(int64_t row, int64_t col, double value) {
    unsigned char* const to = place(row, col);
    if (dtype_ == DType::float64) return write(to, value);
    if (dtype_ == DType::float32) return write(to, static_cast<float>(value));
    dtype_ == DType::bfloat16 ? write(to, __nv_bfloat16(value)) : write(to, __half(value));
  }

  View view() const { return {place(0, 0), {stride_, 1, 0}}; }
  View view(int64_t rows) const { return {place(0, 0), {rows * stride_, stride_, 1}}; }  // of matrices of so many rows
  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }
  DType dtype() const { return dtype_; }

 private:
  struct Free {
    void operator()(unsigned char* memory) const { std::free(memory); }
  };
  unsigned char* place(int64_t row, int64_t col) const {
    return memory_.get() + (offset_ + row * stride_ + col) * bytes_;
  }
  template <class T>
  static T read(const unsigned char* from) {
    T value;
    std::memcpy(&value, from, sizeof(T));
    return value;
  }
  template <class T>
  static void write(unsigned char* to, T value) {
    std::memcpy(to, &value, sizeof(T));
  }

  DType dtype_;
  int64_t rows_, cols_, stride_, offset_, bytes_;
  std::unique_ptr<unsigned char, Free> memory_;
};

/// What a result should be, and the sum of its terms' magnitudes.
struct Expected {
  explicit Expected(const Matrix& m) : cols(m.cols()), value(m.rows() * m.cols()), scale(m.rows() * m.cols()) {}
  void add(int64_t row, int64_t col, double term) {
    value[row * cols + col] += term;
    scale[row * cols + col] += std::fabs(term);
  }
  int64_t cols;
  std::vector<double> value, scale;
};

struct Problem {
  explicit Problem(Random& random)
      : dtype(static_cast<DType>(random() % 4)),
        batch(pick(random, {1, 1, 2, 3, 7, 31})),
        tokens(pick(random, {1, 1, 2, 5, 31, 67, 140})),
        num_basis(pick(random, {1, 2, 3, 5, 7})),
        num_local(num_basis),
        outs(pick(random, {1, 3, 8, 31, 64, 67, 130})),
        ins(pick(random, {1, 2, 8, 16, 33, 67, 136, 300})) {
    while (batch * tokens * outs * ins * num_basis > 500'000) {
      (batch > 1 ? batch : tokens > 1 ? tokens : ins) /= 2;
    }
    indexed = random() % 3 == 0;
    if (indexed) num_local = 1 + static_cast<int64_t>(random() % num_basis);
    tf32 = random() % 2 == 0;
    accumulate = random() % 4 == 0;
    bias = random() % 2 == 0;
  }
  std::string text() const {
    return "dtype " + std::to_string(int(dtype)) + ", B " + std::to_string(batch) + ", T " + std::to_string(tokens) +
           ", K " + std::to_string(num_basis) + ", L " + std::to_string(num_local) + ", O " + std::to_string(outs) +
           ", I " + std::to_string(ins);
  }
  DType dtype;
  int64_t batch, tokens, num_basis, num_local, outs, ins;
  bool indexed, tf32, accumulate, bias;
};

/// The bound of python_tests/bounds.py, with more roundings of the accumulator than any plan has.
void compare(const Problem& q, const char* plan, const char* name, const Matrix& got, const Expected& want) {
  const double units[] = {0x1p-53, 0x1p-24, 0x1p-8, 0x1p-11};
  const double wide = q.dtype == DType::float64 ? 0x1p-53 : 0x1p-24;
  const double rounds = double(q.ins + q.outs + q.num_basis + q.batch * q.tokens + q.tokens * (17 + q.ins / 64) + 64);
  const double operands = q.dtype == DType::float32 && q.tf32 ? 0x1p-10 : 0;
  const double unit = 4 * units[int(got.dtype())] + rounds * wide + operands;
  const double floor = q.dtype == DType::float16 ? 0x1p-14 : 1e-30;
  for (int64_t row = 0; row < got.rows(); ++row) {
    for (int64_t col = 0; col < got.cols(); ++col) {
      const int64_t i = row * got.cols() + col;
      const double error = std::fabs(got.at(row, col) - want.value[i]);
      if (error <= unit * want.scale[i] + floor) continue;
      throw std::logic_error(q.text() + ", plan " + plan + ": " + name + " is " + std::to_string(got.at(row, col)) +
                             " at " + std::to_string(row) + ", " + std::to_string(col) + ", not " +
                             std::to_string(want.value[i]));
    }
  }
}

void run(const Problem& q, Random& random) {
  const int64_t B = q.batch, T = q.tokens, K = q.num_basis, L = q.num_local, O = q.outs, I = q.ins;
  const DType sums = q.dtype == DType::float64 ? DType::float64 : DType::float32;
  const auto operand = [&](DType dtype, int64_t rows, int64_t cols) {
    Matrix m(dtype, rows, cols, pick(random, {0, 0, 0, 1, 8}), pick(random, {0, 0, 1}));
    m.fill(random);
    return m;
  };
  const Matrix x = operand(q.dtype, B * T, I), g = operand(q.dtype, B * T, O), P = operand(q.dtype, K * O, I);
  const Matrix beta = operand(q.dtype, K, O), c = operand(sums, B, L);
  std::vector<int64_t> index(B);
  for (int64_t& first : index) first = static_cast<int64_t>(random() % 50) - 25;
  Matrix start(q.dtype, K * O, I);  // dP before, where it is added to
  start.fill(random);

  ManifoldLinearParams p{};
  p.dtype = q.dtype, p.batch = B, p.tokens = T, p.num_basis = K, p.num_local = L, p.out_features = O, p.in_features = I;
  p.tf32 = q.tf32;
  p.input = x.view(), p.basis = P.view(O), p.coeff = c.view();
  if (q.indexed) p.index = {index.data(), {1, 0, 0}};
  if (q.bias) p.bias = beta.view();

  Matrix y(q.dtype, B * T, O), dx(q.dtype, B * T, I), dP(q.dtype, K * O, I), dc(sums, B, L), dbeta(q.dtype, K, O);
  Expected want_y(y), want_dx(dx), want_dP(dP), want_dc(dc), want_dbeta(dbeta);
  for (int64_t row = 0; row < B * T; ++row) {
    for (int64_t l = 0; l < L; ++l) {
      const int64_t b = row / T, k = (p.first_basis(b) + l) % K;
      const double weight = c.at(b, l);
      for (int64_t o = 0; o < O; ++o) {
        const double out = g.at(row, o), shift = q.bias ? beta.at(k, o) : 0;
        want_y.add(row, o, weight * shift);
        want_dc.add(b, l, out * shift);
        want_dbeta.add(k, o, weight * out);
        for (int64_t i = 0; i < I; ++i) {
          const double point = P.at(k * O + o, i), in = x.at(row, i);
          want_y.add(row, o, weight * point * in);
          want_dx.add(row, i, weight * point * out);
          want_dP.add(k * O + o, i, weight * out * in);
          want_dc.add(b, l, out * point * in);
        }
      }
    }
  }
  for (int64_t row = 0; q.accumulate && row < K * O; ++row)
    for (int64_t i = 0; i < I; ++i) want_dP.add(row, i, start.at(row, i));

  for (const char* const plan : {"simt", "small", "large", "fold", ""}) {
    setenv("NEUROMOD_CUDA_PLAN", plan, 1);
    emulator::set_lane_order(random() % 2 ? emulator::LaneOrder::forward : emulator::LaneOrder::reversed);
    for (int64_t row = 0; q.accumulate && row < K * O; ++row)
      for (int64_t i = 0; i < I; ++i) dP.set(row, i, start.at(row, i));
    std::vector<int64_t> order(cuda_sorts(p) ? cuda_order_elements(p) : 0);
    p.order = order.empty() ? nullptr : order.data();
    p.output = y.view();
    Matrix forward(DType::bfloat16, 1, cuda_forward_workspace(p) / 2);
    p.workspace = forward.view().data;
    launch_manifold_linear_forward(p, nullptr);
    compare(q, plan, "y", y, want_y);

    ManifoldLinearBackwardParams all{p, dx.view(), dP.view(O), dc.view(), {}, q.accumulate};
    all.p.output = g.view();
    if (q.bias) all.grad_bias = dbeta.view();
    Matrix backward(DType::bfloat16, 1, cuda_backward_workspace(all) / 2);
    all.p.workspace = backward.view().data;
    launch_manifold_linear_backward(all, nullptr);
    compare(q, plan, "dx", dx, want_dx);
    compare(q, plan, "dP", dP, want_dP);
    compare(q, plan, "dc", dc, want_dc);
    if (q.bias) compare(q, plan, "dbeta", dbeta, want_dbeta);
  }
}

}  // namespace
}  // namespace neuromod

int main(int count, char** arguments) {
  const int cases = count > 1 ? std::atoi(arguments[1]) : 20;
  neuromod::Random random(count > 2 ? std::atoi(arguments[2]) : 1);
  try {
    for (int i = 0; i < cases; ++i) neuromod::run(neuromod::Problem(random), random);
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  std::printf("%d cases, 0 failed\n", cases);
}
