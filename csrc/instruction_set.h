// One source, compiled for several x86 instruction sets; the widest that this CPU has is picked at run time.
#pragma once

namespace dac {

enum class InstructionSet { portable, avx2, avx512 };

#if defined(__x86_64__) && defined(__GNUC__)

inline bool supported(InstructionSet set) {
  if (set == InstructionSet::avx512) return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq");
  if (set == InstructionSet::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return true;
}

// `flatten` pulls the whole body into the function, so all of it is compiled for the function's target.
template <class Body>
__attribute__((target("avx512f,avx512dq,avx2,fma,prefer-vector-width=512"), flatten)) void run_avx512(Body& body) {
  body();
}

template <class Body>
__attribute__((target("avx2,fma"), flatten)) void run_avx2(Body& body) {
  body();
}

template <class Body>
void run(InstructionSet set, Body&& body) {
  if (set == InstructionSet::avx512) return run_avx512(body);
  if (set == InstructionSet::avx2) return run_avx2(body);
  body();
}

#else

inline bool supported(InstructionSet set) { return set == InstructionSet::portable; }

template <class Body>
void run(InstructionSet, Body&& body) {
  body();
}

#endif

inline InstructionSet best_instruction_set() {
  if (supported(InstructionSet::avx512)) return InstructionSet::avx512;
  return supported(InstructionSet::avx2) ? InstructionSet::avx2 : InstructionSet::portable;
}

}  // namespace dac
