// The one pass over the clean row: its maximum, and what lies within reach of it. With a bias that is known to reach
// all of the mask, both are those of the lifted logits, clean + bias at the tokens of the mask: exactly what the cut
// will see.
#pragma once

#include "row.cuh"

namespace safecode::cuda {

constexpr int kVectorsPerThread = 6;  // 16-byte loads in flight per thread
constexpr uint32_t kTileVectors = kThreads * kVectorsPerThread;

// A block's share of a row: vectors [begin, end) of those that begin at `head`, the first logit that lies on a 16-byte
// boundary. The logits before the first and after the last whole vector, `edges` of them, belong to the last block.
template <class Format>
struct Slice {
  static constexpr uint32_t kVector = Vector<Format>::kSize;
  Logits<Format> row;
  uint32_t vocab_size, head;
  uint32_t begin, end, edges;

  __device__ static Slice of(const Logits<Format>& row, uint32_t vocab_size, int rank, int size) {
    const auto address = reinterpret_cast<uintptr_t>(row.data);
    const auto to_boundary = static_cast<uint32_t>((16 - (address & 15)) & 15);
    const uint32_t to_body = to_boundary / sizeof(typename Format::Bits);
    const uint32_t head = to_body < vocab_size ? to_body : vocab_size;
    const uint32_t vectors = (vocab_size - head) / kVector;
    const uint32_t each = (vectors + size - 1) / size;
    const uint32_t begin = rank * each, end = begin + each;
    const uint32_t edges = rank == size - 1 ? vocab_size - vectors * kVector : 0;
    return {row, vocab_size, head, begin < vectors ? begin : vectors, end < vectors ? end : vectors, edges};
  }
  __device__ uint32_t first_token(uint32_t index) const { return head + index * kVector; }
  __device__ uint32_t token_of_edge(uint32_t i) const { return i < head ? i : vocab_size - edges + i; }
  __device__ Vector<Format> load(uint32_t index) const {
    return Vector<Format>::load(row.data + head + uint64_t{index} * kVector);
  }
  // Which tokens of a vector are in the mask, a bit each; a row that does not lie on a boundary straddles its words.
  __device__ uint32_t refusals(uint32_t index, const int32_t* words) const {
    const uint32_t token = first_token(index), shift = token & 31;
    uint32_t bits = static_cast<uint32_t>(__ldg(words + token / 32)) >> shift;
    if (shift > 32 - kVector) bits |= static_cast<uint32_t>(__ldg(words + token / 32 + 1)) << (32 - shift);
    return bits;
  }
};

// What a thread holds in registers of one step of the scan.
template <class Format>
struct Tile {
  static constexpr int kVector = Vector<Format>::kSize;
  Vector<Format> vector[kVectorsPerThread];
  uint32_t refusals[kVectorsPerThread];

  __device__ static uint32_t index(uint32_t first, int k) { return first + k * kThreads + threadIdx.x; }

  __device__ void load(const Slice<Format>& slice, uint32_t first) {
#pragma unroll
    for (int k = 0; k < kVectorsPerThread; ++k) {
      vector[k] = index(first, k) < slice.end ? slice.load(index(first, k)) : Vector<Format>::excluded();
    }
  }
  __device__ void load_refusals(const Slice<Format>& slice, uint32_t first, const int32_t* words) {
#pragma unroll
    for (int k = 0; k < kVectorsPerThread; ++k) {
      refusals[k] = index(first, k) < slice.end ? slice.refusals(index(first, k), words) : 0;
    }
  }

  __device__ float best() const {
    float top = -kInfinity;
#pragma unroll
    for (int k = 0; k < kVectorsPerThread; ++k) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) top = max_nan(top, vector[k].at(i));
    }
    return top;
  }
  __device__ float best_lifted(float lift) const {
    float top = -kInfinity;
#pragma unroll
    for (int k = 0; k < kVectorsPerThread; ++k) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float clean = vector[k].at(i);
        top = max_nan(top, refusals[k] >> i & 1 ? clean + lift : clean);
      }
    }
    return top;
  }
};

