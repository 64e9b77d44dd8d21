// The contract that all native code shares: parameters of a row, statuses, dtypes, what a row's result is.
// B rows, V tokens; strides count elements. safecode_kernels/contract.py says the same in Python.
#pragma once

#include <cstdint>

namespace safecode {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Why a row could not be decoded; the first that applies in the order NaN clean, +inf clean, NaN noised, +inf noised or
// a score that overflows, nothing finite.
enum class Status : int32_t { kOk = 0, kNanClean = 1, kNanNoised = 2, kNothingFinite = 3, kInfinite = 4 };

// Already validated, rounded on the host. A greedy row holds the neutral temperature and filters.
struct RowParams {
  float weight;           // a in (1 + a) z - a n; 0 never reads the noised row
  float one_plus_weight;  // 1 + a
  float bias;             // added to the tokens of the row's mask
  float log_beta;         // -inf keeps every token
  float temperature;
  float log_min_p;  // -inf is off
  double top_p;     // 1 is off
  int64_t scope;    // 0 is off
  int64_t top_k;    // 0 is off
  bool greedy;
};

// What a draw depends on besides the token.
struct DrawKey {
  uint64_t seed;
  uint32_t stream;
  uint64_t step;
};

struct RowResult {
  int64_t token;
  float logprob;
  int32_t n_kept;
  Status status;
};

// One row of logits; `data` points at its first logit, neighbouring logits are neighbours in memory.
struct LogitRow {
  const void* data;
  DType dtype;
  int64_t size;
};

}  // namespace safecode
