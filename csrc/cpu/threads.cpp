#include "threads.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace safecode::cpu {
namespace {

struct Job {
  const std::function<void(int64_t)>& work;
  int64_t rows;
  std::atomic<int64_t> next{0};
  int64_t helpers = 0;  // threads inside the job besides the caller's, and how many more may enter
  int64_t places;
  std::exception_ptr error;
};

// Threads that sleep until there is a job. Never destroyed: they may sleep on when the process ends.
class Pool {
 public:
  std::mutex in_use;  // one job at a time; a second caller does its rows alone

  void run(Job& job) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      start_threads(job.places);
      job_ = &job;
    }
    arrived_.notify_all();
    take_rows(job);
    std::unique_lock<std::mutex> lock(mutex_);
    job_ = nullptr;
    left_.wait(lock, [&] { return job.helpers == 0; });
  }

  void take_rows(Job& job) {
    try {
      for (int64_t row; (row = job.next.fetch_add(1)) < job.rows;) job.work(row);
    } catch (...) {
      job.next.store(job.rows);
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!job.error) job.error = std::current_exception();
    }
  }

 private:
  void start_threads(int64_t wanted) {
    try {
      for (; threads_ < wanted; ++threads_) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {
      // No more threads to be had: those that there are will do.
    }
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      arrived_.wait(lock, [this] { return job_ && job_->places > 0 && job_->next.load() < job_->rows; });
      Job& job = *job_;
      --job.places;
      ++job.helpers;
      lock.unlock();
      take_rows(job);
      lock.lock();
      if (--job.helpers == 0) left_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable arrived_, left_;
  Job* job_ = nullptr;
  int64_t threads_ = 0;
};

std::atomic<Pool*> the_pool{nullptr};

Pool& pool() {
  static std::mutex making;
  Pool* present = the_pool.load();
  if (present) return *present;
  const std::lock_guard<std::mutex> lock(making);
  present = the_pool.load();
  if (!present) {
    present = new Pool;
    the_pool.store(present);
#if defined(__unix__) || defined(__APPLE__)
    // A forked child has none of the threads: it starts with a pool of its own.
    static const int registered = pthread_atfork(nullptr, nullptr, [] { the_pool.store(nullptr); });
    (void)registered;
#endif
  }
  return *present;
}

}  // namespace

void for_each_row(int64_t rows, int64_t threads, const std::function<void(int64_t)>& work) {
  threads = std::min(threads, rows);
  if (threads > 1) {
    Pool& shared = pool();
    const std::unique_lock<std::mutex> mine(shared.in_use, std::try_to_lock);
    if (mine.owns_lock()) {
      Job job{work, rows, {}, 0, threads - 1, nullptr};
      shared.run(job);
      if (job.error) std::rethrow_exception(job.error);
      return;
    }
  }
  for (int64_t row = 0; row < rows; ++row) work(row);
}

}  // namespace safecode::cpu
