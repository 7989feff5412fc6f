// manifold_linear on the CPU. Plan "expand": every basis point's product is formed tile by tile and mixed by the rows'
// coefficients while it is in cache, so neither per-sample weights nor a [B, K, O] array ever exist.
//
// Cost: 2 B T K O I flop each; float operands are read in place but for one transposition of x. Sums: brgemm's float32
// (float64) over the reduction, then k in order. Work is split over output tiles only, so results do not depend on the
// number of threads.
#include "common/dispatch.h"
#include "common/operand.h"
#include "manifold_linear/manifold_linear.h"

namespace neuromod {
namespace {

/// Calls f with the tag of the element type.
template <class F>
void dispatch(const ManifoldLinearParams& p, F&& f) {
  dispatch_dtype<at::Half, at::BFloat16>(p.dtype, f);
}

template <class T>
Matrices<T> basis_matrices(const ManifoldLinearParams& p) {
  return Matrices<T>::stack(p.basis, p.num_basis, p.out_features, p.in_features);
}
template <class T>
Matrices<T> input_matrix(const ManifoldLinearParams& p) {
  return Matrices<T>::flattened(p.input, p.batch, p.tokens, p.in_features);
}
template <class T>
Matrices<T> output_matrix(const ManifoldLinearParams& p) {
  return Matrices<T>::flattened(p.output, p.batch, p.tokens, p.out_features);
}

/// Runs f(row_tile, col_tile) over a grid of tiles, each once, in parallel.
template <class T, class F>
void for_each_tile(int64_t row_tiles, int64_t col_tiles, F f) {
  at::parallel_for(0, row_tiles * col_tiles, 1, [&](int64_t begin, int64_t end) {
    Scratch<acc_t<T>> product(kTile * kTile), sum(kTile * kTile);
    for (int64_t i = begin; i < end; ++i) f(i % row_tiles, i / row_tiles, product.data(), sum.data());
    release_tiles<T>();
  });
}

}  // namespace

// y^T = sum_k P_k x^T c_k: basis points are A, read in place; a tile's columns are rows of x, so that their
// coefficients lie side by side.
void manifold_linear_forward_cpu(const ManifoldLinearParams& p) {
  dispatch(p, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Acc = acc_t<T>;
    const int64_t rows = p.batch * p.tokens, depth = p.in_features;
    const auto weight = Tiles<T>::left(basis_matrices<T>(p));
    const auto input = Tiles<T>::right_from_rows(input_matrix<T>(p));
    const int64_t row_tiles = ceil_div(rows, kTile), out_tiles = ceil_div(p.out_features, kTile);
    for_each_tile<T>(row_tiles, out_tiles, [&](int64_t row_tile, int64_t out_tile, Acc* product, Acc* sum) {
      const int64_t first = row_tile * kTile, count = tile_size(row_tile, rows);
      const int64_t out_first = out_tile * kTile, outs = tile_size(out_tile, p.out_features);
      Acc c[kTile];
      std::fill_n(sum, outs * kTile, Acc(0));
      for (int64_t k = 0; k < p.num_basis; ++k) {
        tile_product<T>(outs, count, depth, weight(k, out_tile), input(0, row_tile), product, kTile, false);
        for (int64_t r = 0; r < count; ++r) c[r] = *p.coeff.at<Acc>((first + r) / p.tokens, k);
        for (int64_t o = 0; o < outs; ++o) {
          const Acc bias = p.bias ? Acc(*p.bias.at<T>(k, out_first + o)) : Acc(0);
          Acc* to = sum + o * kTile;
          const Acc* from = product + o * kTile;
          for (int64_t r = 0; r < count; ++r) to[r] += c[r] * (from[r] + bias);
        }
      }
      for (int64_t r = 0; r < count; ++r) {
        T* to = p.output.at<T>((first + r) / p.tokens, (first + r) % p.tokens, out_first);
        for (int64_t o = 0; o < outs; ++o) to[o * p.output.stride[2]] = T(sum[o * kTile + r]);
      }
    });
  });
}

// dx = sum_k c_k g P_k
void manifold_linear_grad_input_cpu(const ManifoldLinearParams& p) {
  dispatch(p, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Acc = acc_t<T>;
    const int64_t rows = p.batch * p.tokens, depth = p.out_features;
    const auto grad = Tiles<T>::left(output_matrix<T>(p));
    const auto weight = Tiles<T>::right(basis_matrices<T>(p));
    const int64_t row_tiles = ceil_div(rows, kTile), in_tiles = ceil_div(p.in_features, kTile);
    for_each_tile<T>(row_tiles, in_tiles, [&](int64_t row_tile, int64_t in_tile, Acc* product, Acc* sum) {
      const int64_t first = row_tile * kTile, count = tile_size(row_tile, rows),
                    ins = tile_size(in_tile, p.in_features);
      std::fill_n(sum, count * kTile, Acc(0));
      for (int64_t k = 0; k < p.num_basis; ++k) {
        tile_product<T>(count, ins, depth, grad(0, row_tile), weight(k, in_tile), product, kTile, false);
        for (int64_t r = 0; r < count; ++r) {
          const Acc c = *p.coeff.at<Acc>((first + r) / p.tokens, k);
          for (int64_t n = 0; n < ins; ++n) sum[r * kTile + n] += c * product[r * kTile + n];
        }
      }
      for (int64_t r = 0; r < count; ++r) {
        T* to = p.input.at<T>((first + r) / p.tokens, (first + r) % p.tokens, in_tile * kTile);
        for (int64_t n = 0; n < ins; ++n) to[n * p.input.stride[2]] = T(sum[r * kTile + n]);
      }
    });
  });
}

