// The CUDA kernels against the CPU code, without Python or torch: what compute-sanitizer watches on a GPU, and what the
// sanitizers of the compiler watch in the emulation. 12 shapes, each in every form of launch that the device has.
//
// usage: decode_driver [SHAPE...]    exit code 0: all agree, 1: some differ, 3: no GPU that it can run on
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../../csrc/cpu/step.h"
#include "../../csrc/cuda/launch.h"

namespace {

using safecode::DType;
namespace cuda = safecode::cuda;

constexpr int kNotAvailable = 3;
constexpr float kLogprobTolerance = 5e-5f;  // safecode_kernels/testing.py: LOGPROB_ATOL
constexpr int64_t kMasks = 3;
constexpr int kFields = 10;  // safecode_kernels/contract.py: PACKED_FIELDS

// What the rows of a shape are like.
enum class Kind { kOrdinary, kFlat, kTies, kSpecial };

struct Shape {
  const char* name;
  int64_t rows, vocab_size;
  DType dtype;
  Kind kind;
  int64_t padding;  // logits between the rows, which end at a boundary of 16 bytes only by chance
  int64_t offset;   // logits before the first row
  double beta;      // -1: different in each row
  double top_k, top_p;
  double scope;
};

constexpr Shape kShapes[] = {
    {"one_row", 1, 152064, DType::kBFloat16, Kind::kOrdinary, 0, 0, 0.1, 50, 0.9, 0},
    {"eight_rows", 8, 32064, DType::kBFloat16, Kind::kOrdinary, 0, 0, 0.1, 0, 0.95, 0},
    {"odd_stride", 3, 32003, DType::kFloat32, Kind::kOrdinary, 5, 1, 0.1, 40, 1.0, 0},
    {"unaligned_half", 2, 9001, DType::kFloat16, Kind::kOrdinary, 3, 3, 0.01, 0, 0.8, 20},
    {"flat_overflow", 2, 20000, DType::kBFloat16, Kind::kFlat, 0, 0, 0.1, 0, 0.9, 0},
    {"dense_top_p", 2, 20011, DType::kFloat32, Kind::kOrdinary, 1, 0, 0.0, 0, 0.9, 0},
    {"dense_top_k", 2, 9001, DType::kBFloat16, Kind::kOrdinary, 0, 7, 0.0, 50, 0.9, 20},
    {"dense_race", 2, 5003, DType::kFloat16, Kind::kOrdinary, 0, 0, 0.0, 0, 1.0, 0},
    {"ties", 4, 5000, DType::kFloat32, Kind::kTies, 0, 0, -1, 50, 0.87, 1},
    {"special_values", 24, 1023, DType::kFloat32, Kind::kSpecial, 9, 2, -1, 3, 0.9, 0},
    {"mixed_rows", 32, 3001, DType::kBFloat16, Kind::kOrdinary, 7, 5, -1, 50, 0.87, 20},
    {"one_token", 3, 1, DType::kFloat32, Kind::kOrdinary, 0, 0, -1, 0, 0.5, 1},
};

struct Random {
  uint64_t state;
  uint64_t bits() {  // splitmix64
    uint64_t x = state += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
  }
  double uniform() { return (static_cast<double>(bits() >> 11) + 0.5) * 0x1p-53; }
  double normal() { return std::sqrt(-2 * std::log(uniform())) * std::cos(6.283185307179586 * uniform()); }
};

uint16_t to_half(float x, DType dtype) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  if (dtype == DType::kBFloat16) return static_cast<uint16_t>(bits >> 16);
  if (std::fabs(x) < 6.2e-5f) return 0;
  return static_cast<uint16_t>((bits >> 16 & 0x8000u) | ((bits & 0x7FFFFFFFu) - (112u << 23)) >> 13);
}

