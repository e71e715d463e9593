// Threads for the CPU ops.
#pragma once

#include <cstdint>
#include <functional>

namespace dac {

// Calls body(begin, end) on pieces of [0, count) of `grain` indices each (the last may be shorter), on up to
// `threads` threads, the caller's included, and returns when all are done. Which thread runs which piece is open, so
// a body whose result must not depend on that writes only what belongs to its indices. An exception of the body is
// rethrown to the caller.
void parallel_for(int64_t count, int64_t grain, int threads, const std::function<void(int64_t, int64_t)>& body);

}  // namespace dac
