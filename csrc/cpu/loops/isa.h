// What the files of this folder have in common. CMake compiles them once per instruction set, with SAFECODE_ISA naming the
// namespace: plain loops that the compiler vectorises. They must not instantiate templates of the standard library: the
// linker keeps one copy of those for all callers, which might be the one that this processor cannot run.
#pragma once

#include "../loops.h"

#ifndef SAFECODE_ISA
#define SAFECODE_ISA baseline
#endif

namespace safecode::cpu::SAFECODE_ISA {

constexpr int64_t kLanes = 64;  // values treated side by side

template <class T>
inline T larger(T a, T b) {
  return a > b ? a : b;
}

template <class T>
inline T smaller(T a, T b) {
  return a < b ? a : b;
}

// The entries of the table `Loops`, which describes them.
float chunk_maxima(const LogitRow& row, void* maxima);
int64_t collect(const LogitRow& row, const void* maxima, const Gather& gather, float best, int64_t chunk, Found& found);
float largest_logit(const LogitRow& row, int64_t begin, int64_t n);
void convert(const LogitRow& row, int64_t begin, int64_t n, float* out);
void read(const LogitRow& row, const int32_t* tokens, int64_t n, float* out);
uint32_t contrast_rows(const float* z, const float* noised, int64_t n, const ContrastParams& params, float* scores);
float maximum(const float* x, int64_t n);
void group_maxima(const float* x, int64_t n, float* out);
int64_t find(const float* x, int64_t n, float value);
Summary summarise(const float* x, int64_t n);
void divide(float* x, int64_t n, float divisor);
double mass(const float* x, int64_t n, float best);
double rough_mass(const float* x, int64_t n, float best);
void weights(const float* x, int64_t n, float best, double* out);
int64_t keep_at_least(const Scored& from, float floor, Scored to);
int64_t keep_of_groups(const Scored& from, const float* maxima, float floor, Scored to);
RaceBest race(const Scored& scored, const DrawKey& key);
int32_t largest_integer(const int32_t* x, int64_t n);

}  // namespace safecode::cpu::SAFECODE_ISA
