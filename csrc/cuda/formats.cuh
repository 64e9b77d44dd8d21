// Logits in memory: one at a time, and 16 bytes at a time.
#pragma once

#include "platform.cuh"

namespace safecode::cuda {

struct Float32 {
  using Bits = uint32_t;
  static constexpr DType kDType = DType::kFloat32;
  static constexpr uint32_t kExcludedWord = 0xFF800000u;  // -inf in every place of a word
  __device__ static float value(Bits bits) { return bit_cast<float>(bits); }
};

struct BFloat16 {
  using Bits = uint16_t;
  static constexpr DType kDType = DType::kBFloat16;
  static constexpr uint32_t kExcludedWord = 0xFF80FF80u;
  __device__ static float value(Bits bits) { return from_bfloat16(bits); }
};

struct Float16 {
  using Bits = uint16_t;
  static constexpr DType kDType = DType::kFloat16;
  static constexpr uint32_t kExcludedWord = 0xFC00FC00u;
  __device__ static float value(Bits bits) { return from_float16(bits); }
};

template <class Format>
struct Vector {
  static constexpr int kSize = 16 / sizeof(typename Format::Bits);  // logits
  uint32_t word[4];

  __device__ static Vector excluded() {
    constexpr uint32_t kWord = Format::kExcludedWord;
    return {{kWord, kWord, kWord, kWord}};
  }
  // `address` is a multiple of 16.
  __device__ static Vector load(const void* address) {
    const uint4 loaded = __ldg(static_cast<const uint4*>(address));
    return {{loaded.x, loaded.y, loaded.z, loaded.w}};
  }
  // `i` must be known to the compiler.
  __device__ float at(int i) const {
    if constexpr (kSize == 4) return Format::value(word[i]);
    const uint32_t pair = word[i / 2];
    return Format::value(static_cast<typename Format::Bits>(i % 2 ? pair >> 16 : pair));
  }
};

// A row of logits that lie side by side.
template <class Format>
struct Logits {
  const typename Format::Bits* data;

  __device__ static Logits of_row(const LogitMatrix& matrix, int64_t row) {
    if (!matrix.data) return {nullptr};
    return {static_cast<const typename Format::Bits*>(matrix.data) + row * matrix.row_stride};
  }
  __device__ float at(uint32_t token) const { return Format::value(__ldg(data + token)); }
};

}  // namespace safecode::cuda