// Appends what is gathered of this thread's part of a tile; counts what finds no room. The few threads that come here
// read their logits again, from the cache: kept in registers until the block's maximum is known they would cost too
// many.
template <class Format>
__device__ inline void push(const Slice<Format>& slice, uint32_t first, float raise, float floor) {
  constexpr int kVector = Vector<Format>::kSize;
  const Row& row = shared().row;
  Found& found = shared().found;
#pragma unroll 1
  for (uint32_t index = first + threadIdx.x; index < slice.end && index < first + kTileVectors; index += kThreads) {
    const auto vector = slice.load(index);
    const uint32_t refusals = row.bias != 0 ? slice.refusals(index, row.words) : 0;
    uint32_t hits = 0;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (is_gathered(row.lifted(vector.at(i), refusals >> i & 1), raise, floor)) hits |= 1u << i;
    }
    if (!hits) continue;
    int place = atomicAdd(&found.size, __popc(hits));
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (!(hits >> i & 1)) continue;
      if (place < kScanCapacity) {
        found.token[place] = (slice.first_token(index) + i) | (refusals >> i & 1 ? kRefusal : 0);
        found.clean[place] = vector.at(i);
      }
      ++place;
    }
  }
}

// Maximum over the block with a single barrier: consecutive calls use the two halves of `warp_best` in turn.
__device__ inline float best_of_block(float best, int half) {
  float* warp_best = shared().warp_best[half];
  best = reduce_warp(best, LargerOrNan());
  if (lane() == 0) warp_best[warp()] = best;
  __syncthreads();
  best = warp_best[0];
  for (int i = 1; i < kWarps; ++i) best = max_nan(best, warp_best[i]);
  return best;
}

// The logits that no vector holds, one per thread; returns their maximum.
template <class Format>
__device__ inline float scan_edges(const Slice<Format>& slice, const Gather& gather) {
  const Row& row = shared().row;
  float clean = -kInfinity;
  uint32_t token = 0;
  if (threadIdx.x < slice.edges) {
    token = slice.token_of_edge(threadIdx.x);
    clean = slice.row.at(token);
    if (row.bias != 0 && in_mask(row.words, token)) token |= kRefusal;
  }
  const float lifted = row.lifted(clean, token & kRefusal);
  const float best = best_of_block(lifted, 1);
  if (is_gathered(lifted, gather.raise, gather.floor(best))) {
    const int place = atomicAdd(&shared().found.size, 1);
    shared().found.token[place] = token;
    shared().found.clean[place] = clean;
  }
  return best;
}

// Scans the slice into shared().found, whose size was zeroed before a barrier; returns its maximum, NaN if there is
// one. `tile` holds the first logits. Ends with a barrier.
template <class Format>
__device__ float scan(const Slice<Format>& slice, Tile<Format> tile, const Gather& gather) {
  const float lift = shared().row.lift;
  const int32_t* words = shared().row.words;
  if (lift != 0) tile.load_refusals(slice, slice.begin, words);
  float best = slice.edges ? scan_edges(slice, gather) : -kInfinity;
  int half = 0;
  for (uint32_t first = slice.begin; first < slice.end; first += kTileVectors) {
    const float top = lift != 0 ? tile.best_lifted(lift) : tile.best();
    // The next logits are on their way while the block agrees on the maximum.
    tile.load(slice, first + kTileVectors);
    if (lift != 0) tile.load_refusals(slice, first + kTileVectors, words);
    best = max_nan(best, best_of_block(top, half));
    const float floor = gather.floor(best);
    if (is_gathered(top, gather.raise, floor)) push(slice, first, gather.raise, floor);
    half ^= 1;
  }
  __syncthreads();
  return best;
}

}  // namespace safecode::cuda