// One input of a shape in host memory.
struct Inputs {
  std::vector<unsigned char> clean, noised;
  int64_t stride;
  std::vector<double> packed;
  std::vector<int32_t> words;
  std::vector<int64_t> mask_ids, seeds, streams, steps;
};

float logit(Kind kind, double value) {
  if (kind == Kind::kFlat) return static_cast<float>(0.05 * value);
  return static_cast<float>(kind == Kind::kTies ? std::round(value) : value);
}

void fill_logits(const Shape& shape, Random& random, Inputs& inputs) {
  const size_t size = shape.dtype == DType::kFloat32 ? 4 : 2;
  inputs.stride = shape.vocab_size + shape.padding;
  const auto logits = static_cast<size_t>(shape.offset + shape.rows * inputs.stride);
  inputs.clean.resize(logits * size);
  inputs.noised.resize(logits * size);
  constexpr float kSpecial[] = {NAN, INFINITY, -INFINITY, 3e38f, -3e38f};
  for (size_t i = 0; i < logits; ++i) {
    const double base = 2.5 * random.normal();
    float z = logit(shape.kind, base), n = logit(shape.kind, base + random.normal());
    if (shape.kind == Kind::kSpecial && random.bits() % 2048 == 0) (i % 2 ? z : n) = kSpecial[random.bits() % 5];
    for (auto [memory, value] : {std::pair{inputs.clean.data(), z}, std::pair{inputs.noised.data(), n}}) {
      if (size == 4) {
        memcpy(memory + i * size, &value, size);
      } else {
        const uint16_t half = to_half(value, shape.dtype);
        memcpy(memory + i * size, &half, size);
      }
    }
  }
}

void fill_parameters(const Shape& shape, Random& random, Inputs& inputs) {
  const int64_t rows = shape.rows;
  inputs.packed.resize(static_cast<size_t>(kFields * rows));
  constexpr double kBetas[] = {0.0, 0.01, 0.1, 0.5}, kBiases[] = {-6, -1, 0, 0.7, 6}, kWeights[] = {0, 0.43, 1};
  for (int64_t row = 0; row < rows; ++row) {
    const double beta = shape.beta < 0 ? kBetas[random.bits() % 4] : shape.beta;
    const bool greedy = random.bits() % 3 == 0;
    const auto weight = static_cast<float>(kWeights[random.bits() % 3]);
    const double fields[kFields] = {weight,
                                    static_cast<float>(1.0 + weight),
                                    static_cast<float>(kBiases[random.bits() % 5]),
                                    shape.scope,
                                    static_cast<float>(std::log(beta)),
                                    greedy ? 1 : static_cast<float>(0.8),
                                    greedy ? 0 : shape.top_k,
                                    greedy ? 1 : shape.top_p,
                                    greedy ? -INFINITY : static_cast<float>(std::log(0.01)),
                                    greedy ? 1.0 : 0.0};
    for (int field = 0; field < kFields; ++field) {
      inputs.packed[static_cast<size_t>(field * rows + row)] = fields[field];
    }
    inputs.mask_ids.push_back(static_cast<int64_t>(random.bits() % (kMasks + 1)) - 1);
    inputs.seeds.push_back(static_cast<int64_t>(random.bits() >> 1));
    inputs.streams.push_back(static_cast<int64_t>(random.bits() % 4));
    inputs.steps.push_back(static_cast<int64_t>(random.bits() % 100));
  }
  inputs.words.assign(static_cast<size_t>(kMasks * ((shape.vocab_size + 31) / 32)), 0);
  for (int32_t& word : inputs.words) word = static_cast<int32_t>(random.bits() & random.bits() & random.bits());
}

struct Outputs {
  std::vector<int64_t> token;
  std::vector<float> logprob, scores, biased_clean;
  std::vector<int32_t> n_kept, status, scores_status;
  std::vector<uint8_t> keep;

