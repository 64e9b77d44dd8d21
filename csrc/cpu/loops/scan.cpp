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
  typename Format::Key top[kChunkLanes];  // nothing that `kept` could overlap: the compiler would not vectorise
  for (int64_t lane = 0; lane < kChunkLanes; ++lane) {
    top[lane] = lanes[lane];
    for (int64_t other = lane + kChunkLanes; other < Format::kLanes; other += kChunkLanes) {
      top[lane] = larger(top[lane], lanes[other]);
    }
    best[lane] = larger(best[lane], top[lane]);
  }
  memcpy(kept, top, sizeof(top));
}

// The maxima of one chunk. Its logits are whole lanes, so that the compiler keeps them in registers.
template <class Format>
inline void scan_chunk(const typename Format::Stored* logits, typename Format::Key* kept,
                       typename Format::Key (&best)[kChunkLanes], Magnitudes<Format>& magnitudes) {
  Lanes<Format> lanes;
  start<Format>(logits, lanes, magnitudes);
  for (int64_t i = Format::kLanes; i < kScanChunk; i += Format::kLanes) take<Format>(logits + i, lanes, magnitudes);
  fold<Format>(lanes, kept, best);
}

template <class Format>
float chunk_maxima_format(const LogitRow& row, void* maxima) {
  using Key = typename Format::Key;
  static_assert(kScanChunk % Format::kLanes == 0 && Format::kLanes % kChunkLanes == 0, "lanes fold into maxima");
  const auto* logits = static_cast<const typename Format::Stored*>(row.data);
  auto* kept = static_cast<Key*>(maxima);
  const auto* end = kept + maxima_of(row.size);
  Key best[kChunkLanes];
  for (Key& lane : best) lane = excluded_key<Format>();
  Magnitudes<Format> magnitudes = {};
  const int64_t whole = row.size - row.size % kScanChunk;
  for (int64_t begin = 0; begin < whole; begin += kScanChunk, kept += kChunkLanes) {
    scan_chunk<Format>(logits + begin, kept, best, magnitudes);
  }
  if (whole < row.size) {
    typename Format::Stored rest[kScanChunk];
    for (auto& logit : rest) logit = bit_cast<typename Format::Stored>(Format::bits(kExcludedRank<Format>));
    memcpy(rest, logits + whole, static_cast<size_t>(row.size - whole) * sizeof(*rest));
    scan_chunk<Format>(rest, kept, best, magnitudes);
    kept += kChunkLanes;
  }
  while (kept < end) *kept++ = excluded_key<Format>();  // `collect` looks at several chunks at once
  return largest<Format>(best, kChunkLanes, magnitudes);
}

// One bit per lane of several chunks: whether it holds a candidate.
template <class Key>
inline uint64_t find_hits(const Key* lanes, Key least) {
  uint8_t hit[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane) hit[lane] = lanes[lane] >= least;
  uint64_t bytes[kLanes / 8];
  memcpy(bytes, hit, sizeof(bytes));
  uint64_t any = 0, bits = 0;
  for (const uint64_t eight : bytes) any |= eight;
  if (!any) return 0;
  // The product brings the lowest bit of each byte to the top byte, in order.
  for (int64_t i = 0; i < kLanes / 8; ++i) bits |= (bytes[i] * 0x0102040810204080u >> 56) << 8 * i;
  return bits;
}

// Appends the candidates among logits begin, begin + kChunkLanes, ... below end.
template <class Format>
inline void append(const typename Format::Stored* logits, int64_t begin, int64_t end, float least, Found& found) {
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
  const auto* logits = static_cast<const typename Format::Stored*>(row.data);
  const auto* kept = static_cast<const Key*>(maxima);
  const auto least_bits = Format::bits(least_gathered_rank<Format>(gather, gather.floor(best)));
  const Key least_key = Format::key_of(least_bits);
  const float least = Format::value(least_bits);
  const int64_t chunks = chunks_of(row.size);
  for (; chunk < chunks; chunk += kChunksAtOnce) {
    uint64_t hits = find_hits(kept + chunk * kChunkLanes, least_key);
    if (!hits) continue;
    if (found.capacity - found.size <= kChunksAtOnce * kScanChunk) return chunk;
    for (; hits; hits &= hits - 1) {
      const int64_t lane = __builtin_ctzll(hits);
      const int64_t begin = (chunk + lane / kChunkLanes) * kScanChunk;
      const int64_t end = row.size < begin + kScanChunk ? row.size : begin + kScanChunk;
      append<Format>(logits, begin + lane % kChunkLanes, end, least, found);
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
