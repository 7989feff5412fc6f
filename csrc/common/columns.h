// What the kernels share that are bound by memory: rows are cut into tiles of columns, and a thread holds 16 bytes of
// neighbouring columns, a Pack. Where all rows begin on 16 bytes, a pack is one access; else, and in the last tile, the
// same columns are taken one by one, so sums run in the same order and yield the same bits wherever operands lie.
#pragma once

#include <cstring>

#include "common/cuda_kernel.h"
#include "common/params.h"

namespace neuromod {

constexpr int kColumnThreads = 128;
constexpr int kColumnWarps = kColumnThreads / 32;
constexpr int64_t kMostBlocks = 65535;  // more tiles than that are taken in turns

/// 16 bytes of a row.
template <class T>
struct Pack {
  static constexpr int size = 16 / sizeof(T);
  T at[size];
};

template <class T>
NEUROMOD_HOST_DEVICE constexpr int64_t tile_columns() {
  return kColumnThreads * Pack<T>::size;
}

inline unsigned block_count(int64_t n) { return static_cast<unsigned>(n < kMostBlocks ? n : kMostBlocks); }

/// Whether each of the rows begins on 16 bytes. An operand that is not there stands in nobody's way.
template <class T>
bool rows_aligned(const View& v, int64_t rows) {
  const int64_t bytes = v.stride[0] * int64_t(sizeof(T));
  return reinterpret_cast<uintptr_t>(v.data) % 16 == 0 && (rows <= 1 || bytes % 16 == 0);
}

/// This thread's columns of a tile.
template <class T>
struct Columns {
  int64_t first;
  int64_t count;  // of them, those that are there: Pack<T>::size or fewer, 0 or fewer for none

  __device__ Columns(int64_t tile, int64_t length)
      : first(tile * tile_columns<T>() + thread_rank() * Pack<T>::size),
        count(length - first < Pack<T>::size ? length - first : Pack<T>::size) {}
};

/// Calls f(std::bool_constant<whole>{}): whether all columns of the tile are there, and packs are one access. It is the
/// same for all threads of the block.
template <class T, class F>
__device__ __forceinline__ void for_tile(bool aligned, int64_t tile, int64_t length, F&& f) {
  if (aligned && (tile + 1) * tile_columns<T>() <= length) {
    f(std::true_type{});
  } else {
    f(std::false_type{});
  }
}

/// The first `count` elements of a pack, then zeros. Whole packs have all of them or none.
template <bool Whole, class T>
__device__ __forceinline__ Pack<T> load_pack(const T* from, int64_t count) {
  Pack<T> pack;
  if constexpr (Whole) {
    NEUROMOD_DEVICE_CHECK(count <= 0 || reinterpret_cast<uintptr_t>(from) % 16 == 0, "a whole pack off 16 bytes");
    const uint4 bytes = count > 0 ? *reinterpret_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
    memcpy(&pack, &bytes, sizeof(pack));
  } else {
#pragma unroll
    for (int v = 0; v < Pack<T>::size; ++v) pack.at[v] = v < count ? from[v] : from_acc<T>(accumulator_t<T>(0));
  }
  return pack;
}

/// Rounds sums to elements and stores the first `count`.
template <bool Whole, class T, class Acc>
__device__ __forceinline__ void store_pack(T* to, const Acc (&sums)[Pack<T>::size], int64_t count) {
  Pack<T> pack;
#pragma unroll
  for (int v = 0; v < Pack<T>::size; ++v) pack.at[v] = from_acc<T>(sums[v]);
  if constexpr (Whole) {
    NEUROMOD_DEVICE_CHECK(reinterpret_cast<uintptr_t>(to) % 16 == 0, "a whole pack off 16 bytes");
    uint4 bytes;
    memcpy(&bytes, &pack, sizeof(pack));
    *reinterpret_cast<uint4*>(to) = bytes;
  } else {
#pragma unroll
    for (int v = 0; v < Pack<T>::size; ++v)
      if (v < count) to[v] = pack.at[v];
  }
}

/// sums[r][v] = sum_j mix[row + r, j] in[j, columns.first + v] for r < rows, j in order. The loads of `AtOnce` terms
/// are under way at once, of one where packs are not whole.
template <bool Whole, int AtOnce, int Rows, class T, class Acc>
__device__ __forceinline__ void mix_columns(const View& mix, const View& in, int64_t terms, int64_t row, int64_t rows,
                                            const Columns<T>& columns, Acc (&sums)[Rows][Pack<T>::size]) {
  constexpr int kAtOnce = Whole ? AtOnce : 1;
#pragma unroll
  for (int r = 0; r < Rows; ++r)
#pragma unroll
    for (int v = 0; v < Pack<T>::size; ++v) sums[r][v] = Acc(0);
  for (int64_t j = 0; j < terms; j += kAtOnce) {
    Pack<T> x[kAtOnce];
    Acc c[kAtOnce][Rows];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const bool there = j + u < terms;
      x[u] = load_pack<Whole>(in.at<const T>(j + u, columns.first), there ? columns.count : 0);
#pragma unroll
      for (int r = 0; r < Rows; ++r) c[u][r] = there && r < rows ? *mix.at<Acc>(row + r, j + u) : Acc(0);
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u)
#pragma unroll
      for (int r = 0; r < Rows; ++r)
#pragma unroll
        for (int v = 0; v < Pack<T>::size; ++v) sums[r][v] += c[u][r] * to_acc<Acc>(x[u].at[v]);
  }
}