  Outputs(int64_t rows, int64_t vocab_size)
      : token(rows), logprob(rows), scores(rows * vocab_size), biased_clean(rows * vocab_size), n_kept(rows),
        status(rows), scores_status(rows), keep(rows * vocab_size) {}
};

Outputs on_cpu(const Shape& shape, const Inputs& inputs) {
  const size_t size = shape.dtype == DType::kFloat32 ? 4 : 2;
  safecode::cpu::Step step(shape.dtype, shape.rows, shape.vocab_size, inputs.packed.data());
  step.set_masks(inputs.words.data(), kMasks);
  step.set_key(inputs.seeds.data(), inputs.streams.data());
  if (!step.use_masks(inputs.mask_ids.data())) abort();
  Outputs out(shape.rows, shape.vocab_size);
  const safecode::cpu::LogitMatrix clean{inputs.clean.data() + shape.offset * size, inputs.stride};
  const safecode::cpu::LogitMatrix noised{inputs.noised.data() + shape.offset * size, inputs.stride};
  step.decode(clean, noised, inputs.mask_ids.data(), {0, inputs.steps.data()},
              {out.token.data(), out.logprob.data(), out.n_kept.data(), out.status.data()}, 1);
  step.scores(clean, noised, inputs.mask_ids.data(),
              {out.scores.data(), out.biased_clean.data(), out.keep.data(), out.scores_status.data()}, 1);
  return out;
}

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  exit(1);
}

