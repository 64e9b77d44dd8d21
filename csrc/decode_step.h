// The contract that all native code shares: parameters of a row, statuses, dtypes, what a row's result is.
// B rows, V tokens; strides count elements. safecode_kernels/contract.py says the same in Python.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SAFECODE_HOST_DEVICE __host__ __device__
#else
#define SAFECODE_HOST_DEVICE
#endif

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

// Reads the parameters of a row from float64 [10, rows], packed as safecode_kernels.contract.PACKED_FIELDS says.
SAFECODE_HOST_DEVICE inline RowParams unpack_row(const double* packed, int64_t rows, int64_t row) {
  const auto field = [&](int64_t index) { return packed[index * rows + row]; };
  RowParams params;
  params.weight = static_cast<float>(field(0));
  params.one_plus_weight = static_cast<float>(field(1));
  params.bias = static_cast<float>(field(2));
  params.scope = static_cast<int64_t>(field(3));
  params.log_beta = static_cast<float>(field(4));
  params.temperature = static_cast<float>(field(5));
  params.top_k = static_cast<int64_t>(field(6));
  params.top_p = field(7);
  params.log_min_p = static_cast<float>(field(8));
  params.greedy = field(9) != 0;
  return params;
}

// What is wrong with the parameters of a row, null if nothing: what follows relies on these ranges.
inline const char* illegal_field(const RowParams& p) {
  const auto in_range = [](double x, double low, double high) { return x >= low && x <= high; };  // false for NaN
  constexpr double kLargest = 3.4028234663852886e38, kInt32 = 2147483647.0;
  if (!in_range(p.weight, 0, kLargest)) return "weight";
  if (!in_range(p.one_plus_weight, 1, kLargest)) return "one_plus_weight";
  if (!in_range(p.bias, -kLargest, kLargest)) return "bias";
  if (!in_range(static_cast<double>(p.scope), 0, kInt32)) return "scope";
  if (!(p.log_beta <= 0)) return "log_beta";
  if (!(p.temperature > 0) || !in_range(p.temperature, 0, kLargest)) return "temperature";
  if (!in_range(static_cast<double>(p.top_k), 0, kInt32)) return "top_k";
  if (!(p.top_p > 0) || !in_range(p.top_p, 0, 1)) return "top_p";
  return p.log_min_p <= 0 ? nullptr : "log_min_p";
}

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