/// One step of warp_sums and those after it: lanes `Half` apart exchange half of their first 2 Half values.
template <int Half, int Count, class Acc>
__device__ __forceinline__ void exchange_sums(Acc (&values)[Count], int lane) {
  const bool upper = (lane & Half) != 0;
#pragma unroll
  for (int i = 0; i < Half; ++i) {
    const Acc kept = upper ? values[i + Half] : values[i], sent = upper ? values[i] : values[i + Half];
    values[i] = kept + __shfl_xor_sync(0xffffffffu, sent, Half);
  }
  if constexpr (Half > 1) exchange_sums<Half / 2>(values, lane);
}

/// Sums over a full warp of `Count` values a lane, all at once: lane i gets the sum of value i % Count. It costs about
/// Count shuffles, not 5 Count. Lanes Count / 2 apart are added first, then half as far, and so on to 1; then, if there
/// are fewer values than lanes, lanes 16 apart. All 32 lanes must call it.
template <int Count, class Acc>
__device__ __forceinline__ Acc warp_sums(Acc (&values)[Count]) {
  static_assert(Count == 16 || Count == 32);
  exchange_sums<Count / 2>(values, thread_rank() % 32);
  Acc sum = values[0];
  if constexpr (Count == 16) sum += __shfl_xor_sync(0xffffffffu, sum, 16);
  return sum;
}

constexpr int kPartColumns = 8, kPartRows = 64;

/// out[i] = scale · sum_p parts[p, i]. Block: 8 columns i by 64 rows; a row's thread adds every 64th part in order,
/// then the rows are folded in halves.
template <class Acc, class Out>
__global__ void __launch_bounds__(kPartColumns* kPartRows)
    sum_parts_kernel(const Acc* parts, int64_t num_parts, int64_t count, Acc scale, Out* out) {
  __shared__ Acc rows[kPartRows][kPartColumns];
  const int column = threadIdx.x % kPartColumns, row = threadIdx.x / kPartColumns;
  for (int64_t first = int64_t(blockIdx.x) * kPartColumns; first < count; first += int64_t(gridDim.x) * kPartColumns) {
    const int64_t i = first + column;
    Acc sum = 0;
#pragma unroll 4
    for (int64_t p = row; p < num_parts; p += kPartRows) sum += i < count ? parts[p * count + i] : Acc(0);
    rows[row][column] = sum;
    __syncthreads();
    for (int half = kPartRows / 2; half > 0; half /= 2) {
      if (row < half) rows[row][column] += rows[row + half][column];
      __syncthreads();
    }
    if (row == 0 && i < count) out[i] = from_acc<Out>(scale * rows[0][column]);
  }
}

template <class Acc, class Out>
void launch_sum_parts(const Acc* parts, int64_t num_parts, int64_t count, Acc scale, Out* out, stream_t stream) {
  const dim3 grid(block_count(ceil_div(count, kPartColumns))), block(kPartColumns * kPartRows);
  NEUROMOD_LAUNCH((sum_parts_kernel<Acc, Out>), grid, block, 0, stream, parts, num_parts, count, scale, out);
}

}  // namespace neuromod
