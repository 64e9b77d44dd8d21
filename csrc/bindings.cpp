// The Python module safecode_kernels._native: raw addresses in, nothing of torch, so that any torch version works. The
// Python side (backends/native_cpu.py) has checked every argument; the GIL is released while rows are computed.
#include <pybind11/pybind11.h>

#include <chrono>
#include <memory>

#include "cpu/loops.h"
#include "cpu/step.h"

namespace py = pybind11;

namespace {

using safecode::DType;
using safecode::cpu::LogitMatrix;
using safecode::cpu::Step;
using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

LogitMatrix matrix(Address data, int64_t row_stride) { return {at<const void>(data), row_stride}; }

std::unique_ptr<Step> make_step(int32_t dtype, int64_t rows, int64_t vocab_size, Address packed) {
  return std::make_unique<Step>(static_cast<DType>(dtype), rows, vocab_size, at<const double>(packed));
}

bool decode(Step& step, Address clean, int64_t clean_stride, Address noised, int64_t noised_stride, Address mask_ids,
            uint64_t step_of_all, Address step_of_row, Address token, Address logprob, Address n_kept, Address status,
            int64_t threads) {
  if (!step.use_masks(at<const int64_t>(mask_ids))) return false;  // under the GIL: it writes
  const py::gil_scoped_release released;
  return step.decode(matrix(clean, clean_stride), matrix(noised, noised_stride), at<const int64_t>(mask_ids),
                     {step_of_all, at<const int64_t>(step_of_row)},
                     {at<int64_t>(token), at<float>(logprob), at<int32_t>(n_kept), at<int32_t>(status)}, threads);
}

// The same with a step that is made for this one call.
bool decode_once(int32_t dtype, int64_t rows, int64_t vocab_size, Address packed, Address words, int64_t n_masks,
                 Address seeds, Address streams, Address clean, int64_t clean_stride, Address noised,
                 int64_t noised_stride, Address mask_ids, uint64_t step_of_all, Address step_of_row, Address token,
                 Address logprob, Address n_kept, Address status, int64_t threads) {
  Step step(static_cast<DType>(dtype), rows, vocab_size, at<const double>(packed));
  if (words) step.set_masks(at<const int32_t>(words), n_masks);
  if (seeds) step.set_key(at<const int64_t>(seeds), at<const int64_t>(streams));
  return decode(step, clean, clean_stride, noised, noised_stride, mask_ids, step_of_all, step_of_row, token, logprob,
                n_kept, status, threads);
}

bool scores(Step& step, Address clean, int64_t clean_stride, Address noised, int64_t noised_stride, Address mask_ids,
            Address out_scores, Address biased_clean, Address keep, Address status, int64_t threads) {
  if (!step.use_masks(at<const int64_t>(mask_ids))) return false;
  const py::gil_scoped_release released;
  step.scores(matrix(clean, clean_stride), matrix(noised, noised_stride), at<const int64_t>(mask_ids),
              {at<float>(out_scores), at<float>(biased_clean), at<uint8_t>(keep), at<int32_t>(status)}, threads);
  return true;
}

void draw(int32_t dtype, int64_t rows, int64_t vocab_size, Address values, int64_t stride, Address seeds,
          Address streams, uint64_t step_of_all, Address step_of_row, Address token, Address logprob, Address n_kept,
          Address status, int64_t threads) {
  const py::gil_scoped_release released;
  safecode::cpu::draw(static_cast<DType>(dtype), rows, vocab_size, matrix(values, stride), at<const int64_t>(seeds),
                      at<const int64_t>(streams), {step_of_all, at<const int64_t>(step_of_row)},
                      {at<int64_t>(token), at<float>(logprob), at<int32_t>(n_kept), at<int32_t>(status)}, threads);
}

// The best time in seconds of one pass over n 32-bit integers.
double read_seconds(Address data, int64_t n, int64_t repetitions) {
  const py::gil_scoped_release released;
  double best = 1e300;
  volatile int32_t sink = 0;
  for (int64_t i = 0; i < repetitions; ++i) {
    const auto start = std::chrono::steady_clock::now();
    sink = safecode::cpu::loops().largest_integer(at<const int32_t>(data), n);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = seconds.count() < best ? seconds.count() : best;
  }
  (void)sink;
  return best;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "The decode step in C++ on the CPU; use it through safecode_kernels.";
  py::class_<Step>(module, "Step")
      .def(py::init(&make_step))
      .def("set_masks", [](Step& step, Address words, int64_t n) { step.set_masks(at<const int32_t>(words), n); })
      .def("set_key", [](Step& step, Address seeds,
                         Address streams) { step.set_key(at<const int64_t>(seeds), at<const int64_t>(streams)); })
      .def("decode", &decode)
      .def("scores", &scores);
  module.def("decode_once", &decode_once);
  module.def("draw", &draw);
  module.def("loops", [] { return safecode::cpu::loops().name; });
  module.def("use_loops", [](const char* name) { return safecode::cpu::use_loops(name); });
  module.def("read_seconds", &read_seconds);
}
