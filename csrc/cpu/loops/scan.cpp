// The one pass over the clean row, and the candidates that it leaves.
#include "formats.h"

namespace safecode::cpu::SAFECODE_ISA {
namespace {

static_assert(kLanes == kChunksAtOnce * kChunkLanes, "chunks are compared side by side");

// The smallest rank whose logit is gathered, given the floor. `is_gathered` is monotone in the logit.
template <class Format>
typename Format::Rank least_gathered_rank(const Gather& gather, float floor) {
  const auto gathered = [&](int64_t rank) {
    using Rank = typename Format::Rank;
    return is_gathered(Format::value(Format::bits(static_cast<Rank>(rank))), gather.raise, floor);
  };
  // Ranks below `low` are not gathered, `high` is: gallop away from the guess, then halve what is left.
  int64_t low = kExcludedRank<Format> + int64_t{1};
  int64_t high = Format::rank(Format::kInfinityBits);
  int64_t guess = Format::rank(Format::nearest_below(floor - gather.raise));
  guess = guess < low ? low : guess > high ? high : guess;
  if (gathered(guess)) {
    high = guess;
    for (int64_t step = 1; low < high; step *= 2) {
      const int64_t probe = high - step > low ? high - step : low;
      if (!gathered(probe)) {
        low = probe + 1;
        break;
      }
      high = probe;
    }
  } else {
    low = guess + 1;
    for (int64_t step = 1; low < high; step *= 2) {
      const int64_t probe = low + step - 1 < high ? low + step - 1 : high - 1;
      if (gathered(probe)) {
        high = probe;
        break;
      }
      low = probe + 1;
    }
  }
  while (low < high) {
    const int64_t middle = low + ((high - low) >> 1);
    if (gathered(middle)) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return static_cast<typename Format::Rank>(high);
}

// Folds the running maxima of a chunk into the ones that are kept, and these into the row's.
template <class Format>
inline void fold(Lanes<Format>& lanes, typename Format::Key* kept, typename Format::Key (&best)[kChunkLanes]) {
  for (int64_t width = Format::kLanes / 2; width >= kChunkLanes; width /= 2) {
    for (int64_t lane = 0; lane < width; ++lane) lanes[lane] = larger(lanes[lane], lanes[lane + width]);
  }
  for (int64_t lane = 0; lane < kChunkLanes; ++lane) {
    kept[lane] = lanes[lane];
    best[lane] = larger(best[lane], lanes[lane]);
  }
}

// The maxima of one chunk. Its logits are whole lanes, so that the compiler keeps them in registers.
template <class Format>
inline void scan_chunk(const typename Format::Bits* logits, typename Format::Key* kept,
                       typename Format::Key (&best)[kChunkLanes], NanFlags<Format>& nan) {
  Lanes<Format> lanes;
  start<Format>(lanes);
  for (int64_t i = 0; i < kScanChunk; i += Format::kLanes) take<Format>(logits + i, lanes, nan);
  fold<Format>(lanes, kept, best);
}

template <class Format>
float chunk_maxima_format(const LogitRow& row, void* maxima) {
  using Key = typename Format::Key;
  static_assert(kScanChunk % Format::kLanes == 0 && Format::kLanes % kChunkLanes == 0, "lanes fold into maxima");
  const auto* logits = static_cast<const typename Format::Bits*>(row.data);
  auto* kept = static_cast<Key*>(maxima);
  const auto* end = kept + maxima_of(row.size);
  Key best[kChunkLanes];
  for (Key& lane : best) lane = excluded_key<Format>();
  NanFlags<Format> nan = {};
  const int64_t whole = row.size - row.size % kScanChunk;
  for (int64_t begin = 0; begin < whole; begin += kScanChunk, kept += kChunkLanes) {
    scan_chunk<Format>(logits + begin, kept, best, nan);
  }
  if (whole < row.size) {
    typename Format::Bits rest[kScanChunk];
    for (auto& logit : rest) logit = Format::bits(kExcludedRank<Format>);
    memcpy(rest, logits + whole, static_cast<size_t>(row.size - whole) * sizeof(*rest));
    scan_chunk<Format>(rest, kept, best, nan);
    kept += kChunkLanes;
  }
  while (kept < end) *kept++ = excluded_key<Format>();  // `collect` looks at several chunks at once
  return largest<Format>(best, kChunkLanes, nan);
}

// One byte per lane of several chunks: whether it holds a candidate. Returns whether any does.
template <class Key>
inline bool find_hits(const Key* lanes, Key least, uint64_t (&hits)[kLanes / 8]) {
  uint8_t hit[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane) hit[lane] = lanes[lane] >= least;
  memcpy(hits, hit, sizeof(hits));
  uint64_t any = 0;
  for (const uint64_t eight : hits) any |= eight;
  return any != 0;
}

// Appends the candidates among logits begin, begin + kChunkLanes, ... below end.
template <class Format>
inline void append(const typename Format::Bits* logits, int64_t begin, int64_t end, float least, Found& found) {
  int32_t* tokens = found.tokens;
  float* values = found.logits;
  int64_t size = found.size;
  for (int64_t i = begin; i < end; i += kChunkLanes) {  // no branch: it would be mispredicted at every candidate
    const float value = Format::value(logits[i]);
    tokens[size] = static_cast<int32_t>(i);
    values[size] = value;
    size += value >= least;
  }
  found.size = size;
}

template <class Format>
int64_t collect_format(const LogitRow& row, const void* maxima, const Gather& gather, float best, int64_t chunk,
                       Found& found) {
  using Key = typename Format::Key;
  const auto* logits = static_cast<const typename Format::Bits*>(row.data);
  const auto* kept = static_cast<const Key*>(maxima);
  const auto least_bits = Format::bits(least_gathered_rank<Format>(gather, gather.floor(best)));
  const Key least_key = Format::key(least_bits);
  const float least = Format::value(least_bits);
  const int64_t chunks = chunks_of(row.size);
  for (; chunk < chunks; chunk += kChunksAtOnce) {
    uint64_t hits[kLanes / 8];
    if (!find_hits(kept + chunk * kChunkLanes, least_key, hits)) continue;
    if (found.capacity - found.size <= kChunksAtOnce * kScanChunk) return chunk;
    for (int64_t eight = 0; eight < kLanes / 8; ++eight) {
      for (uint64_t left = hits[eight]; left; left &= left - 1) {  // each byte is 0 or 1
        const int64_t lane = 8 * eight + __builtin_ctzll(left) / 8;
        const int64_t begin = (chunk + lane / kChunkLanes) * kScanChunk;
        const int64_t end = row.size < begin + kScanChunk ? row.size : begin + kScanChunk;
        append<Format>(logits, begin + lane % kChunkLanes, end, least, found);
      }
    }
  }
  return chunk;
}

}  // namespace

float chunk_maxima(const LogitRow& row, void* maxima) {
  return with_format(row.dtype, [&](auto format) { return chunk_maxima_format<decltype(format)>(row, maxima); });
}

int64_t collect(const LogitRow& row, const void* maxima, const Gather& gather, float best, int64_t chunk, Found& found) {
  return with_format(row.dtype, [&](auto format) {
    return collect_format<decltype(format)>(row, maxima, gather, best, chunk, found);
  });
}

}  // namespace safecode::cpu::SAFECODE_ISA
