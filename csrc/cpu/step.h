// A batch of rows: what the bindings call.
#pragma once

#include <cstdint>
#include <vector>

#include "row.h"

namespace safecode::cpu {

// [B, V] in memory: row r begins at data + r * row_stride elements. data null: not given.
struct LogitMatrix {
  const void* data;
  int64_t row_stride;
};

// Which generated token a step draws: `of_row` int64 [B], or `all` for every row where it is null.
struct StepIndex {
  uint64_t all;
  const int64_t* of_row;
};

struct ResultColumns {
  int64_t* token;
  float* logprob;
  int32_t* n_kept;
  int32_t* status;
};

struct ScoreMatrices {
  float* scores;        // [B, V]
  float* biased_clean;  // [B, V]
  uint8_t* keep;        // [B, V]
  int32_t* status;      // [B]
};

// Everything about a decode step that stays the same during a generation. Copies what it is given, except the mask words.
class Step {
 public:
  // `packed`: see unpack_row. Throws std::invalid_argument, which names row and field, for an illegal value.
  Step(DType dtype, int64_t rows, int64_t vocab_size, const double* packed);

  // words [n_masks, ceil(V / 32)], contiguous; they must outlive the step and not change.
  void set_masks(const int32_t* words, int64_t n_masks);
  void set_key(const int64_t* seeds, const int64_t* streams);

  // Lists the tokens of the masks that these rows use; false if a mask id is out of range. Must come before `decode` and
  // `scores` with the same ids, and not from two threads at once.
  bool use_masks(const int64_t* mask_ids);

  // mask_ids int64 [B] in [-1, n_masks); null: mask 0 for every row, none if there are no masks. False, and nothing
  // computed, if a step is out of range or a row samples without a key.
  bool decode(LogitMatrix clean, LogitMatrix noised, const int64_t* mask_ids, StepIndex step, const ResultColumns& out,
              int64_t threads) const;
  void scores(LogitMatrix clean, LogitMatrix noised, const int64_t* mask_ids, const ScoreMatrices& out,
              int64_t threads) const;

  int64_t rows() const { return rows_; }

 private:
  // A mask as its tokens are listed when a row first uses it.
  struct ListedMask {
    Mask mask{};
    std::vector<int32_t> tokens;
  };

  int64_t mask_of(const int64_t* mask_ids, int64_t row) const;
  RowInput input(LogitMatrix clean, LogitMatrix noised, const int64_t* mask_ids, int64_t row) const;

  DType dtype_;
  int64_t rows_, vocab_size_;
  std::vector<RowParams> params_;
  const int32_t* words_ = nullptr;
  std::vector<ListedMask> masks_;
  std::vector<DrawKey> keys_;
};

// Draws from processed scores [B, V]; seeds null takes the best.
void draw(DType dtype, int64_t rows, int64_t vocab_size, LogitMatrix scores, const int64_t* seeds,
          const int64_t* streams, StepIndex step, const ResultColumns& out, int64_t threads);

// Chooses the loops by name ("baseline", "avx2", "avx512"), for tests; false if this processor lacks them.
bool use_loops(const char* name);

}  // namespace safecode::cpu
