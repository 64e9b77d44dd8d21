// The table of this instruction set.
#include "isa.h"

#define SAFECODE_TEXT_(x) #x
#define SAFECODE_TEXT(x) SAFECODE_TEXT_(x)

namespace safecode::cpu::SAFECODE_ISA {

extern const Loops kLoops;
const Loops kLoops = {SAFECODE_TEXT(SAFECODE_ISA),
                      chunk_maxima,
                      collect,
                      largest_logit,
                      convert,
                      read,
                      contrast_rows,
                      maximum,
                      group_maxima,
                      find,
                      summarise,
                      divide,
                      mass,
                      rough_mass,
                      weights,
                      keep_at_least,
                      keep_of_groups,
                      race,
                      largest_integer};

}  // namespace safecode::cpu::SAFECODE_ISA
