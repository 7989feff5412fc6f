// manifold_linear on the CPU. Plan "expand": every basis point's product is formed tile by tile and mixed by the row's
// coefficients while it is in cache, so neither per-sample weights nor a [B, K, O] array ever exist.
//
// Cost: 2 B T K O I flop each; operands are packed once. Sums: brgemm's float32 (float64) over the reduction, then k in
// order. Work is split over output tiles only, so results do not depend on the number of threads.
#include <ATen/Parallel.h>

#include "common/dispatch.h"
#include "common/tile_product.h"
#include "manifold_linear/manifold_linear.h"

namespace neuromod {
namespace {

template <class F>
void dispatch(const ManifoldLinearParams& p, F&& f) {
  dispatch_dtype<at::Half, at::BFloat16>(p.dtype, f);
}

int64_t tile_end(int64_t tile, int64_t total) { return std::min(kTile, total - tile * kTile); }

/// Z_k = rows · weight_k, tile by tile, for rows [B, T, depth] and weight_k [depth, cols].
template <class T>
class StackedProduct {
 public:
  using Acc = acc_t<T>;

  /// `weight` is indexed (k, depth, col).
  StackedProduct(const ManifoldLinearParams& p, View rows, View weight, int64_t depth, int64_t cols)
      : tokens(p.tokens),
        num_rows(p.batch * p.tokens),
        num_basis(p.num_basis),
        cols(cols),
        row_tiles(ceil_div(num_rows, kTile)),
        col_tiles(ceil_div(cols, kTile)),
        depth_(depth),
        stride_(packed_depth<T>(depth)),
        left_(row_tiles * kTile * stride_),
        right_(num_basis * col_tiles * kTile * stride_) {
    at::parallel_for(0, row_tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) {
        pack_left(left(tile), rows_in(tile), depth, [&](int64_t r, int64_t d) {
          const int64_t row = tile * kTile + r;
          return *rows.at<T>(row / tokens, row % tokens, d);
        });
      }
    });
    at::parallel_for(0, num_basis * col_tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t tile = i / num_basis, k = i % num_basis;
        pack_right(right(tile, k), depth, cols_in(tile), weight.at<T>(k, 0, tile * kTile), weight.stride[1],
                   weight.stride[2]);
      }
    });
  }

  int64_t rows_in(int64_t tile) const { return tile_end(tile, num_rows); }
  int64_t cols_in(int64_t tile) const { return tile_end(tile, cols); }

  /// The tile of Z_k, into `product` with rows of kTile.
  void operator()(int64_t row_tile, int64_t col_tile, int64_t k, Acc* product) const {
    tile_product<T>(rows_in(row_tile), cols_in(col_tile), depth_, left(row_tile), stride_, right(col_tile, k), product,
                    kTile, false);
  }

  const int64_t tokens, num_rows, num_basis, cols, row_tiles, col_tiles;

 private:
  T* left(int64_t tile) const { return left_.data() + tile * kTile * stride_; }
  T* right(int64_t tile, int64_t k) const { return right_.data() + (tile * num_basis + k) * kTile * stride_; }

  const int64_t depth_, stride_;
  const Scratch<T> left_, right_;
};

/// out[b,t,n] = sum_k c[b,k] (Z_k[b,t,n] + bias[k,n])
template <class T>
void mix(const ManifoldLinearParams& p, const StackedProduct<T>& z, View bias, View out) {
  using Acc = acc_t<T>;
  at::parallel_for(0, z.row_tiles * z.col_tiles, 1, [&](int64_t begin, int64_t end) {
    Scratch<Acc> product_memory(kTile * kTile), sum_memory(kTile * kTile);
    Acc* product = product_memory.data();
    Acc* sum = sum_memory.data();
    for (int64_t i = begin; i < end; ++i) {
      const int64_t col_tile = i / z.row_tiles, row_tile = i % z.row_tiles;
      const int64_t rows = z.rows_in(row_tile), cols = z.cols_in(col_tile);
      std::fill_n(sum, rows * kTile, Acc(0));
      for (int64_t k = 0; k < z.num_basis; ++k) {
        z(row_tile, col_tile, k, product);
        for (int64_t r = 0; r < rows; ++r) {
          const Acc c = *p.coeff.at<Acc>((row_tile * kTile + r) / z.tokens, k);
          Acc* to = sum + r * kTile;
          const Acc* from = product + r * kTile;
          if (bias) {
            for (int64_t n = 0; n < cols; ++n) to[n] += c * (from[n] + Acc(*bias.at<T>(k, col_tile * kTile + n)));
          } else {
            for (int64_t n = 0; n < cols; ++n) to[n] += c * from[n];
          }
        }
      }
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t row = row_tile * kTile + r;
        T* to = out.at<T>(row / z.tokens, row % z.tokens, col_tile * kTile);
        for (int64_t n = 0; n < cols; ++n) to[n * out.stride[2]] = T(sum[r * kTile + n]);
      }
    }
    release_tiles<T>();
  });
}

View transposed(const View& basis) { return {basis.data, {basis.stride[0], basis.stride[2], basis.stride[1]}}; }

}  // namespace

