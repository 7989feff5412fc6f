// hadamard_rotate in CUDA: as few passes over memory as shared memory allows. The first one takes 14 levels (float64:
// 13) of neighbours, those after it up to 11, of columns 32 bytes wide or wider of a matrix whose rows are what is done
// already: two passes up to 2^25 elements (float64: 2^24). SIMT; oracle: python_tests/hadamard_entries.py.
//
// Floor, predicted from 3.0 TB/s of an H100 and not measured: 45 us for 2^23 float32 elements in two passes, 90 us for
// 10 million, which are rotations of 2^23 and 2^22 elements; less as far as L2 holds them between passes.
#include <algorithm>

#include "common/columns.h"
#include "hadamard_rotate/hadamard_rotate.h"

namespace neuromod {
namespace {

constexpr int kThreads = 256;
constexpr int kTileBytesLog2 = 16, kLeastRowLog2 = 5;  // shared memory of a tile, and the least bytes of its rows
constexpr int kRadixLog2 = 4;                          // levels at once in registers

/// A pass: a tile is 2^taken rows, 2^level apart, of 2^columns neighbours.
template <class T>
struct Pass {
  const T* in;
  T* out;
  int64_t in_stride, out_stride;  // from one vector to the next
  int64_t vectors;
  int levels, level, taken, columns;
  const int8_t* signs;
  T scale;
  bool flip_first, flip_last;  // whether D and the scale come with this pass, before or after its levels
};

/// Where an element of a tile lies in shared memory: neighbours, and those 16 apart, in different banks.
__device__ __forceinline__ int padded(int i) { return i + (i >> kRadixLog2); }

/// `Levels` levels from stride 2^low on of the 2^size elements of a tile.
template <int Levels, class T>
__device__ __forceinline__ void sweep(T* x, int size, int low) {
  constexpr int kRadix = 1 << Levels;
  for (int group = threadIdx.x; group < (1 << size) / kRadix; group += kThreads) {
    const int first = ((group >> low) << (low + Levels)) | (group & ((1 << low) - 1));
    T v[kRadix];
#pragma unroll
    for (int i = 0; i < kRadix; ++i) v[i] = x[padded(first + (i << low))];
#pragma unroll
    for (int h = 1; h < kRadix; h *= 2)
#pragma unroll
      for (int i = 0; i < kRadix; ++i)
        if (!(i & h)) {
          const T a = v[i], b = v[i | h];
          v[i] = a + b;
          v[i | h] = a - b;
        }
#pragma unroll
    for (int i = 0; i < kRadix; ++i) x[padded(first + (i << low))] = v[i];
  }
  __syncthreads();
}

// Grid: x tiles of all vectors, folded. Block: 256 threads, one tile in shared memory, 64 KiB and their padding (three
// blocks on a multiprocessor); sweeps of four levels in registers, fewer in the first. Reads and writes each element of
// a tile once, a warp 32 neighbours or rows of 32 bytes; in place, as tiles of a pass share no element. Sums in the
// order of the levels, as on the CPU: error <= (levels + 2) e sum |x| 2^(-levels / 2). n levels flop, 2 n elements a
// pass, and D.
template <class T>
__global__ void __launch_bounds__(kThreads, 3) hadamard_rotate_kernel(Pass<T> p) {
  NEUROMOD_DYNAMIC_SHARED(T, x);
  const int size = p.taken + p.columns;
  const int64_t tiles = int64_t(1) << (p.levels - size), across = int64_t(1) << (p.level - p.columns);
  for (int64_t i = blockIdx.x; i < p.vectors * tiles; i += gridDim.x) {
    const int64_t vector = i / tiles, tile = i % tiles;
    const int64_t first = (tile / across << (p.level + p.taken)) + (tile % across << p.columns);
    const auto place = [&](int e) {
      return first + (int64_t(e >> p.columns) << p.level) + (e & ((1 << p.columns) - 1));
    };
    const T* const in = p.in + vector * p.in_stride;
    T* const out = p.out + vector * p.out_stride;
#pragma unroll 8
    for (int e = threadIdx.x; e < 1 << size; e += kThreads) {
      const int64_t at = place(e);
      x[padded(e)] = p.flip_first ? in[at] * (T(p.signs[at]) * p.scale) : in[at];
    }
    __syncthreads();
    int low = p.columns;
    if (const int odd = p.taken % kRadixLog2) {
      if (odd == 1) sweep<1>(x, size, low);
      if (odd == 2) sweep<2>(x, size, low);
      if (odd == 3) sweep<3>(x, size, low);
      low += odd;
    }
    for (; low < size; low += kRadixLog2) sweep<kRadixLog2>(x, size, low);
#pragma unroll 8
    for (int e = threadIdx.x; e < 1 << size; e += kThreads) {
      const int64_t at = place(e);
      out[at] = p.flip_last ? x[padded(e)] * (T(p.signs[at]) * p.scale) : x[padded(e)];
    }
    __syncthreads();  // the next tile overwrites this one
  }
}

template <class T>
int launch(const HadamardRotateParams& p, stream_t stream) {
  constexpr int most = kTileBytesLog2 - (sizeof(T) == 8 ? 3 : 2);
  constexpr int most_rows = kTileBytesLog2 - kLeastRowLog2;
  const HadamardPiece& piece = p.pieces[0];
  Pass<T> pass{};
  pass.in = static_cast<const T*>(piece.in) + p.first;
  pass.out = static_cast<T*>(piece.out) + p.first;
  pass.in_stride = piece.in_stride, pass.out_stride = piece.out_stride;
  pass.vectors = p.vectors;
  pass.levels = p.levels;
  pass.signs = p.signs;
  pass.scale = static_cast<T>(hadamard_scale(p));
  do {
    const bool neighbours = pass.level == 0;
    pass.taken = std::min(p.levels - pass.level, neighbours ? most : most_rows);
    pass.columns = neighbours ? 0 : most - pass.taken;
    pass.flip_first = neighbours && !p.inverse;
    pass.flip_last = p.inverse && pass.level + pass.taken == p.levels;
    const int size = pass.taken + pass.columns;
    const dim3 grid(block_count(p.vectors << (p.levels - size))), block(kThreads);
    const size_t bytes = sizeof(T) * ((size_t(1) << size) + (size_t(1) << size >> kRadixLog2));
    NEUROMOD_LAUNCH((hadamard_rotate_kernel<T>), grid, block, bytes, stream, pass);
    if (const int status = launch_status()) return status;
    pass.level += pass.taken;
    pass.in = pass.out, pass.in_stride = pass.out_stride;
  } while (pass.level < p.levels);
  return 0;
}

}  // namespace

int launch_hadamard_rotate(const HadamardRotateParams& p, stream_t stream) {
  return p.dtype == DType::float64 ? launch<double>(p, stream) : launch<float>(p, stream);
}

}  // namespace neuromod
