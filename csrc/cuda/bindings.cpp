// The Python module safecode_kernels._native_cuda: raw addresses on the device and a stream, nothing of torch, so that
// any torch version works. The Python side (backends/native_cuda.py) has checked every argument and keeps the tensors
// alive.
#include <pybind11/pybind11.h>

#include <memory>
#include <stdexcept>

#include "launch.h"

namespace py = pybind11;

namespace {

using namespace safecode::cuda;
using safecode::DType;
using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Everything about a decode step that stays the same during a generation.
class Step {
 public:
  Step(int device, int32_t dtype, int64_t rows, int64_t vocab_size)
      : device_(device), dtype_(static_cast<DType>(dtype)) {
    DeviceFacts facts{};
    const cudaError_t error = read_facts(device, facts);
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
    task_.rows = rows;
    task_.vocab_size = static_cast<uint32_t>(vocab_size);
    plan_ = choose_plan(facts, dtype_, rows, vocab_size);
  }

  void use_plan(bool clusters, int32_t blocks_per_row) { plan_ = {clusters, blocks_per_row}; }
  py::tuple plan() const { return py::make_tuple(plan_.clusters, plan_.blocks_per_row); }
  py::tuple scratch_bytes() const {
    const ScratchSize size = scratch_size(plan_, task_.rows, task_.vocab_size);
    return py::make_tuple(size.zeroed, size.all);
  }

  void set_scratch(Address base) { place_scratch(plan_, at<void>(base), task_); }
  void set_parameters(Address packed) { task_.packed = at<const double>(packed); }
  void set_masks(Address words, int64_t n_masks) {
    task_.words = at<const int32_t>(words);
    task_.n_masks = n_masks;
  }
  void set_key(Address seeds, Address streams) {
    task_.seeds = at<const int64_t>(seeds);
    task_.streams = at<const int64_t>(streams);
  }

  // Both return CUDA's error code.
  int decode(Address clean, int64_t clean_stride, Address noised, int64_t noised_stride, Address mask_ids,
             uint64_t step_of_all, Address step_of_row, Address token, Address logprob, Address n_kept,
             Address status, Address stream) const {
    Task task = with_logits(clean, clean_stride, noised, noised_stride, mask_ids);
    task.step = step_of_all;
    task.step_of_row = at<const int64_t>(step_of_row);
    task.token = at<int64_t>(token);
    task.logprob = at<float>(logprob);
    task.n_kept = at<int32_t>(n_kept);
    task.status = at<int32_t>(status);
    return launched(Call::kDecode, task, stream);
  }

  int scores(Address clean, int64_t clean_stride, Address noised, int64_t noised_stride, Address mask_ids,
             Address out_scores, Address biased_clean, Address keep, Address status, Address stream) const {
    Task task = with_logits(clean, clean_stride, noised, noised_stride, mask_ids);
    task.scores = at<float>(out_scores);
    task.biased_clean = at<float>(biased_clean);
    task.keep = at<uint8_t>(keep);
    task.status = at<int32_t>(status);
    return launched(Call::kScores, task, stream);
  }

 private:
  Task with_logits(Address clean, int64_t clean_stride, Address noised, int64_t noised_stride,
                   Address mask_ids) const {
    Task task = task_;
    task.clean = {at<const void>(clean), clean_stride};
    task.noised = {at<const void>(noised), noised_stride};
    task.mask_ids = at<const int64_t>(mask_ids);
    return task;
  }

  int launched(Call call, const Task& task, Address stream) const {
    const py::gil_scoped_release released;
    const OnDevice device(device_);
    if (device.error() != cudaSuccess) return device.error();
    return launch(dtype_, call, plan_, task, at<std::remove_pointer_t<cudaStream_t>>(stream));
  }

  int device_;
  DType dtype_;
  Plan plan_;
  Task task_{};
};

}  // namespace

PYBIND11_MODULE(_native_cuda, module) {
  module.doc() = "The decode step in CUDA C++; use it through safecode_kernels.";
  py::class_<Step>(module, "Step")
      .def(py::init<int, int32_t, int64_t, int64_t>())
      .def("plan", &Step::plan)
      .def("use_plan", &Step::use_plan)
      .def("scratch_bytes", &Step::scratch_bytes)
      .def("set_scratch", &Step::set_scratch)
      .def("set_parameters", &Step::set_parameters)
      .def("set_masks", &Step::set_masks)
      .def("set_key", &Step::set_key)
      .def("decode", &Step::decode)
      .def("scores", &Step::scores);
  module.def("architectures", &architectures);
  module.def("why_unusable", &why_unusable);
  module.def("error_text", [](int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); });
}
