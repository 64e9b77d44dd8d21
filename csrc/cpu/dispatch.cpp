// Chooses the loops of the best instruction set that this processor has.
#include "loops.h"

namespace safecode::cpu {

namespace baseline {
extern const Loops kLoops;
}
#if defined(SAFECODE_X86)
namespace avx2 {
extern const Loops kLoops;
}
namespace avx512 {
extern const Loops kLoops;
}
#endif

namespace {

const Loops& choose() {
#if defined(SAFECODE_X86)
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx2 && has_avx512) return avx512::kLoops;
  if (has_avx2) return avx2::kLoops;
#endif
  return baseline::kLoops;
}

const Loops* named(const char* name) {
#if defined(SAFECODE_X86)
  if (name[0] == 'a' && choose().name[0] == 'a') {  // both names start so; the processor has at least AVX2
    const bool wide = name[3] == '5';
    if (!wide) return &avx2::kLoops;
    return choose().name[3] == '5' ? &avx512::kLoops : nullptr;
  }
#endif
  return name[0] == 'b' ? &baseline::kLoops : nullptr;
}

const Loops* current = &choose();

}  // namespace

const Loops& loops() { return *current; }

bool use_loops(const char* name) {
  const Loops* chosen = named(name);
  if (chosen) current = chosen;
  return chosen != nullptr;
}

}  // namespace safecode::cpu
