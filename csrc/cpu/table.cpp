#include "ops.h"

#define FLUXFAST_TEXT_OF(name) #name
#define FLUXFAST_TEXT(name) FLUXFAST_TEXT_OF(name)

namespace fluxfast {
namespace FLUXFAST_ISA {

extern const CpuOps ops;
const CpuOps ops = {
    FLUXFAST_TEXT(FLUXFAST_ISA),
#define OP(name, arguments) name,
    FLUXFAST_CPU_OPS(OP)
#undef OP
};

}  // namespace FLUXFAST_ISA
}  // namespace fluxfast