void manifold_linear_forward_cpu(const ManifoldLinearParams& p) {
  dispatch(p, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const StackedProduct<T> z(p, p.input, transposed(p.basis), p.in_features, p.out_features);
    mix(p, z, p.bias, p.output);
  });
}

void manifold_linear_grad_input_cpu(const ManifoldLinearParams& p) {
  dispatch(p, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const StackedProduct<T> z(p, p.output, p.basis, p.out_features, p.in_features);
    mix(p, z, View{}, p.input);
  });
}

// dc[b,k] = sum_t <g[b,t] P_k, x[b,t]>: each row's dot product first, then its sample's sum, both in fixed order.
void manifold_linear_grad_coeff_cpu(const ManifoldLinearParams& p) {
  dispatch(p, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Acc = acc_t<T>;
    const StackedProduct<T> z(p, p.output, p.basis, p.out_features, p.in_features);
    Acc* const row_sums = static_cast<Acc*>(p.workspace);
    at::parallel_for(0, z.row_tiles, 1, [&](int64_t begin, int64_t end) {
      Scratch<Acc> product_memory(kTile * kTile);
      Acc* product = product_memory.data();
      for (int64_t row_tile = begin; row_tile < end; ++row_tile) {
        const int64_t rows = z.rows_in(row_tile), first = row_tile * kTile;
        std::fill_n(row_sums + first * z.num_basis, rows * z.num_basis, Acc(0));
        for (int64_t col_tile = 0; col_tile < z.col_tiles; ++col_tile) {
          const int64_t cols = z.cols_in(col_tile);
          for (int64_t k = 0; k < z.num_basis; ++k) {
            z(row_tile, col_tile, k, product);
            for (int64_t r = 0; r < rows; ++r) {
              const T* x = p.input.at<T>((first + r) / z.tokens, (first + r) % z.tokens, col_tile * kTile);
              Acc dot = 0;
              for (int64_t n = 0; n < cols; ++n) dot += product[r * kTile + n] * Acc(x[n * p.input.stride[2]]);
              row_sums[(first + r) * z.num_basis + k] += dot;
            }
          }
        }
      }
      release_tiles<T>();
    });
    for (int64_t b = 0; b < p.batch; ++b) {
      for (int64_t k = 0; k < p.num_basis; ++k) {
        Acc sum = 0;
        for (int64_t t = 0; t < p.tokens; ++t) sum += row_sums[(b * p.tokens + t) * p.num_basis + k];
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
    constexpr int64_t chunk = 1024;  // rows summed at a time: a packed tile of g stays in cache
    const int64_t rows = p.batch * p.tokens, out = p.out_features, in = p.in_features;
    const int64_t out_tiles = ceil_div(out, kTile), in_tiles = ceil_div(in, kTile), chunks = ceil_div(rows, chunk);
    const int64_t panel = kTile * packed_depth<T>(chunk);

    Scratch<T> right(std::max<int64_t>(chunks, 1) * in_tiles * panel);
    at::parallel_for(0, chunks * in_tiles, 1, [&](int64_t begin, int64_t end) {
      Scratch<T> row_memory(chunk * kTile);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i / in_tiles * chunk, in_first = i % in_tiles * kTile;
        const int64_t depth = std::min(chunk, rows - first), cols = std::min(kTile, in - in_first);
        for (int64_t r = 0; r < depth; ++r) {
          const T* x = p.input.at<T>((first + r) / p.tokens, (first + r) % p.tokens, in_first);
          for (int64_t n = 0; n < cols; ++n) row_memory.data()[r * kTile + n] = x[n * p.input.stride[2]];
        }
        pack_right(right.data() + i * panel, depth, cols, row_memory.data(), kTile, int64_t{1});
      }
    });

    at::parallel_for(0, p.num_basis * out_tiles, 1, [&](int64_t begin, int64_t end) {
      Scratch<T> left(panel);
      const int64_t width = in_tiles * kTile;
      Scratch<Acc> sum_memory(kTile * width);
      Acc* sum = sum_memory.data();
      for (int64_t i = begin; i < end; ++i) {
        const int64_t k = i / out_tiles, out_first = i % out_tiles * kTile, outs = tile_end(i % out_tiles, out);
        std::fill_n(sum, outs * width, Acc(0));
        for (int64_t j = 0; j < chunks; ++j) {
          const int64_t first = j * chunk, depth = std::min(chunk, rows - first);
          const int64_t stride = packed_depth<T>(depth);
          pack_left(left.data(), outs, depth, [&](int64_t o, int64_t r) {
            const int64_t b = (first + r) / p.tokens, t = (first + r) % p.tokens;
            return T(*p.coeff.at<Acc>(b, k) * Acc(*p.output.at<T>(b, t, out_first + o)));
          });
          for (int64_t tile = 0; tile < in_tiles; ++tile) {
            tile_product<T>(outs, tile_end(tile, in), depth, left.data(), stride,
                            right.data() + (j * in_tiles + tile) * panel, sum + tile * kTile, width, true);
          }
        }
        for (int64_t o = 0; o < outs; ++o) {
          T* to = p.basis.at<T>(k, out_first + o);
          for (int64_t n = 0; n < in; ++n) to[n * p.basis.stride[2]] = T(sum[o * width + n]);
        }
      }
      release_tiles<T>();
    });
  });
}

}  // namespace neuromod
