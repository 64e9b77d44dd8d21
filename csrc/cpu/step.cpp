#include "step.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "threads.h"

namespace safecode::cpu {
namespace {

Workspace& workspace() {
  static thread_local Workspace memory;
  return memory;
}

const void* row_at(LogitMatrix logits, DType dtype, int64_t row) {
  if (!logits.data) return nullptr;
  const int64_t size = dtype == DType::kFloat32 ? 4 : 2;
  return static_cast<const char*>(logits.data) + row * logits.row_stride * size;
}

uint64_t step_of(StepIndex step, int64_t row) {
  return step.of_row ? static_cast<uint64_t>(step.of_row[row]) : step.all;
}

// Appends the numbers of the bits that are set: few, so that most looks at several words find none.
void list_tokens(const int32_t* words, int64_t width, std::vector<int32_t>& tokens) {
  constexpr int64_t kLook = 4;
  for (int64_t i = 0; i < width; i += kLook) {
    const int64_t end = std::min(width, i + kLook);
    int32_t any = 0;
    for (int64_t word = i; word < end; ++word) any |= words[word];
    for (int64_t word = i; any && word < end; ++word) {
      for (auto left = static_cast<uint32_t>(words[word]); left; left &= left - 1) {
        tokens.push_back(static_cast<int32_t>(32 * word + __builtin_ctz(left)));
      }
    }
  }
}

void store(const RowResult& result, int64_t row, const ResultColumns& out) {
  out.token[row] = result.token;
  out.logprob[row] = result.logprob;
  out.n_kept[row] = result.n_kept;
  out.status[row] = static_cast<int32_t>(result.status);
}

}  // namespace

Step::Step(DType dtype, int64_t rows, int64_t vocab_size, const double* packed)
    : dtype_(dtype), rows_(rows), vocab_size_(vocab_size), params_(static_cast<size_t>(rows)) {
  for (int64_t row = 0; row < rows; ++row) {
    params_[row] = unpack_row(packed, rows, row);
    if (const char* field = illegal_field(params_[row])) {
      throw std::invalid_argument("params: " + std::string(field) + " of row " + std::to_string(row) +
                                  " is out of range; make params with pack_params");
    }
  }
}

void Step::set_masks(const int32_t* words, int64_t n_masks) {
  words_ = words;
  masks_.assign(static_cast<size_t>(n_masks), {});
}

void Step::set_key(const int64_t* seeds, const int64_t* streams) {
  keys_.resize(static_cast<size_t>(rows_));
  for (int64_t row = 0; row < rows_; ++row) {
    keys_[row] = {static_cast<uint64_t>(seeds[row]), static_cast<uint32_t>(streams[row]), 0};
  }
}

int64_t Step::mask_of(const int64_t* mask_ids, int64_t row) const {
  return mask_ids ? mask_ids[row] : masks_.empty() ? -1 : 0;
}

bool Step::use_masks(const int64_t* mask_ids) {
  const int64_t width = (vocab_size_ + 31) / 32;
  for (int64_t row = 0; row < rows_; ++row) {
    const int64_t id = mask_of(mask_ids, row);
    if (id < -1 || id >= static_cast<int64_t>(masks_.size())) return false;
    if (id < 0 || masks_[id].mask.words || params_[row].bias == 0) continue;
    ListedMask& listed = masks_[id];
    const int32_t* words = words_ + id * width;
    listed.tokens.reserve(256);  // refusal masks hold a few hundred tokens
    list_tokens(words, width, listed.tokens);
    while (!listed.tokens.empty() && listed.tokens.back() >= vocab_size_) listed.tokens.pop_back();
    listed.mask = {words, listed.tokens.data(), static_cast<int64_t>(listed.tokens.size())};
  }
  return true;
}

RowInput Step::input(LogitMatrix clean, LogitMatrix noised, const int64_t* mask_ids, int64_t row) const {
  const int64_t id = mask_of(mask_ids, row);
  return {{row_at(clean, dtype_, row), dtype_, vocab_size_},
          {row_at(noised, dtype_, row), dtype_, vocab_size_},
          params_[row],
          id < 0 ? nullptr : &masks_[id].mask};
}

bool Step::decode(LogitMatrix clean, LogitMatrix noised, const int64_t* mask_ids, StepIndex step,
                  const ResultColumns& out, int64_t threads) const {
  for (int64_t row = 0; row < rows_; ++row) {
    if (step.of_row && step.of_row[row] < 0) return false;
    if (keys_.empty() && !params_[row].greedy) return false;
  }
  const auto one_row = [&](int64_t row) {
    DrawKey key{};
    if (!keys_.empty()) key = {keys_[row].seed, keys_[row].stream, step_of(step, row)};
    const RowInput row_input = input(clean, noised, mask_ids, row);
    store(decode_row(row_input, keys_.empty() ? nullptr : &key, workspace()), row, out);
  };
  if (threads > 1) {
    for_each_row(rows_, threads, one_row);
  } else {
    for (int64_t row = 0; row < rows_; ++row) one_row(row);
  }
  return true;
}

void Step::scores(LogitMatrix clean, LogitMatrix noised, const int64_t* mask_ids, const ScoreMatrices& out,
                  int64_t threads) const {
  for_each_row(rows_, threads, [&](int64_t row) {
    const int64_t begin = row * vocab_size_;
    const Status status = score_row(input(clean, noised, mask_ids, row), out.scores + begin, out.biased_clean + begin,
                                    out.keep + begin, workspace());
    out.status[row] = static_cast<int32_t>(status);
  });
}

void draw(DType dtype, int64_t rows, int64_t vocab_size, LogitMatrix scores, const int64_t* seeds,
          const int64_t* streams, StepIndex step, const ResultColumns& out, int64_t threads) {
  for_each_row(rows, threads, [&](int64_t row) {
    DrawKey key{};
    if (seeds) key = {static_cast<uint64_t>(seeds[row]), static_cast<uint32_t>(streams[row]), step_of(step, row)};
    const LogitRow logits{row_at(scores, dtype, row), dtype, vocab_size};
    store(draw_row(logits, seeds ? &key : nullptr, workspace()), row, out);
  });
}

}  // namespace safecode::cpu
