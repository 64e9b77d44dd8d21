// Threads over rows.
#pragma once

#include <cstdint>
#include <functional>

namespace safecode::cpu {

// Calls work(row) for rows 0..rows-1, on up to `threads` threads including the caller's. The caller takes rows itself
// and waits only for rows that another thread has begun, never for a thread that has not woken up. Rethrows the first
// exception. Safe to call from several threads at once and in a forked child.
void for_each_row(int64_t rows, int64_t threads, const std::function<void(int64_t)>& work);

}  // namespace safecode::cpu
