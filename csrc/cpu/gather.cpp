#include "gather.h"

#include <algorithm>

namespace safecode::cpu {
namespace {

constexpr int64_t kFirstRoom = 8 * kScanChunk;  // candidates that a row may have before the buffer grows
constexpr float kHarmlessBias = 1e30f;          // a sum of this and a finite logit rounds to a finite number

Candidates failed(Status status) { return {nullptr, nullptr, nullptr, 0, 0, status}; }

void grow(Found& found, Workspace& work, int64_t capacity) {
  work.tokens.resize(static_cast<size_t>(capacity));
  work.clean.resize(static_cast<size_t>(capacity));
  found.tokens = work.tokens.data();
  found.logits = work.clean.data();
  found.capacity = capacity;
}

// Tokens with z + gather.raise >= gather.floor(best), behind the maxima that the scan left in the workspace.
Found collect(const RowInput& input, const Gather& gather, float best, Workspace& work) {
  Found found{room(work.tokens, kFirstRoom), room(work.clean, kFirstRoom), 0, 0};
  found.capacity = static_cast<int64_t>(std::min(work.tokens.size(), work.clean.size()));
  const void* maxima = work.maxima.data();
  const int64_t chunks = chunks_of(input.clean.size);
  int64_t chunk = 0;
  while ((chunk = loops().collect(input.clean, maxima, gather, best, chunk, found)) < chunks) {
    grow(found, work, 2 * found.capacity);
  }
  return found;
}

// Keeps the tokens for which stays(i), in order.
template <class Predicate>
void keep_if(Found& found, Predicate&& stays) {
  int64_t size = 0;
  for (int64_t i = 0; i < found.size; ++i) {
    const bool kept = stays(i);
    found.tokens[size] = found.tokens[i];
    found.logits[size] = found.logits[i];
    size += kept;
  }
  found.size = size;
}

// Exactly the tokens that pass the cut when all of the mask is biased: z + b >= max (z + b) + log(beta). The tokens of the
// mask come last; returns how many they are. They are read from their list, since a boost lifts them over a threshold
// that says nothing about them, and the others are found with the threshold that they must pass themselves.
int64_t collect_biased(const RowInput& input, float best, Workspace& work, Found& found) {
  const Mask& mask = *input.mask;
  const float bias = input.bias();
  float* refusal_logits = room(work.spare, mask.size);
  loops().read(input.clean, mask.tokens, mask.size, refusal_logits);
  const float best_refusal = loops().maximum(refusal_logits, mask.size);
  // The largest z + b is at least this; it is more only if a suppressed token is the row's best.
  float top = bias > 0 ? std::max(best, best_refusal + bias) : best_refusal < best ? best : best + bias;
  found = collect(input, {0.0f, 0.0f, input.params.log_beta}, top, work);
  keep_if(found, [&](int64_t i) { return !in_mask(mask.words, found.tokens[i]); });
  if (bias < 0 && best_refusal == best) {
    for (int64_t i = 0; i < found.size; ++i) top = std::max(top, found.logits[i]);
  }
  const float floor = Gather{0.0f, 0.0f, input.params.log_beta}.floor(top);
  if (bias < 0) keep_if(found, [&](int64_t i) { return found.logits[i] >= floor; });
  if (found.capacity < found.size + mask.size + 1) grow(found, work, 2 * (found.size + mask.size + 1));
  const int64_t others = found.size;
  for (int64_t i = 0; i < mask.size; ++i) {
    found.tokens[found.size] = mask.tokens[i];
    found.logits[found.size] = refusal_logits[i];
    found.size += refusal_logits[i] > -kInfinity && refusal_logits[i] + bias >= floor;
  }
  return found.size - others;
}

Candidates gather_candidates(const RowInput& input, Workspace& work) {
  const Loops& loop = loops();
  const RowParams& params = input.params;
  const float bias = input.bias();
  const float best = loop.chunk_maxima(input.clean, room(work.maxima, maxima_of(input.clean.size) * kLargestRank));
  const Status status = status_of_best(best);
  if (status != Status::kOk) return failed(status);
  Found found;
  int64_t refusals = 0;
  if (bias != 0 && params.scope == 0) {
    refusals = collect_biased(input, best, work, found);
  } else {
    found = collect(input, {std::max(bias, 0.0f), std::min(bias, 0.0f), params.log_beta}, best, work);
  }
  Candidates all{found.tokens, found.logits, room(work.scores, found.size), found.size, refusals, Status::kOk};
  if (!input.uses_noised()) {
    std::copy(all.clean, all.clean + all.size, all.scores);
    return all;
  }
  float* noised = room(work.noised, all.size);
  loop.read(input.noised, all.tokens, all.size, noised);
  const ContrastParams contrast{params.weight, params.one_plus_weight, true};
  all.status = status_of_contrast(loop.contrast(all.clean, noised, all.size, contrast, all.scores));
  return all;
}

// fp32 logits [begin, begin + n): where they are, or widened into `buffer`.
const float* as_float(const LogitRow& row, int64_t begin, int64_t n, float* buffer) {
  if (row.dtype == DType::kFloat32) return static_cast<const float*>(row.data) + begin;
  loops().convert(row, begin, n, buffer);
  return buffer;
}

// Every token of the row, looked at and contrasted while its two logits lie in the first cache. The clean logits are kept
// only if a bias might push them beyond fp32, since only then the cut looks at them again.
Candidates gather_all(const RowInput& input, Workspace& work) {
  const Loops& loop = loops();
  const int64_t size = input.clean.size;
  const bool keeps_clean = input.bias() > kHarmlessBias;
  float* clean = room(work.clean, keeps_clean ? size : kBlock);
  float* scores = room(work.scores, size);
  float* noised_buffer = room(work.noised, kBlock);
  const ContrastParams contrast{input.params.weight, input.params.one_plus_weight, true};
  float best = -kInfinity;
  uint32_t met = 0;
  for (int64_t i = 0; i < size; i += kBlock) {
    const int64_t n = std::min(kBlock, size - i);
    const float block_best = loop.largest_logit(input.clean, i, n);
    if (!(block_best <= best)) best = block_best;
    if (best != best) return failed(Status::kNanClean);
    if (keeps_clean) loop.convert(input.clean, i, n, clean + i);
    if (!input.uses_noised()) {
      loop.convert(input.clean, i, n, scores + i);
      continue;
    }
    const float* z = keeps_clean ? clean + i : as_float(input.clean, i, n, clean);
    met |= loop.contrast(z, as_float(input.noised, i, n, noised_buffer), n, contrast, scores + i);
  }
  const Status status = status_of_best(best);
  return {nullptr, keeps_clean ? clean : nullptr, scores, size, 0,
          status == Status::kOk ? status_of_contrast(met) : status};
}

}  // namespace

Candidates gather(const RowInput& input, Workspace& work) {
  return input.is_dense() ? gather_all(input, work) : gather_candidates(input, work);
}

}  // namespace safecode::cpu
