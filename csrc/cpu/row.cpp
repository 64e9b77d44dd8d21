#include "row.h"

#include <algorithm>

#include "select.h"

namespace safecode::cpu {
namespace {

constexpr int64_t kFirstRoom = 4 * kScanChunk;  // candidates that a row may have before the buffer is pruned or grows
constexpr float kHarmlessBias = 1e30f;          // a sum of this and a finite logit rounds to a finite number
constexpr int64_t kBlock = 4096;                // tokens whose two logits lie in the first cache at a time

RowResult failed(Status status) { return {0, -kInfinity, 0, status}; }

Status status_of_best(float best) {
  if (best != best) return Status::kNanClean;
  if (best == kInfinity) return Status::kInfinite;
  return best == -kInfinity ? Status::kNothingFinite : Status::kOk;
}

Status status_of_contrast(uint32_t met) {
  if (met & kMetNanNoised) return Status::kNanNoised;
  return met & (kMetInfiniteNoised | kMetOverflow) ? Status::kInfinite : Status::kOk;
}

bool uses_noised(const RowInput& input) { return input.noised.data && input.params.weight != 0; }

float row_bias(const RowInput& input) { return input.words ? input.params.bias : 0.0f; }

Gather gather_of(const RowInput& input) {
  const float bias = row_bias(input);
  return {std::max(bias, 0.0f), std::min(bias, 0.0f), input.params.log_beta};
}

float read(const LogitRow& row, int64_t i) {
  if (row.dtype == DType::kFloat32) return static_cast<const float*>(row.data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(row.data)[i];
  return row.dtype == DType::kBFloat16 ? from_bfloat16(bits) : from_float16(bits);
}

// The row's tokens under consideration: clean logits and scores side by side, tokens null = all of them, clean null = the
// cut keeps every token that has a score.
struct Candidates {
  int32_t* tokens;
  float* clean;
  float* scores;
  int64_t size;
  Status status;
};

// Drops candidates below the present threshold.
void prune(Scan& scan) {
  const float floor = scan.gather.floor(scan.best);
  int64_t size = 0;
  for (int64_t i = 0; i < scan.size; ++i) {
    scan.tokens[size] = scan.tokens[i];
    scan.logits[size] = scan.logits[i];
    size += is_gathered(scan.logits[i], scan.gather.raise, floor);
  }
  scan.size = size;
}

void grow(Scan& scan, Workspace& work) {
  scan.capacity *= 2;
  work.tokens.resize(scan.capacity);
  work.clean.resize(scan.capacity);
  scan.tokens = work.tokens.data();
  scan.logits = work.clean.data();
}

// One pass over the clean row; the noised row is read at the candidates only.
Candidates gather_candidates(const RowInput& input, Workspace& work) {
  const Loops& loop = loops();
  room(work.tokens, kFirstRoom);
  room(work.clean, kFirstRoom);
  Scan scan{};
  scan.gather = gather_of(input);
  scan.capacity = static_cast<int64_t>(std::min(work.tokens.size(), work.clean.size()));
  scan.tokens = work.tokens.data();
  scan.logits = work.clean.data();
  loop.start_scan(input.clean.dtype, scan);
  int64_t next = 0;
  while ((next = loop.scan(input.clean, next, scan)) < input.clean.size) {
    prune(scan);
    if (2 * scan.size > scan.capacity) grow(scan, work);
  }
  const Status status = scan.found_nan ? Status::kNanClean : status_of_best(scan.best);
  if (status != Status::kOk) return {nullptr, nullptr, nullptr, 0, status};
  prune(scan);

  Candidates found{scan.tokens, scan.logits, room(work.scores, scan.size), scan.size, Status::kOk};
  if (!uses_noised(input)) {
    std::copy(found.clean, found.clean + found.size, found.scores);
    return found;
  }
  float* noised = room(work.noised, found.size);
  for (int64_t i = 0; i < found.size; ++i) noised[i] = read(input.noised, found.tokens[i]);
  const ContrastParams params{input.params.weight, input.params.one_plus_weight, 0.0f, -kLargestFloat};
  found.status = status_of_contrast(loop.contrast(found.clean, noised, found.size, params, found.scores));
  return found;
}

// fp32 logits [begin, begin + n): where they are, or widened into `buffer`.
const float* as_float(const LogitRow& row, int64_t begin, int64_t n, float* buffer) {
  if (row.dtype == DType::kFloat32) return static_cast<const float*>(row.data) + begin;
  loops().convert(row, begin, n, buffer);
  return buffer;
}

// Every token of the row, both logits widened and contrasted while they lie in the first cache. The clean logits are
// kept only if a bias might push them beyond fp32, since only then the cut looks at them again.
Candidates gather_all(const RowInput& input, Workspace& work) {
  const Loops& loop = loops();
  const int64_t size = input.clean.size;
  const bool keeps_clean = row_bias(input) > kHarmlessBias;
  float* clean = room(work.clean, keeps_clean ? size : kBlock);
  float* scores = room(work.scores, size);
  float* noised_buffer = room(work.noised, kBlock);
  const ContrastParams params{input.params.weight, input.params.one_plus_weight, 0.0f, -kLargestFloat};
  float best = -kInfinity;
  uint32_t met = 0;
  for (int64_t i = 0; i < size; i += kBlock) {
    const int64_t n = std::min(kBlock, size - i);
    float* z = uses_noised(input) ? (keeps_clean ? clean + i : clean) : scores + i;
    const float block_best = loop.widen(input.clean, i, n, z);
    if (!(block_best <= best)) best = block_best;
    if (best != best) return {nullptr, nullptr, nullptr, 0, Status::kNanClean};
    if (uses_noised(input)) {
      met |= loop.contrast(z, as_float(input.noised, i, n, noised_buffer), n, params, scores + i);
    } else if (keeps_clean) {
      std::copy(z, z + n, clean + i);
    }
  }
  const Status status = status_of_best(best);
  return {nullptr, keeps_clean ? clean : nullptr, scores, size,
          status == Status::kOk ? status_of_contrast(met) : status};
}

// Calls function(i) for every candidate in the mask.
template <class Function>
void for_each_refusal(const Candidates& all, const int32_t* words, Function&& function) {
  if (all.tokens) {
    for (int64_t i = 0; i < all.size; ++i) {
      if (in_mask(words, all.tokens[i])) function(i);
    }
    return;
  }
  for (int64_t first = 0; first < all.size; first += 32) {
    auto word = static_cast<uint32_t>(words[first / 32]);
    for (int64_t i = first; word && i < all.size; ++i, word >>= 1) {
      if (word & 1u) function(i);
    }
  }
}

// Adds the bias to the refusal tokens in scope, on both sides of the cut. False if a score became +inf.
bool add_bias(const Candidates& all, const RowInput& input, float threshold) {
  const float bias = row_bias(input);
  bool overflow = false;
  for_each_refusal(all, input.words, [&](int64_t i) {
    if (!(all.scores[i] >= threshold)) return;
    all.scores[i] += bias;
    if (all.clean) all.clean[i] += bias;
    overflow |= !(all.scores[i] < kInfinity);
  });
  return !overflow;
}

// Largest biased clean logit of the tokens that have a score.
float best_allowed(const float* biased_clean, const float* scores, int64_t n) {
  float best = -kInfinity;
#pragma omp simd reduction(max : best)
  for (int64_t i = 0; i < n; ++i) {
    const float allowed = scores[i] > -kInfinity ? biased_clean[i] : -kInfinity;
    best = allowed > best ? allowed : best;
  }
  return best;
}

// Keeps candidates that pass the cut: the gathering with the bias of each token instead of the largest.
Scored cut(const Candidates& all, const RowParams& params, Workspace& work) {
  const float floor = best_allowed(all.clean, all.scores, all.size) + params.log_beta;
  Scored kept{all.scores, all.tokens ? all.tokens : room(work.tokens, all.size), 0};
  for (int64_t i = 0; i < all.size; ++i) {
    const bool stays = all.scores[i] > -kInfinity && all.clean[i] >= floor;
    kept.scores[kept.size] = all.scores[i];
    kept.tokens[kept.size] = all.tokens ? all.tokens[i] : static_cast<int32_t>(i);
    kept.size += stays;
  }
  return kept;
}

}  // namespace

RowResult decode_row(const RowInput& input, const DrawKey* key, Workspace& work) {
  const RowParams& params = input.params;
  const bool dense = params.log_beta == -kInfinity;
  const Candidates all = dense ? gather_all(input, work) : gather_candidates(input, work);
  if (all.status != Status::kOk) return failed(all.status);
  const float bias = row_bias(input);
  if (bias != 0) {
    const float threshold = kth_best(all.scores, all.size, params.scope, work.spare);
    if (!add_bias(all, input, threshold)) return failed(Status::kInfinite);
  }
  Scored scored{all.scores, all.tokens, all.size};
  // With beta 0 only a bias that overflows makes the cut more than a formality.
  const bool needs_cut = dense ? all.clean && bias != 0 : bias != 0 || uses_noised(input);
  if (needs_cut) scored = cut(all, params, work);
  return choose(scored, params, params.greedy ? nullptr : key, work);
}

Status score_row(const RowInput& input, float* scores, float* biased_clean, uint8_t* keep, Workspace& work) {
  const Loops& loop = loops();
  const RowParams& params = input.params;
  const int64_t size = input.clean.size;
  const Gather gather = gather_of(input);
  const float bias = row_bias(input);
  const float best = loop.widen(input.clean, 0, size, biased_clean);
  Status status = status_of_best(best);
  if (status == Status::kOk) {
    const ContrastParams contrast{params.weight, params.one_plus_weight, gather.raise, gather.floor(best)};
    if (uses_noised(input)) {
      float* noised = room(work.noised, size);
      loop.widen(input.noised, 0, size, noised);
      status = status_of_contrast(loop.contrast(biased_clean, noised, size, contrast, scores));
    } else {
      std::copy(biased_clean, biased_clean + size, scores);
    }
    if (status == Status::kOk && bias != 0) {
      const auto is_candidate = [&](int64_t i) {
        return biased_clean[i] > -kInfinity && is_gathered(biased_clean[i], contrast.raise, contrast.floor);
      };
      float threshold = -kInfinity;
      if (params.scope > 0) {
        float* gathered = room(work.scores, size);
        for (int64_t i = 0; i < size; ++i) gathered[i] = is_candidate(i) ? scores[i] : -kInfinity;
        threshold = kth_best(gathered, size, params.scope, work.spare);
      }
      const Candidates all{nullptr, biased_clean, scores, size, Status::kOk};
      for_each_refusal(all, input.words, [&](int64_t i) {
        if (!(scores[i] >= threshold)) return;
        const bool candidate = is_candidate(i);
        scores[i] += bias;
        biased_clean[i] += bias;
        if (scores[i] < kInfinity) return;
        scores[i] = -kInfinity;
        if (candidate) status = Status::kInfinite;
      });
    }
  }
  if (status == Status::kOk) {
    const float floor = best_allowed(biased_clean, scores, size) + params.log_beta;
    for (int64_t i = 0; i < size; ++i) keep[i] = (scores[i] > -kInfinity) & (biased_clean[i] >= floor);
    return loop.maximum(scores, size) == -kInfinity ? Status::kNothingFinite : Status::kOk;
  }
  std::fill(scores, scores + size, -kInfinity);
  std::fill(biased_clean, biased_clean + size, -kInfinity);
  std::fill(keep, keep + size, uint8_t{0});
  return status;
}

RowResult draw_row(const LogitRow& scores, const DrawKey* key, Workspace& work) {
  float* x = room(work.scores, scores.size);
  const Status status = status_of_best(loops().widen(scores, 0, scores.size, x));
  if (status != Status::kOk) return failed(status);
  return finish({x, nullptr, scores.size}, key);
}

}  // namespace safecode::cpu
