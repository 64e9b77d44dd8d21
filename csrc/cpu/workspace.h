// Memory of one thread, kept between rows and calls.
#pragma once

#include <cstdint>
#include <vector>

namespace safecode::cpu {

struct Candidate {
  float score;
  int32_t token;
};

struct Workspace {
  std::vector<unsigned char> maxima;  // ranks of any dtype
  std::vector<int32_t> tokens, spare_tokens;
  std::vector<Candidate> candidates;
  std::vector<float> clean, noised, scores, biased, spare;
  std::vector<double> weights;
};

// Returns room for n values; what was in there may be lost.
template <class T>
T* room(std::vector<T>& memory, int64_t n) {
  if (memory.size() < static_cast<size_t>(n)) memory.resize(static_cast<size_t>(n));
  return memory.data();
}

}  // namespace safecode::cpu