// Device memory that is freed at the end. Nothing is written to it here, so that initcheck sees what is read too early.
class Memory {
 public:
  explicit Memory(size_t bytes) {
    check(cudaMalloc(&place_, bytes + 1), "cudaMalloc");
  }
  template <class T>
  explicit Memory(const std::vector<T>& values) : Memory(values.size() * sizeof(T)) {
    check(cudaMemcpy(place_, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  Memory(const Memory&) = delete;
  ~Memory() { cudaFree(place_); }
  template <class T>
  T* as() const {
    return static_cast<T*>(place_);
  }
  template <class T>
  void read(std::vector<T>& values) const {
    check(cudaMemcpy(values.data(), place_, values.size() * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
  }

 private:
  void* place_ = nullptr;
};

Outputs on_device(const Shape& shape, const Inputs& inputs, const cuda::Plan& plan) {
  const size_t size = shape.dtype == DType::kFloat32 ? 4 : 2, cells = shape.rows * shape.vocab_size;
  const Memory clean(inputs.clean), noised(inputs.noised), packed(inputs.packed), words(inputs.words);
  const Memory mask_ids(inputs.mask_ids), seeds(inputs.seeds), streams(inputs.streams), steps(inputs.steps);
  const Memory token(shape.rows * 8), logprob(shape.rows * 4), n_kept(shape.rows * 4), status(shape.rows * 4);
  const Memory scores(cells * 4), biased_clean(cells * 4), keep(cells), scores_status(shape.rows * 4);
  cuda::Task task{};
  task.rows = shape.rows;
  task.vocab_size = static_cast<uint32_t>(shape.vocab_size);
  task.clean = {clean.as<unsigned char>() + shape.offset * size, inputs.stride};
  task.noised = {noised.as<unsigned char>() + shape.offset * size, inputs.stride};
  task.packed = packed.as<double>();
  task.words = words.as<int32_t>();
  task.n_masks = kMasks;
  task.mask_ids = mask_ids.as<int64_t>();
  task.seeds = seeds.as<int64_t>();
  task.streams = streams.as<int64_t>();
  task.step_of_row = steps.as<int64_t>();
  task.token = token.as<int64_t>();
  task.logprob = logprob.as<float>();
  task.n_kept = n_kept.as<int32_t>();
  task.status = status.as<int32_t>();
  task.scores = scores.as<float>();
  task.biased_clean = biased_clean.as<float>();
  task.keep = keep.as<uint8_t>();
  const cuda::ScratchSize scratch_bytes = cuda::scratch_size(plan, shape.rows, shape.vocab_size);
  const Memory scratch(scratch_bytes.all);
  check(cudaMemset(scratch.as<void>(), 0, scratch_bytes.zeroed), "cudaMemset");
  cuda::place_scratch(plan, scratch.as<void>(), task);
  // Twice: a launch must leave the scratch as the next one needs it.
  for (int i = 0; i < 2; ++i) check(cuda::launch(shape.dtype, cuda::Call::kDecode, plan, task, nullptr), "decode");
  Outputs out(shape.rows, shape.vocab_size);
  status.read(out.status);
  task.status = scores_status.as<int32_t>();
  check(cuda::launch(shape.dtype, cuda::Call::kScores, plan, task, nullptr), "scores");
  check(cudaDeviceSynchronize(), "kernels");
  token.read(out.token);
  logprob.read(out.logprob);
  n_kept.read(out.n_kept);
  scores.read(out.scores);
  biased_clean.read(out.biased_clean);
  keep.read(out.keep);
  scores_status.read(out.scores_status);
  return out;
}

int64_t differing(const Outputs& a, const Outputs& b) {
  int64_t count = (a.scores_status != b.scores_status) + (a.keep != b.keep);
  count += (a.scores != b.scores) + (a.biased_clean != b.biased_clean);  // no NaN is ever returned
  for (size_t row = 0; row < a.token.size(); ++row) {
    const bool same = a.token[row] == b.token[row] && a.n_kept[row] == b.n_kept[row] && a.status[row] == b.status[row];
    const float error = a.status[row] ? 0.0f : std::fabs(a.logprob[row] - b.logprob[row]);
    if (same && error <= kLogprobTolerance) continue;
    ++count;
    fprintf(stderr, "  row %zu: token %lld, n_kept %d, status %d, logprob %g; expected %lld, %d, %d, %g\n", row,
            static_cast<long long>(b.token[row]), b.n_kept[row], b.status[row], static_cast<double>(b.logprob[row]),
            static_cast<long long>(a.token[row]), a.n_kept[row], a.status[row], static_cast<double>(a.logprob[row]));
  }
  return count;
}

std::vector<cuda::Plan> plans_for(const cuda::DeviceFacts& facts, const Shape& shape) {
  const cuda::Plan chosen = choose_plan(facts, shape.dtype, shape.rows, shape.vocab_size);
  std::vector<cuda::Plan> plans = {chosen, {false, 1}, {false, 5}};
  if (facts.has_clusters) plans.insert(plans.end(), {{true, 1}, {true, 3}, {true, 8}});
  return plans;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string reason = cuda::why_unusable(0);
  if (!reason.empty()) {
    printf("not available: %s\n", reason.c_str());
    return kNotAvailable;
  }
  cuda::DeviceFacts facts{};
  check(cuda::read_facts(0, facts), "device");
  int64_t failures = 0, runs = 0;
  for (const Shape& shape : kShapes) {
    bool is_wanted = argc < 2;
    for (int i = 1; i < argc; ++i) is_wanted |= strcmp(argv[i], shape.name) == 0;
    if (!is_wanted) continue;
    Random random{static_cast<uint64_t>(&shape - kShapes) + 1};
    Inputs inputs;
    fill_logits(shape, random, inputs);
    fill_parameters(shape, random, inputs);
    const Outputs expected = on_cpu(shape, inputs);
    for (const cuda::Plan& plan : plans_for(facts, shape)) {
      const int64_t count = differing(expected, on_device(shape, inputs, plan));
      printf("%s %s: %s of %d\n", count ? "DIFFERS" : "agrees", shape.name, plan.clusters ? "cluster" : "blocks",
             plan.blocks_per_row);
      failures += count != 0;
      ++runs;
    }
  }
  printf("%lld of %lld runs agree with the CPU code\n", static_cast<long long>(runs - failures),
         static_cast<long long>(runs));
  return failures || !runs;
}