// dc[b,k] = sum_t <g[b,t] P_k, x[b,t]>: each row's dot product first, then its sample's sum, both in fixed order.
void manifold_linear_grad_coeff_cpu(const ManifoldLinearParams& p) {
  dispatch(p, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Acc = acc_t<T>;
    const int64_t rows = p.batch * p.tokens, depth = p.out_features, K = p.num_basis;
    const auto grad = Tiles<T>::left(output_matrix<T>(p));
    const auto weight = Tiles<T>::right(basis_matrices<T>(p));
    Acc* const row_sums = static_cast<Acc*>(p.workspace);
    for_each_tile<T>(ceil_div(rows, kTile), 1, [&](int64_t row_tile, int64_t, Acc* product, Acc*) {
      const int64_t first = row_tile * kTile, count = tile_size(row_tile, rows);
      std::fill_n(row_sums + first * K, count * K, Acc(0));
      for (int64_t in_tile = 0; in_tile < ceil_div(p.in_features, kTile); ++in_tile) {
        const int64_t ins = tile_size(in_tile, p.in_features);
        for (int64_t k = 0; k < K; ++k) {
          tile_product<T>(count, ins, depth, grad(0, row_tile), weight(k, in_tile), product, kTile, false);
          for (int64_t r = 0; r < count; ++r) {
            const T* x = p.input.at<T>((first + r) / p.tokens, (first + r) % p.tokens, in_tile * kTile);
            Acc dot = 0;
            for (int64_t n = 0; n < ins; ++n) dot += product[r * kTile + n] * Acc(x[n * p.input.stride[2]]);
            row_sums[(first + r) * K + k] += dot;
          }
        }
      }
    });
    for (int64_t b = 0; b < p.batch; ++b) {
      for (int64_t k = 0; k < K; ++k) {
        Acc sum = 0;
        for (int64_t t = 0; t < p.tokens; ++t) sum += row_sums[(b * p.tokens + t) * K + k];
        *p.coeff.at<Acc>(b, k) = sum;
      }
    }
  });
}

// dP[k,o,i] = sum_bt (c[b,k] g[b,t,o]) x[b,t,i]: c is applied while g is packed, its product rounded once to T.
void manifold_linear_grad_basis_cpu(const ManifoldLinearParams& p) {
  dispatch(p, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Acc = acc_t<T>;
    const int64_t rows = p.batch * p.tokens, in = p.in_features, stride = packed_depth<T>(rows);
    const auto input = Tiles<T>::right(input_matrix<T>(p));
    const int64_t out_tiles = ceil_div(p.out_features, kTile), in_tiles = ceil_div(in, kTile);
    at::parallel_for(0, p.num_basis * out_tiles, 1, [&](int64_t begin, int64_t end) {
      Scratch<T> weighted(kTile * stride);
      Scratch<Acc> sum(kTile * kTile);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t k = i / out_tiles, first = i % out_tiles * kTile, outs = tile_size(i % out_tiles, p.out_features);
        for (int64_t r = 0; r < rows; ++r) {
          const Acc c = *p.coeff.at<Acc>(r / p.tokens, k);
          const T* g = p.output.at<T>(r / p.tokens, r % p.tokens, first);
          for (int64_t o = 0; o < outs; ++o) weighted.data()[o * stride + r] = T(c * Acc(g[o * p.output.stride[2]]));
        }
        for (int64_t o = 0; o < outs && stride != rows; ++o) weighted.data()[o * stride + rows] = T(0);
        for (int64_t tile = 0; tile < in_tiles; ++tile) {
          const int64_t ins = tile_size(tile, in);
          tile_product<T>(outs, ins, rows, {weighted.data(), stride}, input(0, tile), sum.data(), kTile, false);
          for (int64_t o = 0; o < outs; ++o) {
            T* to = p.basis.at<T>(k, first + o, tile * kTile);
            for (int64_t n = 0; n < ins; ++n) to[n * p.basis.stride[2]] = T(sum.data()[o * kTile + n]);
          }
        }
      }
      release_tiles<T>();
    });
  });
}

}  // namespace neuromod
